"""What kernels are given in groups: the words and tables of a rank, where regions lie, and constants.

A group is passed to a launch as it is, and from there to device functions. Triton's ``do_not_specialize`` does not
reach into a group: a number in it that is 1 becomes a constant, and one that is a multiple of 16 is compiled as such.
So a group has only what is the same in all calls of a kind; what varies between these, or between ranks, is an argument
of its own.

Letters: T tokens here, J rows of a token, K top-k, R rows, E experts, L local experts, P ranks, W counts, M max_tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl

Group = TypeVar("Group", bound=tuple[Any, ...])
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}
"""Types as which rows are copied, by their bytes."""
FLOAT32 = tl.float32


def as_constants(group: Group) -> Group:
    """A group of constants, as kernels are given them; also groups within, and whole tuples."""
    constants = [as_constants(value) if isinstance(value, tuple) else tl.constexpr(value) for value in group]
    made: Group = type(group)(*constants) if hasattr(group, "_fields") else tuple(constants)  # type: ignore[assignment]
    return made


def odd(value: int) -> int:
    """A number of calls, as a group has it: twice, and one more. So it is neither 1 nor a multiple of 16.

    Kernels are then the same whatever it is: calls of another M have nothing to compile, nor to load.
    ``value_of`` gives it back.
    """
    return 2 * value + 1


@triton.jit
def value_of(number):
    """What ``odd`` was given."""
    return number >> 1


class Boxes(NamedTuple):
    """Where words lie in every segment, in bytes."""

    words: tl.tensor
    arrived: tl.tensor
    aborts: tl.tensor
    counts: tl.tensor


class Places(NamedTuple):
    """Where tables of fixed size begin in a plan's memory, in bytes; ``end`` is where those of T tokens begin."""

    counts: tl.constexpr
    scalars: tl.constexpr
    tokens: tl.constexpr
    starts: tl.constexpr
    incoming: tl.constexpr
    pair_incoming: tl.constexpr
    partial_rows: tl.constexpr
    end: tl.constexpr


class Sizes(NamedTuple):
    """Constants of a buffer."""

    P: tl.constexpr
    RING: tl.constexpr
    COUNTS: tl.constexpr
    """Counts for which a row of the words has room: E + P + 1, or more."""
    L: tl.constexpr
    K: tl.constexpr
    J: tl.constexpr
    PAIRS: tl.constexpr
    """Pairs of a token, at most; 0 where plans have none."""
    BY_RANK: tl.constexpr
    """Whether a row serves all picks of its token at a rank; else each pick has its own."""
    RANK_ORDER: tl.constexpr
    """Whether a token's rows are in the order of ranks; else of their first picks."""
    ALIGNMENT: tl.constexpr
    """Of segments; 0: each has as many rows as ``capacity``."""
    AT_ONCE: tl.constexpr
    """Ranks whose counts are moved at a time, a power of two."""
    TABLES: Places
    """Where the tables of a plan lie: see ``tables.Places``."""


class Own(NamedTuple):
    """What all kernels of a rank share."""

    segments: tl.tensor
    """int64 ``[P]``, where each rank's segment is mapped here."""
    state: tl.tensor
    """int64, see ``calls.STATE_WORDS``."""
    failure: tl.tensor
    host_failure: tl.tensor
    """int64 ``[FAILURE_WORDS]``, see ``sync``; the second in host memory."""
    flags: tl.tensor
    """int32, see ``calls.FLAGS``; all 0 between kernels, but for REFUSED."""
    all_tokens: tl.tensor
    """int64 ``[L]``, picks of each local expert in all calls."""
    capacity: tl.tensor
    """Rows for which a rank has room, or each of its segments (ALIGNMENT 0); see ``odd``."""
    max_tokens: tl.tensor
    """The M of these calls; see ``odd``."""
    boxes: Boxes
    sizes: Sizes


class Region(NamedTuple):
    """Where a region begins in every segment, and the size of its slots; in bytes."""

    offset: tl.tensor
    slot_bytes: tl.tensor


class Arrivals(NamedTuple):
    """Where the parts of dispatched rows arrive. ``rows`` and ``scales`` are where they land, staged or in place."""

    rows: Region
    scales: Region
    metadata: Region
    partial_rows: Region


class Returns(NamedTuple):
    """Where experts' outputs lie, and where rows and extras come back to."""

    outputs: Region
    returned: Region
    extras: Region


