"""Where the tables of a plan lie in its memory: one allocation, whose address is all that a kernel is given of it.

``crossdock.backends.cuda.plan`` divides it in the same way. Those of fixed size come first, at places that are
constants; then those that have a row for each of T tokens, 8-byte ones first.

Letters: T tokens here, J rows of a token, K top-k, R rows, L local experts, P ranks, N segments, W counts,
M max_tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.groups import Tables


@triton.jit
def at_bytes(plan, offset, dtype: tl.constexpr):
    """The part of a plan's memory (int32) so many bytes behind its begin."""
    return (plan + offset // 4).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def tables_of(plan, num_tokens, sizes):
    """The tables in a plan's memory.

    Returns:
        counts int64 ``[P, W]``; scalars int32, see ``plan.SCALARS``; tokens int32 ``[L]``, picks of each local expert;
        starts int32 ``[N + 1]``, first row of each segment, and the end; incoming int32 ``[3, N * P]``, of each
        block that comes here its first row, rows, place of the first in its sender's order, and the same of pairs;
        partial_rows int32 ``[P * M, K]``; dst_rows int64 ``[T, J]``; picks int64 ``[T, K]``; pair_dst_rows int64
        ``[T, PAIRS]``; return_rows int32 ``[T, J]``, pair_return_rows int32 ``[T, PAIRS]``.
    """
    J: tl.constexpr = sizes.J
    K: tl.constexpr = sizes.K
    PAIRS: tl.constexpr = sizes.PAIRS
    PICKS_AT: tl.constexpr = 8 * J
    PAIRS_AT: tl.constexpr = PICKS_AT + 8 * K
    RETURN_AT: tl.constexpr = PAIRS_AT + 8 * PAIRS
    PAIR_RETURN_AT: tl.constexpr = RETURN_AT + 4 * J
    END: tl.constexpr = sizes.TABLES.end
    return Tables(
        at_bytes(plan, sizes.TABLES.counts, tl.int64),
        at_bytes(plan, sizes.TABLES.scalars, tl.int32),
        at_bytes(plan, sizes.TABLES.tokens, tl.int32),
        at_bytes(plan, sizes.TABLES.starts, tl.int32),
        at_bytes(plan, sizes.TABLES.incoming, tl.int32),
        at_bytes(plan, sizes.TABLES.pair_incoming, tl.int32),
        at_bytes(plan, sizes.TABLES.partial_rows, tl.int32),
        at_bytes(plan, END, tl.int64),
        at_bytes(plan, END + num_tokens * PICKS_AT, tl.int64),
        at_bytes(plan, END + num_tokens * PAIRS_AT, tl.int64),
        at_bytes(plan, END + num_tokens * RETURN_AT, tl.int32),
        at_bytes(plan, END + num_tokens * PAIR_RETURN_AT, tl.int32),
    )
