"""The only place with ``[grid]``: one method per kernel, which fills in what does not change from call to call.

Letters: T tokens here, J places of a token, K top-k, H hidden, R rows, C rows of a receive slot, P ranks, W counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.cuda.config import LaunchConfig, Shape
from crossdock.backends.cuda.kernels import calls, cast, places, records, rows, sums
from crossdock.backends.cuda.kernels.sync import ABORTED, OK, RECORD_WORDS
from crossdock.backends.cuda.plan import DevicePlan, Table
from crossdock.layout import Expanded, Padded
from crossdock.transport.device import DeviceTransport
from crossdock.wire import Fp8

_POLL_S = 0.3e-6
"""A poll of words takes at least that long, on an H200 with 2 to 8 ranks on it."""
_PICKS = 128
"""Picks that a program compares with each other."""
_TOKENS = 32
"""Tokens whose records one program writes."""
_ORIGIN_CELLS = 16384
"""Rows times blocks that a program compares."""
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Kernels:
    """A rank's kernels, with what they share: words, state, and the geometry of the arena.

    All run on ``stream``, in the order in which they are launched.
    """

    def __init__(self, arena: Arena, transport: DeviceTransport, config: LaunchConfig, *, timeout_s: float) -> None:
        self.config = config
        """Of the call under way."""
        self.arena = arena
        self.device = transport.device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        spec = arena.spec
        self._rank, self._num_ranks = transport.rank, transport.num_ranks
        self._num_local = spec.num_local_experts(self._num_ranks)
        self._num_topk, self._hidden = spec.num_topk, spec.hidden
        self._num_columns = min(spec.num_topk, self._num_ranks)
        self._segments = transport.segments
        self._max_polls = max(1, int(timeout_s / _POLL_S))
        self.state = torch.zeros(calls.STATE_WORDS.value, dtype=torch.int64, device=self.device)
        self.record = torch.zeros(RECORD_WORDS.value, dtype=torch.int64, device=self.device)
        self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.failure = torch.zeros(RECORD_WORDS.value, dtype=torch.int64, pin_memory=True)
        """The record of the call that has failed, in host memory; zero while none has."""
        self.seen = torch.zeros(self._num_ranks, dtype=torch.int64, device=self.device)
        self._fresh: DevicePlan | None = None
        num_counts = spec.num_counts(arena.topology)
        num_chunks = -(-spec.max_tokens // self.chunk_tokens)
        self._partial_sums = torch.zeros(num_chunks, num_counts, dtype=torch.int32, device=self.device)
        self._counts = torch.zeros(num_counts, dtype=torch.int64, device=self.device)
        self._outgoing = torch.zeros(2 * (num_counts - self._num_ranks), dtype=torch.int32, device=self.device)
        self._regions = {name: arena.view(transport.segment, name) for name in arena.regions}
        self._slot_size = {name: view.nbytes // view.shape[0] for name, view in self._regions.items()}
        self._handles: dict[Any, Any] = {}
        self._special_args: dict[int, tuple[bool, ...]] = {}
        self._entered: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)  # what was zeroed here was so on another stream

    @property
    def chunk_tokens(self) -> int:
        """S, tokens of a chunk."""
        return max(1, _PICKS // _power_of_two(self._num_topk))

    def begin_call(self, payload: int) -> None:
        """Words to all and from all; after ``count_picks``, that is with counts, and blocks of rows from them."""
        words = (self._segments, self.state, self.seen, self.record, self.failure, payload, self.refused, self._counts)
        arena = self.arena
        places_of_words = (arena["words"].offset, arena["aborts"].offset, arena["counts"].offset)
        plan, self._fresh = self._fresh, None
        if plan is None:
            args = (*words, self._counts, self._rank, self._max_polls, *places_of_words)
            self._launch(calls.begin_call, (1,), *args, P=self._num_ranks, RING=arena.ring, W=0, num_warps=1)
            return
        assert plan.report is not None
        self._launch(
            places.begin_dispatch,
            (1,),
            *words,
            plan.counts,
            self._rank,
            self._max_polls,
            *places_of_words,
            plan.scalars,
            plan.report.row,
            self._outgoing,
            plan.rows.incoming,
            plan.segment_starts,
            plan.num_tokens_per_expert,
            arena.spec.capacity(self._num_ranks),
            P=self._num_ranks,
            RING=arena.ring,
            **self._blocks(is_pairs=False),
            num_warps=4,
        )

    def finish_call(self, *, posts: bool, awaits_all: bool) -> None:
        """Rows are in place: to all, and from all (or from those that push)."""
        self._launch(
            calls.finish_call,
            (1,),
            self._segments,
            self.state,
            self.seen,
            self.record,
            self.failure,
            self._rank,
            self._max_polls,
            self.arena["arrived"].offset,
            self.arena["aborts"].offset,
            P=self._num_ranks,
            RING=self.arena.ring,
            POSTS=posts,
            AWAITS_ALL=awaits_all,
            num_warps=1,
        )

    def check_call(self) -> None:
        """Ends the call where a peer has given it up."""
        self._launch(
            calls.check_call,
            (1,),
            self._segments,
            self.state,
            self.record,
            self.failure,
            self._rank,
            self.arena["aborts"].offset,
            P=self._num_ranks,
            num_warps=1,
        )

    def count_picks(self, topk_idx: Tensor, plan: DevicePlan | None) -> None:
        """Counts picks ``[T, K]``, for the words that come next to tell, and the plan to be filled from everybody's.

        None where a plan is made again: nothing is told to anybody.
        """
        num_counts, num_chunks = self._counts.shape[0], self._num_chunks(topk_idx)
        if num_chunks:
            self._launch(
                places.count_picks,
                (num_chunks,),
                topk_idx,
                topk_idx.shape[0],
                self._partial_sums,
                self.refused,
                E=self._num_local * self._num_ranks,
                P=self._num_ranks,
                K=self._num_topk,
                S=self.chunk_tokens,
                num_warps=4,
            )
        self._launch(
            places.sum_chunks,
            (-(-num_counts // 32),),
            self._partial_sums,
            self._counts,
            num_chunks,
            W=num_counts,
            TILE=32,
            COLUMNS=32,
            num_warps=4,
        )
        self._fresh = plan

    def derive_blocks(self, plan: DevicePlan, table: Table, told: Tensor, *, is_pairs: bool) -> None:
        """Where the blocks of a table begin, from everybody's counts; what the host is told goes to ``told``."""
        self._launch(
            places.derive_blocks,
            (1,),
            plan.counts,
            self.state,
            plan.scalars,
            told,
            self._outgoing,
            table.incoming,
            plan.segment_starts,
            plan.num_tokens_per_expert,
            self.arena.spec.capacity(self._num_ranks),
            self._rank,
            P=self._num_ranks,
            **self._blocks(is_pairs=is_pairs),
            IS_PAIRS=is_pairs,
            KEEPS_COUNTS=True,
            num_warps=4,
        )

    def place_rows(self, plan: DevicePlan, table: Table, *, is_pairs: bool) -> None:
        """Places and homes of this rank's rows."""
        spec, topk_idx = self.arena.spec, plan.topk_idx
        if topk_idx.shape[0]:
            self._launch(
                places.place_rows,
                (self._num_chunks(topk_idx),),
                topk_idx,
                topk_idx.shape[0],
                self._partial_sums,
                self._outgoing,
                plan.scalars,
                self.state,
                table.places,
                table.homes,
                P=self._num_ranks,
                L=self._num_local,
                K=self._num_topk,
                J=table.places.shape[1],
                S=self.chunk_tokens,
                BY_RANK=is_pairs or not spec.layout.per_pick,
                IN_ORDER_OF_RANKS=is_pairs or spec.reduce == "rank",
                num_warps=4,
            )

    def find_origins(self, scalars: Tensor, table: Table, *, is_pairs: bool) -> None:
        """Where the rows that come here are from."""
        num_blocks, num_slots = table.incoming.shape[1], table.origins.shape[0]
        at_once = min(max(1, _ORIGIN_CELLS // _power_of_two(num_blocks)), 256)
        self._launch(
            places.find_origins,
            (-(-num_slots // at_once),),
            table.incoming,
            scalars,
            table.origins,
            num_slots,
            NUM=(places.NUM_PAIRS if is_pairs else places.NUM_ROWS).value,
            BLOCKS=num_blocks,
            P=self._num_ranks,
            ROWS=at_once,
            num_warps=4,
        )

    def push_rows(self, x: Tensor, table: Table, region: str, *, offset: int = 0, row_bytes: int | None = None) -> None:
        """Rows ``x [T, ...]`` to their places in a region, ``offset`` bytes into rows that are ``row_bytes`` apart."""
        num_tokens = x.shape[0]
        if not num_tokens:
            return
        words = as_words(x)
        own_bytes = words.shape[1] * words.element_size()
        shape = self.config.rows(own_bytes, is_counted=True)
        piece = max(1, shape.piece_bytes // words.element_size())
        at_once = min(shape.num_rows, 4)
        self._launch(
            rows.push_rows,
            _grid(-(-num_tokens // at_once) * -(-words.shape[1] // piece), shape),
            words,
            table.places,
            self._segments,
            self.seen,
            self.state,
            num_tokens,
            words.stride(0),
            self.arena[region].offset + offset,
            self._slot_bytes(region),
            J=table.places.shape[1],
            ROW=words.shape[1],
            ROW_BYTES=row_bytes or own_bytes,
            PIECE=piece,
            TOKENS=at_once,
            num_warps=shape.num_warps,
        )

    def push_cast(self, x: Tensor, table: Table, *, landed: bool) -> None:
        """Rows ``x [T, H]``, cast to the wire, to their places; ``landed``: to where rows land that are copied."""
        num_tokens, wire = x.shape[0], self.arena.spec.wire
        assert isinstance(wire, Fp8)
        if not num_tokens:
            return
        hidden = self._hidden
        scale_bytes = wire.num_scales(hidden) * wire.scale_dtype.itemsize
        num_stored = scale_bytes if wire.scale == "ue8m0" else hidden // wire.block
        shape = self.config.rows(hidden * x.element_size(), is_counted=True)
        values = max(2048, shape.piece_bytes // 2)
        groups = max(1, min(_power_of_two(num_stored), values // _power_of_two(wire.block)))
        out_bytes = hidden * self.arena.spec.combine_dtype.itemsize
        region = "outputs" if landed else "data"
        warps = max(1, min(16, groups * _power_of_two(wire.block) // 512))  # 16 values a thread, for wide stores
        self._launch(
            cast.push_cast,
            _grid(num_tokens * -(-num_stored // groups), shape),
            x,
            table.places,
            self._segments,
            self.seen,
            self.state,
            num_tokens,
            x.stride(0),
            self.arena[region].offset,
            self._slot_bytes(region),
            self.arena[region].offset + hidden if landed else self.arena["scale"].offset,
            self._slot_bytes("outputs" if landed else "scale"),
            J=table.places.shape[1],
            H=hidden,
            BLOCK=wire.block,
            DATA_BYTES=out_bytes if landed else hidden,
            SCALE_BYTES=out_bytes if landed else scale_bytes,
            SCALES=num_stored,
            GROUPS=groups,
            POW2=wire.pow2 or wire.scale == "ue8m0",
            EXPONENTS=wire.scale == "ue8m0",
            num_warps=warps,
            enable_fp_fusion=False,
        )

    def push_records(self, topk_idx: Tensor, weights: Tensor | None, extras: Tensor | None, table: Table) -> None:
        """The small things beside rows: sources, ids, weights ``[T, K]``, extras int32 ``[T, n]``."""
        num_tokens = topk_idx.shape[0]
        if not num_tokens:
            return
        spec = self.arena.spec
        self._launch(
            records.push_records,
            (-(-num_tokens // _TOKENS),),
            topk_idx,
            topk_idx if weights is None else weights.view(torch.int32),
            topk_idx if extras is None else extras,
            table.places,
            self._segments,
            self.seen,
            self.state,
            num_tokens,
            self._rank * spec.max_tokens,
            self.arena["record"].offset,
            self._slot_bytes("record"),
            K=self._num_topk,
            J=table.places.shape[1],
            PER_PICK=spec.layout.per_pick,
            RECORD=self.arena.record_bytes // 4,
            EXTRA=0 if extras is None else extras.shape[1],
            HAS_WEIGHTS=weights is not None,
            TOKENS=_TOKENS,
            num_warps=4,
        )

    def unpack_records(
        self, slot: int, plan: DevicePlan, src_idx: Tensor, topk_idx: Tensor | None, weights: Tensor | None
    ) -> None:
        """Sources ``[n]``, local experts ``[n, K]`` and weights of the first n rows of a slot."""
        num_rows = src_idx.shape[0]
        if not num_rows:
            return
        spec = self.arena.spec
        at_once = max(1, 2048 // _power_of_two(1 if spec.layout.per_pick else self._num_topk))
        at_once = min(at_once, 256)
        self._launch(
            records.unpack_records,
            (-(-num_rows // at_once),),
            self.view("record", slot).view(torch.int32),
            plan.rows.origins,
            src_idx,
            src_idx if topk_idx is None else topk_idx,
            src_idx if weights is None else weights.view(torch.int32),
            self.state,
            num_rows,
            self._rank * self._num_local,
            L=self._num_local,
            K=self._num_topk,
            PER_PICK=spec.layout.per_pick,
            RECORD=self.arena.record_bytes // 4,
            HAS_WEIGHTS=weights is not None,
            ROWS=at_once,
            num_warps=4,
        )

    def push_partial_rows(self, rows_table: Table, pairs: Table) -> None:
        """Tells each rank which of its rows belong to one token."""
        num_tokens = pairs.places.shape[0]
        if not num_tokens:
            return
        self._launch(
            records.push_partial_rows,
            (-(-num_tokens // _TOKENS),),
            rows_table.places,
            pairs.places,
            self._segments,
            self.seen,
            self.state,
            num_tokens,
            self.arena["partial_rows"].offset,
            self._slot_bytes("partial_rows"),
            K=self._num_topk,
            J=pairs.places.shape[1],
            TOKENS=_TOKENS,
            num_warps=4,
        )

    def expand_rows(self, slot: int, region: str, plan: DevicePlan, *, offset: int) -> None:
        """Landed rows of a slot, ``offset`` bytes into output rows, to the places of their picks in a region."""
        assert plan.partial_rows is not None
        target = as_words(self.view(region, slot))
        out_bytes = self._hidden * self.arena.spec.combine_dtype.itemsize
        size = target.element_size()
        landed = self.view("outputs", slot).view(torch.uint8).view(-1)[offset:]
        landed = landed[: landed.shape[0] // size * size].view(target.dtype)
        shape = self.config.rows(target.shape[1] * size, is_counted=False)
        piece = max(1, shape.piece_bytes // size)
        self._launch(
            rows.expand_rows,
            _grid(1, shape),
            landed,
            target,
            plan.partial_rows,
            plan.scalars,
            self.state,
            out_bytes // size,
            NUM=places.NUM_PAIRS.value,
            K=self._num_topk,
            ROW=target.shape[1],
            PIECE=piece,
            num_warps=shape.num_warps,
        )

    def zero_gaps(self, slot: int, region: str, plan: DevicePlan) -> None:
        """Zeroes what alignment left between the segments of a slot."""
        words = as_words(self.view(region, slot))
        piece = min(_power_of_two(words.shape[1]), 1024)
        self._launch(
            rows.zero_gaps,
            (self._num_local, -(-words.shape[1] // piece)),
            words,
            plan.rows.incoming,
            plan.segment_starts,
            self.state,
            P=self._num_ranks,
            N=self._num_local,
            ROW=words.shape[1],
            PIECE=piece,
            num_warps=4,
        )

    def push_home(self, y: Tensor, plan: DevicePlan, table: Table, region: str, row_bytes: int) -> None:
        """Rows ``y [R, ...]`` to their homes in a region of their owners."""
        words = as_words(y)
        shape = self._home_shape(words.shape[1] * words.element_size())
        piece = max(1, shape.piece_bytes // words.element_size())
        self._launch(
            rows.push_home,
            _grid(1, shape),
            words,
            table.origins,
            plan.scalars,
            self._segments,
            self.seen,
            self.state,
            words.stride(0),
            self.arena[region].offset,
            self._slot_bytes(region),
            NUM=(places.NUM_PAIRS if table is plan.pairs else places.NUM_ROWS).value,
            ROW=words.shape[1],
            ROW_BYTES=row_bytes,
            PIECE=piece,
            num_warps=shape.num_warps,
        )

    def push_sums(self, y: Tensor, plan: DevicePlan, weights: Tensor | None) -> None:
        """This rank's sums of the rows of each pair (or each row, weighted), to their homes."""
        pairs = plan.pairs if plan.sums_pairs else None
        table = pairs or plan.rows
        shape = self._home_shape(self._hidden * y.element_size())
        self._launch(
            sums.push_sums,
            _grid(1, shape),
            y,
            y if weights is None else weights,
            table.origins if pairs is None else plan.partial_rows,
            table.origins,
            plan.scalars,
            self._segments,
            self.seen,
            self.state,
            y.stride(0),
            self.arena["landing"].offset,
            self._slot_bytes("landing"),
            NUM=(places.NUM_ROWS if pairs is None else places.NUM_PAIRS).value,
            K=0 if pairs is None else self._num_topk,
            H=self._hidden,
            PIECE=max(1, shape.piece_bytes // y.element_size()),
            HAS_WEIGHTS=weights is not None,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )

    def sum_rows(self, out: Tensor, plan: DevicePlan, weights: Tensor | None, bias: Tensor | None, slot: int) -> None:
        """``out [T, H]`` from each token's rows, weighted ``[T, J]``; what was pushed lies in that landing slot."""
        num_tokens = out.shape[0]
        if not num_tokens:
            return
        shape = self.config.rows(self._hidden * out.element_size(), is_counted=True)
        piece = max(1, shape.piece_bytes // out.element_size())
        table = plan.back
        self._launch(
            sums.sum_rows,
            _grid(num_tokens * -(-self._hidden // piece), shape),
            out,
            out if bias is None else bias,
            out if weights is None else weights,
            table.places,
            table.homes,
            self._segments,
            self.seen,
            self.state,
            num_tokens,
            self._rank,
            self.arena["outputs"].offset,
            self._slot_bytes("outputs"),
            self.arena["landing"].offset + slot * self._slot_bytes("landing"),
            J=table.places.shape[1],
            H=self._hidden,
            PIECE=piece,
            HAS_WEIGHTS=weights is not None,
            BIAS_ROWS=-1 if bias is None else int(bias.dim() == 2),
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )

    def weigh_places(self, topk_idx: Tensor, weights: Tensor, table: Table, out: Tensor) -> None:
        """Weights of rows that serve several picks, ``[T, J]`` from ``[T, K]``."""
        if out.shape[0]:
            self._launch(
                sums.weigh_places,
                (-(-out.shape[0] // _TOKENS),),
                topk_idx,
                weights,
                table.places,
                out,
                out.shape[0],
                L=self._num_local,
                K=self._num_topk,
                J=out.shape[1],
                TOKENS=_TOKENS,
                num_warps=4,
            )

    def pack_rows(self, x: Tensor, table: Table, packed: Tensor) -> None:
        """Rows ``x [T, ...]`` into this rank's sending order, ``[Q, ...]``."""
        words, out = as_words(x), as_words(packed)
        if words.dtype != out.dtype:
            words = as_words(x.contiguous().clone())
        if not x.shape[0]:
            return
        shape = self.config.rows(words.shape[1] * words.element_size(), is_counted=True)
        piece = max(1, shape.piece_bytes // words.element_size())
        self._launch(
            rows.pack_rows,
            _grid(x.shape[0] * -(-words.shape[1] // piece), shape),
            words,
            table.places,
            table.homes,
            out,
            self.state,
            x.shape[0],
            words.stride(0),
            J=table.places.shape[1],
            ROW=words.shape[1],
            PIECE=piece,
            num_warps=shape.num_warps,
        )

    @contextmanager
    def all_void(self) -> Iterator[None]:
        """Calls within are void: their kernels touch no peer's memory, and wait for nobody."""
        with torch.cuda.stream(self.stream):
            self.state[calls.STATUS.value] = ABORTED.value
        yield
        with torch.cuda.stream(self.stream):
            self.state[calls.STATUS.value] = OK.value
        self.stream.synchronize()

    def enter(self) -> None:
        """What the caller has issued on its current stream comes before what is launched from now on."""
        self._entered.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self._entered)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the current stream, for kernels to write at once."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if torch.are_deterministic_algorithms_enabled():  # torch may have filled it, on the current stream
            self.enter()
        return tensor

    def view(self, region: str, slot: int) -> Tensor:
        """A slot of a region of this rank's own segment."""
        return self._regions[region][slot]

    def use_sms(self, num_sms: int | None, default: LaunchConfig) -> None:
        """Chooses the configuration of the call that comes now."""
        self.config = default
        if num_sms is not None:
            self.config = replace(default, num_sms=min(num_sms, default.visible_sms))

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int,
        enable_fp_fusion: Any = True,
        **sizes: Any,
    ) -> None:
        """Launches a kernel on our stream: what depends on types, alignments and constants is looked up once.

        So it takes a third of the time that Triton's own way takes, which looks at everything anew.
        """
        facts = [
            (arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg if is_special else arg < 2**31
            for arg, is_special in zip(args, self._special(kernel), strict=False)
        ]
        key = (id(kernel), num_warps, *sizes.values(), *facts)
        handle = self._handles.get(key)
        if handle is not None:
            handle[(*grid, 1, 1)[:3]](*args, *sizes.values(), stream=self.stream.cuda_stream)
            return
        options = {} if enable_fp_fusion else {"enable_fp_fusion": False}
        with torch.cuda.stream(self.stream):
            handle = kernel[grid](*args, **sizes, num_warps=num_warps, **options)
        if handle is not None:
            self._handles[key] = handle

    def _special(self, kernel: Any) -> tuple[bool, ...]:
        """Of each argument of a kernel: whether its value matters to the compiler; the constants come last."""
        special = self._special_args.get(id(kernel))  # a kernel's own hash takes as long as all the rest
        if special is None:
            special = tuple(not param.do_not_specialize for param in getattr(kernel, "params", ())) or (True,) * 32
            self._special_args[id(kernel)] = special
        return special

    def _blocks(self, *, is_pairs: bool) -> dict[str, int]:
        """By what rows are sorted where they land, and how segments are aligned."""
        layout, num_experts = self.arena.spec.layout, self._num_local * self._num_ranks
        by_rank = is_pairs or not layout.per_pick
        alignment = layout.alignment if isinstance(layout, Expanded) and not is_pairs else 1
        return {
            "L": self._num_local,
            "N": 1 if by_rank else self._num_local,
            "FIRST": num_experts if by_rank else 0,
            "ALIGNMENT": 0 if isinstance(layout, Padded) and not is_pairs else alignment,
        }

    def _num_chunks(self, topk_idx: Tensor) -> int:
        return -(-topk_idx.shape[0] // self.chunk_tokens)

    def _home_shape(self, row_bytes: int) -> Shape:
        shape = self.config.rows(row_bytes, is_counted=False)
        if isinstance(self.arena.spec.layout, Padded):  # most rows are none: look at each once, not at all its pieces
            return replace(shape, piece_bytes=_power_of_two(row_bytes), num_warps=max(4, shape.num_warps))
        return shape

    def _slot_bytes(self, region: str) -> int:
        return self._slot_size[region]


def as_words(rows_of: Tensor) -> Tensor:
    """Rows ``[n, ...]`` as words of the widest type that their bytes, places and distances are multiples of."""
    flat = rows_of.reshape(rows_of.shape[0], -1) if rows_of.dim() != 2 else rows_of
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    size = flat.element_size()
    row_bytes, pitch = flat.shape[1] * size, flat.stride(0) * size
    at = flat.storage_offset() * size
    widest = next(
        w for w in _WORDS if row_bytes % w == 0 and pitch % w == 0 and at % w == 0 and flat.data_ptr() % w == 0
    )
    return flat.view(_WORDS[widest]) if widest != size or flat.dtype.is_floating_point else flat


def _grid(num_items: int, shape: Shape) -> tuple[int]:
    return (num_items if shape.programs is None else shape.programs,)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
