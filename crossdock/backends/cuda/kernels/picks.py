"""Picks of a chunk of tokens: loaded, checked, and counted among each other. Triton only.

A *key* is what rows are sorted by where they land: the expert of a row that serves one pick, the rank of a row that
serves all of a token's picks there.

Letters: T tokens here, K top-k, E experts, B keys, S tokens of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_BITS = tl.constexpr(32)
ROW_MASK = tl.constexpr(2**32 - 1)
"""A dst_row is ``rank << 32 | row`` in an int64, -1 where there is none; so is a src_row."""


@triton.jit
def picks_at(at, is_there):
    """Picks as int32, -1 where there is none; what does not fit in it becomes -2, which no pick is."""
    pick = tl.load(at, mask=is_there, other=-1)
    narrow = pick.to(tl.int32)
    return tl.where(narrow.to(tl.int64) == pick, narrow, -2)


@triton.jit
def load_picks(topk_idx, num_tokens, first, K: tl.constexpr, S: tl.constexpr):
    """Picks of S tokens from ``first`` on, one by one, ``[S * next_power_of_2(K)]``: expert (-1: none), token, pick."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    i = tl.arange(0, S * KP)
    token, pick = first + i // KP, i % KP
    return picks_at(topk_idx + token * K + pick, (token < num_tokens) & (pick < K)), token, pick


@triton.jit
def is_first_there(key, S: tl.constexpr):
    """Of picks, token by token: whether no earlier pick of the token has the same key, -1 left out; ``[n]``."""
    KP: tl.constexpr = key.shape[0] // S
    of_token = tl.reshape(key, [S, KP])
    i = tl.arange(0, KP)
    is_earlier = (i[None, :] < i[:, None])[None, :, :]
    is_repeat = tl.max((is_earlier & (of_token[:, :, None] == of_token[:, None, :])).to(tl.int32), axis=2)
    return (key >= 0) & (tl.reshape(is_repeat, [S * KP]) == 0)


@triton.jit
def nth_of_token(key, is_row, S: tl.constexpr, IN_ORDER_OF_KEYS: tl.constexpr):
    """Of picks, token by token: how many rows of the token come before, in the order of keys or of picks; ``[n]``."""
    KP: tl.constexpr = key.shape[0] // S
    of_token, is_row = tl.reshape(key, [S, KP]), tl.reshape(is_row.to(tl.int32), [S, KP])
    if IN_ORDER_OF_KEYS:
        is_before = (of_token[:, None, :] < of_token[:, :, None]).to(tl.int32)
        return tl.reshape(tl.sum(is_before * is_row[:, None, :], axis=2), [S * KP])
    return tl.reshape(tl.cumsum(is_row, axis=1) - is_row, [S * KP])


@triton.jit
def rows_of(expert, sizes, BY_RANK: tl.constexpr, S: tl.constexpr):
    """Of picks, token by token: the key of each (-1: no expert), and whether it has a row of its own; ``[n]`` twice."""
    is_pick = (expert >= 0) & (expert < sizes.L * sizes.P)
    key = tl.where(is_pick, expert // sizes.L if BY_RANK else expert, -1)
    is_row = is_first_there(key, S) if BY_RANK else is_pick
    return key, is_row


@triton.jit
def columns_of(key, is_row, S: tl.constexpr, IN_ORDER_OF_KEYS: tl.constexpr):
    """Of picks, token by token: a column each, those of rows first, in the order of keys or of picks; ``[n]``."""
    KP: tl.constexpr = key.shape[0] // S
    nth = nth_of_token(key, is_row, S, IN_ORDER_OF_KEYS)
    of_rest = nth_of_token(key, is_row == 0, S, False)
    num_rows = tl.sum(tl.reshape(is_row.to(tl.int32), [S, KP]), axis=1)
    num_rows = tl.reshape(tl.broadcast_to(num_rows[:, None], [S, KP]), [S * KP])
    return tl.where(is_row, nth, num_rows + of_rest)


@triton.jit
def nth_of_key(key, is_row, B: tl.constexpr):
    """Of picks, how many rows come before that have the same key, of as many as B; ``[n]``."""
    KEYS: tl.constexpr = triton.next_power_of_2(B)
    if KEYS <= 32:
        is_its = (key[:, None] == tl.arange(0, KEYS)[None, :]) & is_row[:, None]
        of_key = is_its.to(tl.int32)
        return tl.sum((tl.cumsum(of_key, axis=0) - of_key) * of_key, axis=1)
    i = tl.arange(0, key.shape[0])
    is_before = (key[None, :] == key[:, None]) & is_row[None, :] & (i[None, :] < i[:, None])
    return tl.sum(is_before.to(tl.int32), axis=1)


@triton.jit
def has_bad_picks(expert, E: tl.constexpr, S: tl.constexpr):
    """Of picks of S tokens, token by token: whether any is no expert (-1: no pick), or picked twice by its token."""
    is_bad = (expert < -1) | (expert >= E) | ((expert >= 0) & ~is_first_there(expert, S))
    return tl.max(is_bad.to(tl.int32), axis=0) != 0


@triton.jit
def src_rows_of(row, incoming, num_rows, BLOCKS: tl.constexpr, P: tl.constexpr):
    """Where rows are from: ``rank << 32 | place in that rank's sending order``, int64; -1 where none is.

    Args:
        row: int32, those of a program, in order; of ``num_rows``.
        incoming: int32 ``[3, BLOCKS]``; blocks in the order of rows.
    """
    is_row = row < num_rows
    block = tl.zeros_like(row) - 1
    if tl.min(row, axis=0) < num_rows:
        blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
        starts = tl.load(incoming + blocks, mask=blocks < BLOCKS, other=2**31 - 1)
        block += tl.sum((starts[None, :] <= row[:, None]).to(tl.int32), axis=1)
    is_row = is_row & (block >= 0)
    nth = row - tl.load(incoming + block, mask=is_row, other=0)
    is_row = is_row & (nth < tl.load(incoming + BLOCKS + block, mask=is_row, other=0))
    there = tl.load(incoming + 2 * BLOCKS + block, mask=is_row, other=0) + nth
    return tl.where(is_row, ((block % P).to(tl.int64) << ROW_BITS) | there, -1)