class Scratch(NamedTuple):
    """Memory of a rank's kernels that nobody reads behind the call."""

    sums: tl.tensor
    """int32 ``[chunks, W]``, for each chunk of tokens the counts of those before it."""
    send_starts: tl.tensor
    """int32 ``[2, B]``, where each of this rank's blocks of rows begins at its receiver, and in its own order; the
    same of pairs behind it."""
    src_rows: tl.tensor
    pair_src_rows: tl.tensor
    """int64, of each row (or pair) here: ``rank << 32 | place in that rank's sending order``; -1 where none is."""


class Came(NamedTuple):
    """Of rows that came, counted without gaps: where each lies, int32, and its src_row, int64; contents undefined."""

    rows: tl.tensor
    src_rows: tl.tensor


class Tables(NamedTuple):
    """The tables of a plan, see ``tables.tables_of``."""

    counts: tl.tensor
    scalars: tl.tensor
    tokens: tl.tensor
    starts: tl.tensor
    incoming: tl.tensor
    pair_incoming: tl.tensor
    partial_rows: tl.tensor
    dst_rows: tl.tensor
    picks: tl.tensor
    pair_dst_rows: tl.tensor
    return_rows: tl.tensor
    pair_return_rows: tl.tensor


class Beside(NamedTuple):
    """Constants of what travels beside rows: see ``metadata``."""

    TOKENS: tl.constexpr
    """Whose metadata a program writes at a time, where rows are pushed; 0: none is written there."""
    WORDS: tl.constexpr
    """Between metadata, int32."""
    EXTRA: tl.constexpr
    """Words for which there is room behind ids and weights."""
    GAPS: tl.constexpr
    """Whether alignment leaves gaps, which are zeroed."""
    ROW: tl.constexpr
    ROW_WORD: tl.constexpr
    """Words of a row as which it is zeroed, and their type."""
    SCALES: tl.constexpr
    SCALE_WORD: tl.constexpr
    """The same of its scales; 0 for none."""
    SCALE_ROW: tl.constexpr
    SCALE_GROUP: tl.constexpr
    """Words between the scales of rows, and between the words of a row."""


class Tiles(NamedTuple):
    """How programs share out rows: each takes so many of them, or a part of each, by pieces. See ``config.Shape``."""

    ROWS: tl.constexpr
    PARTS: tl.constexpr
    """Rows of a program's share, and in how many parts these are shared out."""
    PIECE: tl.constexpr
    PIECES: tl.constexpr
    """Words or values of each row that are moved by one instruction of its threads, and how many such a part has."""
    AT_ONCE: tl.constexpr
    """Pieces that are on their way at a time."""
    OWN: tl.constexpr
    """Programs that store to this rank's own memory, and these alone do; 0: all programs store everywhere."""


class Copied(NamedTuple):
    """Constants of rows that are copied as they are."""

    J: tl.constexpr
    """Copies of a row, at most."""
    STAGED: tl.constexpr
    """Whether one row goes to each rank, to be copied there."""
    WORD: tl.constexpr
    ROW: tl.constexpr
    """Words of a row, and their type."""
    ROW_BYTES: tl.constexpr
    """Between rows there."""
    tiles: Tiles


class ScalePlaces(NamedTuple):
    """Where scales lie beside rows: see ``scales.scale_offset`` and ``scales.group_offset``."""

    SEGMENT_BYTES: tl.constexpr
    """From a segment to the next; 0: these follow each other as rows do."""
    ROW_BYTES: tl.constexpr
    GROUP_BYTES: tl.constexpr


class ScalesCopied(NamedTuple):
    """Constants of scales that are copied as they are, to wherever they lie there."""

    SCALES: tl.constexpr
    """Words of a row; 0: there are none."""
    WORD: tl.constexpr
    SIZE: tl.constexpr
    """Type and bytes of a word."""
    PIECE: tl.constexpr
    TOKENS: tl.constexpr


class Cast(NamedTuple):
    """Constants of rows that are cast: see ``cast.cast_rows``."""

    J: tl.constexpr
    STAGED: tl.constexpr
    """As in ``Copied``."""
    H: tl.constexpr
    BLOCK: tl.constexpr
    """Values of a row, and of each of its scales."""
    ROW_BYTES: tl.constexpr
    """Between rows there."""
    WORD: tl.constexpr
    """Scales that lie side by side."""
    SCALES: tl.constexpr
    """Of a row there, padding included."""
    ROWS: tl.constexpr
    SIDE_BY_SIDE: tl.constexpr
    """Rows of which a program casts groups at a time, and how many of each."""
    PARTS: tl.constexpr
    PIECES: tl.constexpr
    """In how many parts a row is shared out, and how often as many groups a part has."""
    POW2: tl.constexpr
    """Whether scales are rounded up to powers of two."""
    EXPONENTS: tl.constexpr
    """Whether their biased exponents are stored."""


