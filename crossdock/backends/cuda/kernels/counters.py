"""What a call adds to tensors that its caller brought: tokens that came, and how long it waited for whom. Triton only.

Letters: L local experts, P ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import STATE_WORDS, is_ok
from crossdock.backends.cuda.kernels.tables import at_bytes


@triton.jit
def note_waits(seen, own):
    """Before a call: how long all calls so far have waited, into ``seen`` int64 ``[P]``."""
    ranks = tl.arange(0, triton.next_power_of_2(own.sizes.P))
    is_rank = ranks < own.sizes.P
    tl.store(seen + ranks, tl.load(own.state + STATE_WORDS + ranks, mask=is_rank), mask=is_rank)


@triton.jit
def add_counters(plan, tokens, waits, seen, own, HAS_TOKENS: tl.constexpr, HAS_WAITS: tl.constexpr):
    """Behind a call: adds what it has brought to ``tokens [L]``, unless it is void, and its waits to ``waits [P]``.

    Args:
        tokens: int32 or int64; waits: int64, nanoseconds.
        seen: what ``note_waits`` has left.
    """
    if HAS_TOKENS:  # noqa: SIM102 - one is of the compiler, the other of the device
        if is_ok(own.state):
            local = tl.arange(0, triton.next_power_of_2(own.sizes.L))
            is_local = local < own.sizes.L
            came = tl.load(at_bytes(plan, own.sizes.TABLES.tokens, tl.int32) + local, mask=is_local)
            so_far = tl.load(tokens + local, mask=is_local)
            tl.store(tokens + local, so_far + came.to(tokens.dtype.element_ty), mask=is_local)
    if HAS_WAITS:
        ranks = tl.arange(0, triton.next_power_of_2(own.sizes.P))
        is_rank = ranks < own.sizes.P
        waited = tl.load(own.state + STATE_WORDS + ranks, mask=is_rank) - tl.load(seen + ranks, mask=is_rank)
        tl.store(waits + ranks, tl.load(waits + ranks, mask=is_rank) + waited, mask=is_rank)
