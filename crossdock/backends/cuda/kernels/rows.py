"""Copies of rows: out to their places, back to their owners, and from staged rows into their places. Triton only.

A row is moved as words of the widest type that divides it, in pieces; a program moves a few pieces, then the next ones
of its share. Wide kernels wait for nobody, and touch peer memory only in a call that is OK.

Letters: T tokens here, J rows of a token, K top-k, P ranks.
"""

# Tuples that grow by a value at each turn of an unrolled loop have no type.
# mypy: disable-error-code="assignment, var-annotated", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.calls import end_call, is_ok, slot_of
from crossdock.backends.cuda.kernels.groups import value_of
from crossdock.backends.cuda.kernels.metadata import (
    as_int64,
    as_row,
    keep_partial_rows,
    pointers,
    push_metadata,
    region_at,
    row_at,
    zero_gaps,
    zero_gaps_at,
    zero_rows,
)
from crossdock.backends.cuda.kernels.picks import ROW_BITS, ROW_MASK
from crossdock.backends.cuda.kernels.plan import NUM_PAIRS, NUM_ROWS
from crossdock.backends.cuda.kernels.scales import copy_scales, expand_scales
from crossdock.backends.cuda.kernels.tables import tables_of


@triton.jit
def share_of_places(tiles):
    """A program's number among those with the same share, how many these are, and if it stores here, and to peers.

    Stores to this GPU's own memory that come behind stores over a link wait until that has taken them, and the link
    for the next ones meanwhile: so some programs (OWN) do the first, and the others the second.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    here, there = True, True
    if tiles.OWN > 0:
        here, there = program < tiles.OWN, program >= tiles.OWN
        program = tl.where(here, program, program - tiles.OWN)
        num_programs = tl.where(here, tiles.OWN, num_programs - tiles.OWN)
    return program, num_programs, here, there


@triton.jit
def piece_at(piece, last, ROW: tl.constexpr, tiles):
    """The words ``[1, PIECE]`` of a piece of rows, and which of them there are; none from piece ``last`` on."""
    at = piece * tiles.PIECE + tl.arange(0, tiles.PIECE)[None, :]
    return at, (at < ROW) & (piece < last)


@triton.jit
def copy_words(x, stride, call, dst_rows, num_tokens, rank, segments, region, rows):
    """A program's share of the words of rows ``x [T, ROW]``: to all places of each row, in the slots that peers named.

    Without branches, so that the addresses of all places are on their way at once. They are worked out once for a part
    of a row: for each of its pieces that would take longer than to move it.

    Args:
        stride: words between rows of x.
    """
    ROW: tl.constexpr = rows.ROW
    J: tl.constexpr = rows.J
    ROWS: tl.constexpr = rows.tiles.ROWS
    PARTS: tl.constexpr = rows.tiles.PARTS
    PIECES: tl.constexpr = rows.tiles.PIECES
    AT_ONCE: tl.constexpr = rows.tiles.AT_ONCE
    program, num_programs, here, there = share_of_places(rows.tiles)
    for i in range(program, (num_tokens + ROWS - 1) // ROWS * PARTS, num_programs):
        token = i // PARTS * ROWS + tl.arange(0, ROWS)
        is_token = (token < num_tokens)[:, None]
        places = ()
        for j in tl.static_range(J):
            dst_row = tl.load(dst_rows + token * J + j, mask=token < num_tokens, other=-1)
            goes = dst_row >= 0
            peer = tl.where(goes, dst_row >> ROW_BITS, 0)
            goes &= tl.where(peer == rank, here, there)
            place = region_at(tl.load(segments + peer), region, slot_of(call, peer))
            places = places + (tl.where(goes, place + (dst_row & ROW_MASK) * rows.ROW_BYTES, 0),)  # noqa: RUF005 - Triton's compiler knows no unpacking
        row = x + as_int64(token)[:, None] * stride
        first = i % PARTS * PIECES
        for piece in range(first, first + PIECES, AT_ONCE):
            coming = ()
            for n in tl.static_range(AT_ONCE):
                at, is_word = piece_at(piece + n, first + PIECES, ROW, rows.tiles)
                coming = coming + (tl.load(row + at, mask=is_token & is_word),)  # noqa: RUF005
            for n in tl.static_range(AT_ONCE):
                at, is_word = piece_at(piece + n, first + PIECES, ROW, rows.tiles)
                for j in tl.static_range(J):
                    to_row = as_row(places[j], x, rows.ROW_BYTES)[:, None]
                    tl.store(to_row + at, coming[n], mask=is_word & (places[j] != 0)[:, None])


@triton.jit
def push_beside(call, tables, num_tokens, rank, carries, weights, extras, own, arrivals, beside):
    """A program's share of what else a dispatch on a plan sends: metadata, where it sends any, and zeros in gaps."""
    if beside.TOKENS > 0:
        TOKENS: tl.constexpr = beside.TOKENS
        push_metadata(
            call, tables, tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS, carries, weights, extras,
            rank * value_of(own.max_tokens), own.segments, arrivals, own.sizes, beside.WORDS,
            beside.EXTRA, TOKENS,
        )  # fmt: skip
    zero_gaps(call, tables, rank, tl.program_id(0), tl.num_programs(0), own.segments, arrivals, own.sizes, beside)


