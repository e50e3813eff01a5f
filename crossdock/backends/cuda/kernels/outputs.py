"""Outputs of few tokens that this rank pushes, or sums first: words, sums and stores in one kernel. Triton only.

The owners' sums follow in a kernel of their own, ``fused.combine_rows``, whose coordinator waits for what peers push.
Here nobody waits for rows, and only the coordinator for words; what others do before its go, rows found and summed, is
done while they are awaited.

Letters: K top-k, H hidden, R rows received, P ranks, N segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import GO_FLAG, TICKET, give_word, is_ok, post_arrived, slot_of, take_words
from crossdock.backends.cuda.kernels.metadata import as_int64, region_at, row_at
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.sync import (
    ABORTED,
    GO,
    NO_ROWS,
    OK,
    await_go,
    await_kernels_before,
    is_last_program,
    let_next_kernel_launch,
    release_programs,
)
from crossdock.backends.cuda.kernels.tables import tables_of

_COMPARED = tl.constexpr(4096)
"""Rows times blocks of rows that a program compares at a time."""
_MOST_ROWS = tl.constexpr(32)


@triton.jit
def find_rows(came, incoming, ends, first, last, BLOCKS: tl.constexpr, P: tl.constexpr):
    """Of the rows that came, counted without gaps, from ``first`` to ``last``: where each lies, and its src_row.

    Args:
        came: see ``Came``.
        incoming: int32 ``[3, BLOCKS]``, see ``tables``.
        ends: int32 ``[next_power_of_2(BLOCKS)]``, rows up to the end of each block.
    """
    KEYS: tl.constexpr = triton.next_power_of_2(BLOCKS)
    ROWS: tl.constexpr = max(1, min(_MOST_ROWS, _COMPARED // KEYS))
    for begin in range(first, last, ROWS):
        nth = begin + tl.arange(0, ROWS)
        is_row = nth < last
        is_before = ends[None, :] <= nth[:, None]
        block = tl.sum(is_before.to(tl.int32), axis=1)
        within = nth - tl.max(tl.where(is_before, ends[None, :], 0), axis=1)
        row = tl.load(incoming + block, mask=is_row, other=0) + within
        there = tl.load(incoming + 2 * BLOCKS + block, mask=is_row, other=0) + within
        tl.store(came.rows + nth, row, mask=is_row)
        tl.store(came.src_rows + nth, ((block % P).to(tl.int64) << ROW_BITS) | there, mask=is_row)


@triton.jit
def load_output(y, row_weights, given_rows, num_given, came, i, last_piece, stride, tables, sizes, how):
    """A piece of what goes back, ``[PIECE]``: words of a row as they are, or the sum of a pair's rows; 0 where none is.

    See ``sums.push_sums``.
    """
    PIECES: tl.constexpr = (how.ROW + how.tiles.PIECE - 1) // how.tiles.PIECE
    SUMS: tl.constexpr = True if how.OF_PAIRS else how.HAS_WEIGHTS
    nth = i // PIECES
    at = i % PIECES * how.tiles.PIECE + tl.arange(0, how.tiles.PIECE)
    is_there = (at < how.ROW) & (i < last_piece)
    row = tl.load(came.rows + nth, mask=i < last_piece, other=0)
    if not SUMS:
        return tl.load(y + as_int64(row) * stride + at, mask=is_there, other=0)
    total = tl.zeros([how.tiles.PIECE], tl.float32)
    partial_rows = given_rows if how.GIVEN else tables.partial_rows
    for k in tl.static_range(sizes.K if how.OF_PAIRS else 1):
        summed = row
        if how.OF_PAIRS:
            summed = tl.load(partial_rows + row * sizes.K + k, mask=i < last_piece, other=-1)
        if how.GIVEN:
            summed = tl.where(summed < num_given, summed, -1)
        value = tl.load(y + as_int64(summed) * stride + at, mask=is_there & (summed >= 0), other=0.0).to(tl.float32)
        if how.HAS_WEIGHTS:
            value = value * tl.load(row_weights + summed, mask=(i < last_piece) & (summed >= 0), other=0.0)
        total += value
    return total.to(y.dtype.element_ty)


@triton.jit
def push_outputs_share(y, row_weights, rows, num_given, tables, call, stride, own, returns, came, how):
    """A program's share: pieces one after another, of rows that came; see ``push_outputs``."""
    P: tl.constexpr = own.sizes.P
    BY_RANK: tl.constexpr = True if how.OF_PAIRS else own.sizes.BY_RANK
    BLOCKS: tl.constexpr = P if BY_RANK else own.sizes.L * P
    PIECES: tl.constexpr = (how.ROW + how.tiles.PIECE - 1) // how.tiles.PIECE
    incoming = tables.pair_incoming if how.OF_PAIRS else tables.incoming
    block = tl.arange(0, triton.next_power_of_2(BLOCKS))
    in_block = tl.load(incoming + BLOCKS + block, mask=block < BLOCKS, other=0)
    program, num_programs, num_pieces = tl.program_id(0) - 1, tl.num_programs(0) - 1, tl.sum(in_block) * PIECES
    first_piece = (as_int64(program) * num_pieces // num_programs).to(tl.int32)
    last_piece = (as_int64(program + 1) * num_pieces // num_programs).to(tl.int32)
    if first_piece < last_piece:
        ends = tl.cumsum(in_block, axis=0)
        find_rows(came, incoming, ends, first_piece // PIECES, (last_piece + PIECES - 1) // PIECES, BLOCKS, P)
        tl.debug_barrier()  # all warps see where the rows are
        values = load_output(
            y, row_weights, rows, num_given, came, first_piece, last_piece, stride, tables, own.sizes, how
        )
        if await_go(own.flags + GO_FLAG) == GO:
            for i in range(first_piece, last_piece):
                now = values
                values = load_output(
                    y, row_weights, rows, num_given, came, i + 1, last_piece, stride, tables, own.sizes, how
                )
                src_row = tl.load(came.src_rows + i // PIECES)
                peer, at = src_row >> ROW_BITS, i % PIECES * how.tiles.PIECE + tl.arange(0, how.tiles.PIECE)
                there = region_at(tl.load(own.segments + peer), returns.returned, slot_of(call, peer))
                there = row_at(there, src_row & ROW_MASK, y, how.ROW_BYTES)
                tl.store(there + at, now, mask=at < how.ROW)


@triton.jit(do_not_specialize=["num_given", "num_tokens", "payload", "rank", "max_polls"])
def push_outputs(
    y,
    row_weights,
    rows,
    num_given,
    plan,
    call,
    num_tokens,
    payload: tl.int64,
    rank,
    max_polls: tl.int64,
    stride,
    own,
    returns,
    came,
    how,
):
    """The first of two kernels of a combine in which this rank pushes: words, and its outputs at their owners.

    What goes where, and the sums, is as in ``rows.return_rows_to`` and ``sums.push_sums``. The last program tells the
    peers, and waits for nobody.

    Args:
        y: outputs ``[R, H]``; row_weights: float32 ``[R]``.
        rows, num_given: see ``push_sums``.
        call: see ``calls``; ``combine_rows`` goes on with it.
        stride: between rows of y, in words or values.
        how: ``Returned``; ``ends`` are not looked at.
    """
    await_kernels_before()
    if tl.program_id(0) == 0:
        status = tl.full([], ABORTED, tl.int32)
        if is_ok(own.state):
            sequence = give_word(own, call, payload, False, tl.zeros([1], tl.int64), 0, rank, False)
            status = take_words(own, call, sequence, payload, rank, max_polls)
        release_programs(own.flags + GO_FLAG, tl.where(status == OK, GO, NO_ROWS))
    elif is_ok(own.state):
        tables = tables_of(plan, num_tokens, own.sizes)
        SUMS: tl.constexpr = True if how.OF_PAIRS else how.HAS_WEIGHTS
        words = y if SUMS else y.to(tl.pointer_type(how.WORD), bitcast=True)
        push_outputs_share(words, row_weights, rows, num_given, tables, call, stride, own, returns, came, how)
    let_next_kernel_launch()
    if is_last_program(own.flags + TICKET):
        tl.atomic_xchg(own.flags + GO_FLAG, 0, sem="relaxed", scope="gpu")
        if is_ok(own.state):
            post_arrived(own, call, False, rank)
