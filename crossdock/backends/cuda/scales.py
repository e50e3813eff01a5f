"""Launches of what moves scales that arrive column-major; those of rows without gaps move as rows do.

Letters: T tokens here, G scales of a row (words, where they are packed), R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.backends.cuda.config import power_of_two
from crossdock.backends.cuda.kernels import plan as plan_kernels
from crossdock.backends.cuda.kernels import scales as kernels
from crossdock.backends.cuda.launch import Launcher, kind_of
from crossdock.backends.cuda.plan import DevicePlan, Table
from crossdock.scales import ScaleLayout, as_integers

_AT_ONCE = 1024
"""Words that a program moves at a time."""
_NUM_WARPS = 4
"""At least, of each."""


class ScaleKernels:
    """Wide kernels, on a launcher's stream: they wait for nobody."""

    def __init__(self, launcher: Launcher) -> None:
        self._on = launcher
        self._layout = launcher.arena.scales

    def push_scales(self, scale: Tensor, table: Table) -> None:
        """Scales ``[T, G]``, of any strides, to the places of their rows."""
        num_tokens, num_scales = scale.shape
        if not num_tokens:
            return
        words = as_integers(scale)
        shape = self._on.config.rows(num_scales * words.element_size(), is_counted=True)
        piece, at_once = _share(num_scales)
        num_items = -(-num_tokens // at_once) * -(-num_scales // piece)
        self._on.launch(
            kernels.push_scales,
            (num_items if shape.programs is None else shape.programs,),
            words,
            table.dst_rows,
            self._on.segments,
            self._on.call,
            self._on.state,
            num_tokens,
            words.stride(0),
            words.stride(1),
            self._on.arena["scale"].offset,
            self._on.slot_bytes("scale"),
            J=table.dst_rows.shape[1],
            SCALES=num_scales,
            SIZE=words.element_size(),
            **constants(self._layout),
            PIECE=piece,
            TOKENS=at_once,
            given=(*kind_of(words), words.stride(0) < 2**31, words.stride(1) < 2**31),
            num_warps=max(_NUM_WARPS, shape.num_warps),
        )

    def expand_scales(self, slot: int, plan: DevicePlan, *, offset: int) -> None:
        """Scales of staged rows, ``offset`` bytes into output rows, to the places of their rows' picks."""
        assert plan.partial_rows is not None
        layout, spec = self._layout, self._on.arena.spec
        scales = as_integers(self._on.view("scale", slot))
        size = scales.element_size()
        staged = self._on.view("outputs", slot).view(torch.uint8).view(-1)[offset:]
        staged = staged[: staged.shape[0] // size * size].view(scales.dtype)
        shape = self._on.config.rows(layout.num_scales * size, is_counted=False)
        piece, at_once = _share(layout.num_scales)
        num_bytes = constants(layout)
        self._on.launch(
            kernels.expand_scales,
            (shape.programs or 1,),
            staged,
            scales,
            plan.partial_rows,
            plan.scalars,
            self._on.state,
            spec.hidden * spec.combine_dtype.itemsize // size,
            NUM=plan_kernels.NUM_PAIRS.value,
            K=spec.num_topk,
            SCALES=layout.num_scales,
            SEGMENT_ROWS=num_bytes["SEGMENT_ROWS"],
            SEGMENT=num_bytes["SEGMENT_BYTES"] // size,
            ROW=num_bytes["SCALE_BYTES"] // size,
            GROUP=num_bytes["GROUP_BYTES"] // size,
            PIECE=piece,
            PAIRS=at_once,
            given=(kind_of(staged), kind_of(scales), kind_of(plan.partial_rows)),
            num_warps=max(_NUM_WARPS, shape.num_warps),
        )

    def zero_gaps(self, slot: int, plan: DevicePlan) -> None:
        """Zeroes the scales of what alignment left between the segments of a slot."""
        scales, num_scales = as_integers(self._on.view("scale", slot)), self._layout.num_scales
        piece, at_once = _share(num_scales)
        self._on.launch(
            kernels.zero_scale_gaps,
            (self._on.num_local, -(-num_scales // piece)),
            scales,
            plan.rows.incoming,
            plan.segment_starts,
            self._on.state,
            P=self._on.num_ranks,
            N=self._on.num_local,
            SCALES=num_scales,
            GROUP=self._layout.group_bytes // scales.element_size(),
            PIECE=piece,
            ROWS=at_once,
            given=kind_of(scales),
            num_warps=_NUM_WARPS,
        )


def constants(layout: ScaleLayout) -> dict[str, int]:
    """A layout as kernels take it; see ``kernels.scales``. Only column-major do capacities show in it."""
    return {
        "SEGMENT_ROWS": layout.segment_rows if layout.has_jumps else 0,
        "SEGMENT_BYTES": layout.segment_bytes if layout.has_jumps else 0,
        "SCALE_BYTES": layout.row_bytes,
        "GROUP_BYTES": layout.group_bytes,
    }


def _share(num_scales: int) -> tuple[int, int]:
    """Words of a row, and rows, that a program moves at a time."""
    piece = min(power_of_two(num_scales), _AT_ONCE)
    return piece, _AT_ONCE // piece