@triton.jit(do_not_specialize=["num_tokens", "rank", "max_polls", "carries"])
def push_rows(
    x,
    scale,
    plan,
    call,
    num_tokens,
    rank,
    max_polls: tl.int64,
    carries,
    weights,
    extras,
    strides,
    own,
    arrivals,
    how,
):
    """Writes each row ``x [T, ROW]``, and its scales ``[T, SCALES]``, to all its places; see ``copy_words``.

    Each program has its share of rows, then of scales, then of what is beside them. The last one ends the call.
    """
    tables = tables_of(plan, num_tokens, own.sizes)
    if is_ok(own.state):
        dst_rows = tables.pair_dst_rows if how.rows.STAGED else tables.dst_rows
        words = x.to(tl.pointer_type(how.rows.WORD), bitcast=True)
        copy_words(words, strides.rows, call, dst_rows, num_tokens, rank, own.segments, arrivals.rows, how.rows)
        if how.scales.SCALES > 0:
            copy_scales(
                scale, strides, call, dst_rows, num_tokens, own.segments, arrivals.scales, value_of(own.capacity),
                how.rows.J, how.scales, how.places,
            )  # fmt: skip
        push_beside(call, tables, num_tokens, rank, carries, weights, extras, own, arrivals, how.beside)
    end_call(own, call, tables.tokens, rank, max_polls, how.ends)


@triton.jit(do_not_specialize=["num_tokens", "rank", "carries"])
def send_beside(plan, call, num_tokens, rank, carries, weights, extras, own, arrivals, beside):
    """What travels beside rows that are copied without a kernel, of a dispatch on a plan; see ``push_beside``."""
    if is_ok(own.state):
        tables = tables_of(plan, num_tokens, own.sizes)
        push_beside(call, tables, num_tokens, rank, carries, weights, extras, own, arrivals, beside)


@triton.jit(do_not_specialize=["num_tokens"])
def pack_rows(x, packed, plan, num_tokens, strides, own, rows):
    """Copies each row ``x [T, ROW]`` to its places in the order in which this rank sends, ``packed [Q, ROW]``."""
    ROW: tl.constexpr = rows.ROW
    PIECE: tl.constexpr = rows.tiles.PIECE
    J: tl.constexpr = rows.J
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    tables = tables_of(plan, num_tokens, own.sizes)
    x, packed = x.to(tl.pointer_type(rows.WORD), bitcast=True), packed.to(tl.pointer_type(rows.WORD), bitcast=True)
    if is_ok(own.state):
        for i in range(tl.program_id(0), num_tokens * PIECES, tl.num_programs(0)):
            token = i // PIECES
            at = i % PIECES * PIECE + tl.arange(0, PIECE)
            row = tl.load(x + as_int64(token) * strides.rows + at, mask=at < ROW)
            for j in tl.static_range(J):
                if tl.load(tables.dst_rows + token * J + j) >= 0:
                    return_row = tl.load(tables.return_rows + token * J + j).to(tl.int64)
                    tl.store(packed + return_row * ROW + at, row, mask=at < ROW)


