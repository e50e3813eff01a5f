"""The way back to owners: where rows came from, and extras that go back with rows and arrive there. Triton only.

Extras are float32 ``[R, ...]``; those of a row lie side by side where they arrive.

Letters: T tokens here, J rows of a token, K top-k, R rows received, P ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import (
    SEQUENCE,
    TICKET,
    end_call,
    give_word,
    is_ok,
    slot_of,
    take_words,
)
from crossdock.backends.cuda.kernels.metadata import pointers, region_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK, src_rows_of
from crossdock.backends.cuda.kernels.plan import NUM_PAIRS, NUM_ROWS
from crossdock.backends.cuda.kernels.sync import is_last_program
from crossdock.backends.cuda.kernels.tables import tables_of

_AT_ONCE = tl.constexpr(128)
"""Values that a program moves at a time."""


@triton.jit
def find_src_rows(src_rows, incoming, num_rows, BLOCKS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """A program's share of where rows are from, see ``src_rows_of``."""
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        tl.store(src_rows + row, src_rows_of(row, incoming, num_rows, BLOCKS, P), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_tokens", "payload", "rank", "max_polls"])
def begin_return(
    plan,
    call,
    num_tokens,
    payload: tl.int64,
    rank,
    max_polls: tl.int64,
    own,
    scratch,
    ROWS: tl.constexpr,
):
    """``begin_call`` of a call in which this rank pushes something back: finds out where its rows came from, too.

    The first program gives the word; all of them find src_rows of rows and pairs, ROWS at a time; the last one waits.
    """
    P: tl.constexpr = own.sizes.P
    if (tl.program_id(0) == 0) & is_ok(own.state):
        give_word(own, call, payload, False, tl.zeros([1], tl.int64), 0, rank, False)
    tables = tables_of(plan, num_tokens, own.sizes)
    BLOCKS: tl.constexpr = P if own.sizes.BY_RANK else own.sizes.L * P
    if is_ok(own.state):
        find_src_rows(scratch.src_rows, tables.incoming, tl.load(tables.scalars + NUM_ROWS), BLOCKS, P, ROWS)
        if own.sizes.PAIRS > 0:
            num_pairs = tl.load(tables.scalars + NUM_PAIRS)
            find_src_rows(scratch.pair_src_rows, tables.pair_incoming, num_pairs, P, P, ROWS)
    if is_last_program(own.flags + TICKET):  # noqa: SIM102 - every program takes a ticket
        if is_ok(own.state):
            take_words(own, call, tl.load(call + P + SEQUENCE), payload, rank, max_polls)


@triton.jit(do_not_specialize=["width", "num_tokens", "rank", "max_polls"])
def push_extras(extras, width, plan, call, num_tokens, rank, max_polls: tl.int64, own, returns, scratch, how):
    """Writes the extras of each row, float32 ``[R, width]``, to its return_row at its owner.

    Behind ``begin_return``. The last program ends the call.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(how.ROW_BYTES // 4)
    ROWS: tl.constexpr = max(1, _AT_ONCE // PADDED)
    tables = tables_of(plan, num_tokens, own.sizes)
    if is_ok(own.state):
        num_rows = tl.load(tables.scalars + NUM_ROWS)
        value_at = tl.arange(0, PADDED)[None, :]
        for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
            row = first + tl.arange(0, ROWS)
            src_row = tl.load(scratch.src_rows + row, mask=row < num_rows, other=-1)
            is_value = (src_row >= 0)[:, None] & (value_at < width)
            value = tl.load(extras + row.to(tl.int64)[:, None] * width + value_at, mask=is_value, other=0.0)
            peer = tl.where(src_row >= 0, src_row >> ROW_BITS, 0)
            there = region_at(tl.load(own.segments + peer), returns.extras, slot_of(call, peer))
            there += (src_row & ROW_MASK) * how.ROW_BYTES
            tl.store(pointers(there, tl.float32)[:, None] + value_at, value, mask=is_value)
    end_call(own, call, tables.tokens, rank, max_polls, how.ends)


@triton.jit
def gather_share(call, tables, num_tokens, rank, results, width, own, returns, ROW_BYTES: tl.constexpr):
    """A program's share of extras that have come back: 0 without a pick ``[T, K, width]``, or sums ``[T, width]``.

    Args:
        results: float32.
        ROW_BYTES: between rows where they have arrived.
    """
    J: tl.constexpr = own.sizes.J
    PADDED: tl.constexpr = triton.next_power_of_2(ROW_BYTES // 4)
    TOKENS: tl.constexpr = max(1, _AT_ONCE // PADDED)
    good = is_ok(own.state)
    here = region_at(tl.load(own.segments + rank), returns.extras, slot_of(call, rank))
    value_at = tl.arange(0, PADDED)[None, :]
    for first in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_value = (token < num_tokens)[:, None] & (value_at < width)
        total = tl.zeros([TOKENS, PADDED], tl.float32)
        for j in tl.static_range(J):
            is_row = tl.load(tables.dst_rows + token * J + j, mask=token < num_tokens, other=-1) >= 0
            return_row = tl.load(tables.return_rows + token * J + j, mask=is_row, other=0).to(tl.int64)
            there = pointers(here + return_row * ROW_BYTES, tl.float32)[:, None] + value_at
            value = tl.load(there, mask=is_value & is_row[:, None] & good, other=0.0)
            if own.sizes.BY_RANK:
                total += value
            else:
                at = (token.to(tl.int64) * J + j)[:, None] * width + value_at
                tl.store(results + at, value, mask=is_value)
        if own.sizes.BY_RANK:
            tl.store(results + token.to(tl.int64)[:, None] * width + value_at, total, mask=is_value)


@triton.jit(do_not_specialize=["width", "num_tokens", "rank"])
def gather_extras(results, width, plan, call, num_tokens, rank, own, returns, how):
    """Extras that have come back, behind the end of the call's wait; see ``gather_share``."""
    tables = tables_of(plan, num_tokens, own.sizes)
    gather_share(call, tables, num_tokens, rank, results, width, own, returns, how.ROW_BYTES)