class Strides(NamedTuple):
    """Of what a dispatch is given, in words: between rows, between the scales of rows, and between those of one row."""

    rows: tl.tensor
    scales: tl.tensor
    groups: tl.tensor


class Ends(NamedTuple):
    """What the last program of a wide kernel does: see ``calls.finish``."""

    POSTS: tl.constexpr
    AWAITS: tl.constexpr
    COUNTED: tl.constexpr


class Pushed(NamedTuple):
    """How rows are copied to their places: see ``rows.push_rows``."""

    rows: Copied
    scales: ScalesCopied
    places: ScalePlaces
    beside: Beside
    ends: Ends


class PushedCast(NamedTuple):
    """How rows are cast to their places: see ``cast.push_cast``."""

    cast: Cast
    places: ScalePlaces
    beside: Beside
    ends: Ends


class Expanded(NamedTuple):
    """How staged rows are copied to their places: see ``rows.expand_rows``."""

    rows: Copied
    """STAGED: whether they are copied at all."""
    scales: ScalesCopied
    places: ScalePlaces
    STAGED_BYTES: tl.constexpr
    """Between staged rows."""
    KEEPS: tl.constexpr
    """Whether the pairs' rows that came are kept in the plan."""
    IN_SLOT: tl.constexpr
    """Whether their places are in the slot; else in memory that the launch is given."""
    COLUMNS: tl.constexpr
    """Whether scales there are column-major, the words of a row so far apart as the launch says."""
    beside: Beside


class Returned(NamedTuple):
    """How rows go back: see ``rows.return_rows_to``, ``sums.push_sums``, ``returns`` and ``outputs``."""

    WORD: tl.constexpr
    ROW: tl.constexpr
    """Words of a row, and their type."""
    ROW_BYTES: tl.constexpr
    tiles: Tiles
    OF_PAIRS: tl.constexpr
    """Whether they are of pairs."""
    HAS_WEIGHTS: tl.constexpr
    GIVEN: tl.constexpr
    """Whether the caller says which rows are of a pair, and not the plan."""
    ends: Ends


class Summed(NamedTuple):
    """How rows are summed at their owner: see ``sums.sum_rows``."""

    J: tl.constexpr
    H: tl.constexpr
    tiles: Tiles
    OF_PAIRS: tl.constexpr
    HAS_WEIGHTS: tl.constexpr
    HAS_BIAS: tl.constexpr
    EXTRA_BYTES: tl.constexpr
    """Between rows of extras that came back."""


class Given(NamedTuple):
    """What a fused dispatch sends: see ``fused.dispatch_rows``."""

    num_tokens: tl.tensor
    topk_idx: tl.tensor
    weights: tl.tensor
    steps: tl.tensor
    x: tl.tensor
    x_stride: tl.tensor
    rows: tl.tensor
    stride: tl.tensor
    scales: tl.tensor
    scale_stride: tl.tensor
    source: tl.tensor
    segment_rows: tl.tensor


class Shares(NamedTuple):
    """Memory in which the programs of a fused dispatch keep what they know of rows before the go."""

    send_starts: tl.tensor
    nths: tl.tensor
    pair_nths: tl.tensor
    to_rows: tl.tensor
    to_scales: tl.tensor
    """Twice int32 and twice int64 ``[T, K]``: the last two are addresses of rows and scales at their receivers."""
    counts: tl.tensor
    """int32 ``[programs, E + P]``, contents undefined."""
    rows: tl.tensor
    scales: tl.tensor
    """Rows that were cast, and their scales, as they travel."""


class Fused(NamedTuple):
    """How a fused dispatch shares out rows: see ``fused.dispatch_rows``."""

    strides: Strides
    places: ScalePlaces
    WORD: tl.constexpr
    ROW: tl.constexpr
    PIECE: tl.constexpr
    PIECES: tl.constexpr
    ROW_BYTES: tl.constexpr
    BETWEEN: tl.constexpr
    STAGED: tl.constexpr
    CACHED: tl.constexpr
    BLOCK: tl.constexpr
    SCALES: tl.constexpr
    SCALE_WORD: tl.constexpr
    SCALE_PIECE: tl.constexpr
    SCALES_OF_WORD: tl.constexpr
    POW2: tl.constexpr
    EXPONENTS: tl.constexpr
    STAGES: tl.constexpr
    METADATA_WORDS: tl.constexpr
    CROWDED: tl.constexpr
    gaps: Beside