@triton.jit(do_not_specialize=["num_tokens", "rank", "max_polls"])
def return_rows_to(y, plan, call, num_tokens, rank, max_polls: tl.int64, stride, own, returns, scratch, how):
    """Writes each row of ``y [R, ROW]`` that came from somewhere back there, into the slot that the peer named.

    Behind ``begin_return``, which has found out where rows are from. The last program ends the call.
    """
    ROWS: tl.constexpr = how.tiles.ROWS
    PARTS: tl.constexpr = how.tiles.PARTS
    PIECES: tl.constexpr = how.tiles.PIECES
    AT_ONCE: tl.constexpr = how.tiles.AT_ONCE
    tables = tables_of(plan, num_tokens, own.sizes)
    words = y.to(tl.pointer_type(how.WORD), bitcast=True)
    if is_ok(own.state):
        num_rows = tl.load(tables.scalars + NUM_ROWS)
        program, num_programs, here, there = share_of_places(how.tiles)
        for i in range(program, (num_rows + ROWS - 1) // ROWS * PARTS, num_programs):
            nth = i // PARTS * ROWS + tl.arange(0, ROWS)
            src_row = tl.load(scratch.src_rows + nth, mask=nth < num_rows, other=-1)
            goes = (src_row >= 0) & tl.where(src_row >> ROW_BITS == rank, here, there)
            if tl.max(goes.to(tl.int32), axis=0) > 0:
                peer = tl.where(goes, src_row >> ROW_BITS, 0)
                to_row = region_at(tl.load(own.segments + peer), returns.returned, slot_of(call, peer))
                to_row = row_at(to_row, src_row & ROW_MASK, words, how.ROW_BYTES)[:, None]
                row = words + as_int64(nth)[:, None] * stride
                first = i % PARTS * PIECES
                for piece in range(first, first + PIECES, AT_ONCE):
                    coming = ()
                    for n in tl.static_range(AT_ONCE):
                        at, is_word = piece_at(piece + n, first + PIECES, how.ROW, how.tiles)
                        coming = coming + (tl.load(row + at, mask=goes[:, None] & is_word),)  # noqa: RUF005 - Triton's compiler knows no unpacking
                    for n in tl.static_range(AT_ONCE):
                        at, is_word = piece_at(piece + n, first + PIECES, how.ROW, how.tiles)
                        tl.store(to_row + at, coming[n], mask=goes[:, None] & is_word)
    end_call(own, call, tables.tokens, rank, max_polls, how.ends)


@triton.jit(do_not_specialize=["to_rows", "to_scales", "group_words", "num_rows", "num_tokens", "rank"])
def expand_rows(  # noqa: PLR0912 - branches of the compiler, most of them
    to_rows: tl.int64,
    to_scales: tl.int64,
    group_words: tl.int64,
    num_rows,
    plan,
    call,
    num_tokens,
    rank,
    own,
    staged,
    arrivals,
    how,
):
    """Copies each staged row, one for all picks of its token here, to the places of those picks; and its scales.

    Behind the end of the call's wait. Which rows are a token's has come with them, and is kept in the plan first.

    Args:
        to_rows, to_scales: addresses of rows and scales in memory that is no slot's; gaps in it, and rows up to
            ``num_rows`` behind those that came, become 0. Not looked at where the places are in the slot.
        group_words: between the words of a row's scales there, where they are column-major.
        staged, arrivals: where rows and their scales are staged, and where they belong in the slot.
    """
    K: tl.constexpr = own.sizes.K
    ROW: tl.constexpr = how.rows.ROW
    PIECE: tl.constexpr = how.rows.tiles.PIECE
    PIECES: tl.constexpr = (ROW + PIECE - 1) // PIECE
    tables = tables_of(plan, num_tokens, own.sizes)
    if is_ok(own.state):
        num_pairs = tl.load(tables.scalars + NUM_PAIRS)
        segment, slot = tl.load(own.segments + rank), slot_of(call, rank)
        came = tables.partial_rows
        if how.KEEPS:
            came = pointers(region_at(segment, arrivals.partial_rows, slot), tl.int32)
            keep_partial_rows(came, tables, num_pairs, tl.program_id(0), tl.num_programs(0), own.sizes, 1024)
        between = how.places.GROUP_BYTES // how.scales.SIZE
        between_gaps = how.beside.SCALE_GROUP
        if how.IN_SLOT:
            to_rows, to_scales = region_at(segment, arrivals.rows, slot), region_at(segment, arrivals.scales, slot)
        else:  # the interpreter makes of a number what has room for it
            to_rows, to_scales = as_int64(to_rows), as_int64(to_scales)
        if how.COLUMNS and not how.IN_SLOT:
            between, between_gaps = group_words, group_words
        if how.beside.GAPS:
            zero_gaps_at(
                tables, to_rows, to_scales, between_gaps, tl.program_id(0), tl.num_programs(0), own.sizes, how.beside
            )
        if not how.IN_SLOT:
            for behind in range(tl.load(tables.scalars + NUM_ROWS) + tl.program_id(0), num_rows, tl.num_programs(0)):
                zero_rows(to_rows, to_scales, behind, behind + 1, between_gaps, how.beside)
        if how.rows.STAGED:
            here = pointers(region_at(segment, staged.rows, slot), how.rows.WORD)
            rows = pointers(to_rows, how.rows.WORD)
            STAGED_ROW: tl.constexpr = how.STAGED_BYTES // (how.rows.ROW_BYTES // ROW)
            for i in range(tl.program_id(0), num_pairs * PIECES, tl.num_programs(0)):
                pair = i // PIECES
                at = i % PIECES * PIECE + tl.arange(0, PIECE)
                from_row = here + as_int64(pair) * STAGED_ROW
                if how.STAGED_BYTES % 16 == 0:
                    from_row = tl.multiple_of(from_row, 16)
                row = tl.load(from_row + at, mask=at < ROW)
                for k in tl.static_range(K):
                    there = tl.load(came + pair * K + k)
                    if there >= 0:
                        to_row = rows + there.to(tl.int64) * ROW
                        if how.rows.ROW_BYTES % 16 == 0:
                            to_row = tl.multiple_of(to_row, 16)
                        tl.store(to_row + at, row, mask=at < ROW)
            if how.scales.SCALES > 0:
                expand_scales(
                    region_at(segment, staged.scales, slot), to_scales, came, num_pairs, value_of(own.capacity),
                    between, how.STAGED_BYTES, own.sizes, how.scales, how.places,
                )  # fmt: skip
