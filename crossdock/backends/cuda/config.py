"""How kernels are launched: decided first, as a value to print and compare; ``launch`` acts on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from crossdock import cost
from crossdock.backends.base import LaunchOptions
from crossdock.spec import Spec, Topology

_MOST_ROWS = 32
_WARP_BYTES = 512
"""That a warp moves by one instruction."""
_COPIED_BY_SM = 44e9
"""Bytes per second that a SM copies within its GPU while others store over a link: a dispatch of which eight copied
59 MB took 177 us, words included."""
_AT_ONCE = 8
"""Such pieces that each warp of a program that fills a SM has on their way; there are no registers for more."""
_SRC_CELLS = 16384
"""Rows times blocks of rows that a program compares."""
_COUNTS = 4096
"""Counts that a program moves at a time."""
_FUSED_PICKS = 4096
"""Picks up to which a call of rows with one pick each is one kernel."""
_KERNEL_S = cost.TWO_HOPS.fixed_s / 2
"""What one kernel more adds to a call of few tokens, at most: a dispatch of two took twice as long, bytes and words
included."""
_MANY_PICKS = 8
"""Picks of a token from which on the addresses of its rows need more registers."""
_FUSED_WORDS = 512
"""Of a row that a program moves at a time."""
_STAGED_BYTES = 65536
"""Of values that are on their way to a program; three programs have room for that on a SM."""
_CROWDED_REGISTERS = 64
"""Of a thread of a whole dispatch where ranks crowd a GPU, so that a SM has room for one program more.

MPS bounds how many SMs a rank has programs on, and lets others' programs onto them. What finds no room
begins when the first programs have ended, and all ranks wait for it: of 8 or 4 ranks, mostly one in each call. Programs
of 64 registers prevent that with 4 ranks, and sometimes with 8; so do sums that take all of the room or three quarters.
With 2 ranks there is room enough, and a SM with one program more than the others is slower.
"""
PROGRAMS_PER_SM = 16
"""Of kernels whose number of rows only the device knows: each program takes its share of them."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How programs share out rows: bytes of a row that one moves at a time, its warps, how many programs there are."""

    piece_bytes: int
    num_warps: int
    programs: int | None
    """None: one for each share."""
    num_rows: int = 1
    """Rows of which a program moves a piece at a time."""
    parts: int | None = None
    """In which a row is shared out, each of neighbouring pieces; None: each piece is one."""
    at_once: int = 1
    """Pieces of a row that are on their way at a time."""
    own_programs: int = 0
    """Programs that store to this rank's own memory, and nothing else; 0: all of them store everywhere."""


@dataclass(frozen=True, kw_only=True)
class FusedDispatchShape:
    """How programs share out the rows of a whole dispatch: one keeps the books, the others have pieces of rows."""

    programs: int
    piece: int
    """Words of a row."""
    num_warps: int
    most_registers: int
    """Of a thread."""

    def stages(self, word_bytes: int) -> int:
        """Of pieces that are cast: one is, the others are on their way; so many as there is shared memory for."""
        return max(1, min(4, _STAGED_BYTES // (self.piece * word_bytes)))


@dataclass(frozen=True, kw_only=True)
class FusedCombineShape:
    """How programs share out the sums of a whole combine; the first also speaks with the peers."""

    programs: int
    piece: int
    """Values."""
    num_warps: int
    most_registers: int
    """Of a thread."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a buffer's kernels are launched; ``print(buffer.launch)`` shows it.

    num_sms: SMs that the kernels which store rows may use, of ``visible_sms`` that this process sees.
    num_load_sms: the same of those which load rows, or sum them.
    expand: who makes the copies of a row, ``engine``: who carries rows; see ``Buffer``.
    topology: whose bandwidths that was decided from.
    is_fused: whether calls are one kernel each, on the caller's stream, because their tokens are few; two where rows
        are expanded at the receiver, or outputs are pushed.
    is_crowded: whether more than two ranks share the GPU.
    crosses_link: whether this rank has its GPU to itself, so that all peers are behind a link.
    launches_early: whether such a kernel is launched while the one before it still runs, and waits for its end: what
        CUDA calls a programmatic dependent launch.

    With all visible SMs there is a program of one or two warps for each piece of some KiB; with fewer, one
    program of 32 warps for each, of which each warp moves a row of its own, up to 4 KiB of it at a time, or sums as
    much. On an H200 under MPS, 4096 tokens of 7168 bf16 values, top-8 of 256, words included, microseconds by SMs of a
    rank (and by KiB and warps of a piece, where it sees no more; with fewer than 16 of 8 ranks in an earlier run)::

        8 ranks  dispatch  16: 814 (2, 1: 816; 4, 4: 816; 2, 2: 816)             8: 903   4: 1704
                 combine   16: 774 (2, 1: 857; 2, 2: 823; 4, 4: 816; 1, 1: 783)  8: 1227  4: 2351
        4 ranks  dispatch  32: 314 (2, 1: 318; 4, 4: 313; 2, 2: 336)             16: 367   8: 523   4: 1020   2: 2010
                 combine   32: 281 (4, 2: 308; 2, 2: 292; 4, 4: 305; 1, 1: 287)  16: 526   8: 984   4: 1870   2: 3660

    On two H200 over NVLink, a GPU for each of 2 ranks, ``Compact`` with ``reduce="rank"``. The link stores 388 GB/s
    each way and loads 369, so that bf16 rows take it 151, FP8 ones 78; a copy of as many bytes through torch, both ways
    at once and in a graph, takes 164::

        SMs                            16    20    24    32    48   132
        dispatch, bf16                184   186   179   179   177   171
        dispatch, FP8 / cast to it    109         110   102          94
                                      203         145   113          96
        combine, pulled               197   189   191   187   188   184
        combine, pushed               298   285   263   243   232   244
    """

    num_sms: int
    num_load_sms: int
    visible_sms: int
    expand: Literal["sender", "receiver"]
    mover: Literal["kernel", "copy"]
    topology: Topology
    is_fused: bool = False
    is_crowded: bool = False
    crosses_link: bool = False
    launches_early: bool = False

    @property
    def is_capped(self) -> bool:
        """Whether kernels that store rows must leave SMs free."""
        return self.num_sms < self.visible_sms

    def using(self, num_sms: int | None) -> LaunchConfig:
        """The same with another number of SMs, as far as there are so many; None: the same."""
        if num_sms is None:
            return self
        num_sms = min(num_sms, self.visible_sms)
        return replace(self, num_sms=num_sms, num_load_sms=num_sms)

    def rows(self, row_bytes: int, *, is_counted: bool) -> Shape:
        """For kernels that copy rows.

        Args:
            row_bytes: of one row.
            is_counted: whether the host knows how many rows there are.
        """
        if self.is_capped:
            return _one_for_each_sm(row_bytes, self.num_sms, own_programs=self._own_programs)
        if is_counted:
            return _shape(row_bytes, piece_bytes=4096, num_warps=2)
        return _shape(row_bytes, piece_bytes=2048, num_warps=1, programs=self.num_sms * PROGRAMS_PER_SM)

    def pieces(self, row_bytes: int, *, is_counted: bool) -> Shape:
        """The same for kernels whose programs move one piece of one row at a time."""
        if self.is_capped:
            return Shape(piece_bytes=min(power_of_two(row_bytes), 16384), num_warps=32, programs=self.num_sms)
        return replace(self.rows(row_bytes, is_counted=is_counted), num_rows=1)

    @property
    def _own_programs(self) -> int:
        """So many that what stays here is copied no later than what crosses the link, of which each peer gets as much.

        None where ranks share the GPU, or one program does all.
        """
        if not self.crosses_link:
            return 0
        peers, most = self.topology.num_ranks - 1, math.ceil(self.topology.link_bandwidth / _COPIED_BY_SM)
        enough = (own for own in range(1, self.num_sms) if own * peers >= min(most, self.num_sms - own))
        return next(enough, 0)

    def sums(self, row_bytes: int, num_rows: int) -> Shape:
        """For kernels that load up to ``num_rows`` rows and store their sum."""
        if self.num_load_sms < self.visible_sms:
            return _one_for_each_sm(row_bytes, self.num_load_sms, at_once=max(1, _AT_ONCE // num_rows))
        if num_rows <= 4:
            return _shape(row_bytes, piece_bytes=2048, num_warps=1)
        return _shape(row_bytes, piece_bytes=4096, num_warps=2)

    def most_programs(self, num_topk: int) -> int:
        """Of a whole dispatch, whatever a call asks for."""
        return self.visible_sms * self._dispatch_fits(num_topk).per_sm

    def _dispatch_fits(self, num_topk: int) -> _Fit:
        if num_topk > _MANY_PICKS:
            return _Fit(8, 2, 128)
        return _Fit(8, 3, _CROWDED_REGISTERS if self.is_crowded else 80)

    def fused_dispatch(
        self, num_words: int, num_tokens: int, num_topk: int, *, unit: int, least: int = 0
    ) -> FusedDispatchShape:
        """For the kernel that is a whole dispatch, of rows of as many words, so many of which stay together.

        Args:
            least: programs that have something to do besides, of which there are as many as there is room for.
        """
        fits = self._dispatch_fits(num_topk)
        most = power_of_two(_FUSED_WORDS // unit + 1) // 2
        piece = unit * max(1, min(power_of_two(-(-num_words // unit)), most))
        pieces, most = num_tokens * -(-num_words // piece), self.num_sms * fits.per_sm - 1
        return FusedDispatchShape(
            programs=1 + max(_as_few(pieces, most), min(least, most)),
            piece=piece,
            num_warps=fits.num_warps,
            most_registers=fits.registers,
        )

    def _combine_fits(self, num_topk: int) -> _Fit:
        if num_topk > _MANY_PICKS:
            return _Fit(4, 2, 255)
        return _Fit(4, 8, _CROWDED_REGISTERS) if self.is_crowded else _Fit(4, 7, 72)

    def fused_combine(self, num_values: int, num_tokens: int, num_topk: int, *, value_bytes: int) -> FusedCombineShape:
        """For the kernel that is a whole combine.

        Seven programs of a SM's room share out 128 tokens' sums evenly; were there room for an eighth, some
        SMs would have it, and others a program less.
        """
        fits = self._combine_fits(num_topk)
        piece = min(power_of_two(num_values), 2048 // value_bytes)
        pieces, most = num_tokens * -(-num_values // piece), self.num_sms * fits.per_sm
        programs = _as_few(pieces, most)
        if self.is_crowded and programs < most:
            programs = _as_few(pieces, most * 3 // 4)
        return FusedCombineShape(
            programs=max(1, programs),
            piece=piece,
            num_warps=fits.num_warps,
            most_registers=fits.registers,
        )

    def fused_push(
        self, num_words: int, num_rows: int, num_topk: int, *, word_bytes: int, is_summed: bool
    ) -> FusedCombineShape:
        """For the kernel that pushes outputs, of about so many rows of as many words: one program keeps the books.

        Args:
            is_summed: whether several rows are loaded for one that is stored; else more of one is on its way.
        """
        fits = self._combine_fits(num_topk)
        piece = min(power_of_two(num_words), (2048 if is_summed else 4096) // word_bytes)
        pieces = num_rows * -(-num_words // piece)
        return FusedCombineShape(
            programs=1 + max(1, _as_few(pieces, max(1, self.num_sms * fits.per_sm - 1))),
            piece=piece,
            num_warps=fits.num_warps,
            most_registers=fits.registers,
        )

    def __str__(self) -> str:
        is_fused = ", one kernel per call" if self.is_fused else ""
        is_fused += " and one that expands rows" if self.is_fused and self.expand == "receiver" else ""
        loads = "" if self.num_load_sms == self.num_sms else f" to store and {self.num_load_sms} to load"
        return (
            f"LaunchConfig(num_sms={self.num_sms}{loads} of {self.visible_sms}, expand={self.expand!r}, "
            f"mover={self.mover!r}{is_fused}, link {self.topology.link_bandwidth / 1e9:.0f} GB/s, "
            f"memory {self.topology.memory_bandwidth / 1e9:.0f} GB/s)"
        )


class _Fit(NamedTuple):
    """Programs of whole calls: no more on a SM than there are registers for, so that all run at once."""

    num_warps: int
    per_sm: int
    registers: int


def _as_few(num_pieces: int, most: int) -> int:
    """Programs that have done so many pieces no later than ``most`` would: none has more pieces than it has there.

    What is left over is for a rank that cannot run them all at once: of four ranks with a quarter of an H200's
    SMs each, 32 by what CUDA says, one had 29.

    >>> _as_few(256, 95)  # three each
    86
    """
    return -(-num_pieces // -(-num_pieces // most)) if num_pieces else 0


def _shape(row_bytes: int, *, piece_bytes: int, num_warps: int, programs: int | None = None) -> Shape:
    """Whole rows, as many as are smaller than a piece."""
    own_bytes = min(power_of_two(row_bytes), piece_bytes)
    num_rows = min(_MOST_ROWS, piece_bytes // own_bytes)
    return Shape(piece_bytes=own_bytes, num_warps=num_warps, programs=programs, num_rows=num_rows)


def _one_for_each_sm(row_bytes: int, num_sms: int, *, at_once: int = _AT_ONCE, own_programs: int = 0) -> Shape:
    """Programs that fill an SM, of which each warp moves pieces of one row, or of several that are small.

    Half a row is a share, so that there are enough of them for programs to end together.
    """
    piece_bytes = min(power_of_two(row_bytes), _WARP_BYTES)
    return Shape(
        piece_bytes=piece_bytes,
        num_warps=32,
        programs=num_sms,
        num_rows=min(32 * _WARP_BYTES // piece_bytes, 256),
        parts=2,
        at_once=at_once,
        own_programs=own_programs,
    )


def decide(
    spec: Spec,
    topology: Topology,
    launch_options: LaunchOptions,
    *,
    visible_sms: int,
    ranks_here: int = 1,
    can_launch_early: bool = False,
) -> LaunchConfig:
    """The configuration of a rank: what was asked for, and the analytic default for the rest.

    ``expand``, ``mover`` and ``is_fused`` are the same on all ranks, whose topology and options are; how many SMs a
    rank takes, and how its kernels share out rows, is its own matter.

    Twice as many SMs as would fill the link with stores, for each row is also stored here; and half as many again to
    load over it, which takes more in flight (``LaunchConfig`` has the measurement). All that there are, where that is
    fewer, where several ranks share the GPU and its memory is the link, and for calls of few tokens: these are one
    kernel each, or two, so that the receiver makes the copies of a row only where that saves more than a kernel takes.

    >>> spec = Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=4096)
    >>> print(decide(spec, Topology(num_ranks=8), LaunchOptions(), visible_sms=132))
    LaunchConfig(num_sms=16 to store and 24 to load of 132, expand='sender', mover='kernel', link 450 GB/s, memory 4100 GB/s)
    """  # noqa: E501 - as it is printed
    is_fused = spec.max_tokens * spec.num_topk <= _FUSED_PICKS and launch_options.mover == "kernel"
    stores = loads = visible_sms
    if ranks_here == 1 and not is_fused:
        stores, loads = cost.sms_to_store(topology.link_bandwidth), cost.sms_to_load(topology.link_bandwidth)
    return LaunchConfig(
        num_sms=min(launch_options.num_sms or stores, visible_sms),
        num_load_sms=min(launch_options.num_sms or loads, visible_sms),
        visible_sms=visible_sms,
        expand=launch_options.expand or cost.cheaper_expand(spec, topology, more_s=_KERNEL_S if is_fused else 0.0),
        mover=launch_options.mover,
        topology=topology,
        is_fused=is_fused,
        is_crowded=ranks_here > 2,
        crosses_link=ranks_here == 1 and topology.num_ranks > 1,
        launches_early=is_fused and can_launch_early,
    )


def agreed_topology(topology: Topology, ranks_on_gpus: Sequence[int]) -> Topology:
    """What all ranks decide from, whatever each of them sees: where one GPU holds them all, its memory is the link.

    Peers rely on what is decided from it (who expands rows, and so in which region they arrive), so it is made of what
    all ranks have gathered, never of one rank's own facts.

    Args:
        ranks_on_gpus: how many ranks share the GPU of each rank, by rank.

    >>> agreed_topology(Topology(num_ranks=3), [2, 2, 1]) == Topology(num_ranks=3)  # a link lies between the two GPUs
    True
    """
    num_ranks = len(ranks_on_gpus)
    if num_ranks == 1 or min(ranks_on_gpus) < num_ranks:
        return topology
    memory = topology.memory_bandwidth / num_ranks
    return replace(topology, memory_bandwidth=memory, link_bandwidth=0.75 * memory)


def src_rows_at_once(num_blocks: int) -> int:
    """Rows whose src_rows one program works out, among as many blocks."""
    return min(max(1, _SRC_CELLS // power_of_two(num_blocks)), 256)


def counts_at_once(num_ranks: int, num_counts: int) -> int:
    """Ranks whose counts, of which each has as many, the program that begins a dispatch moves at a time."""
    return max(1, min(power_of_two(num_ranks), _COUNTS // power_of_two(num_counts)))


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (value - 1).bit_length()
