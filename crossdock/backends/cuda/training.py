"""Launches of what training does with rows beside the calls: on the caller's own stream, where these have ended.

Letters: R rows (of all segments), L local experts, C capacity, H hidden, G scales of a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crossdock.backends.cuda.config import PROGRAMS_PER_SM, power_of_two
from crossdock.backends.cuda.kernels import gradients, own
from crossdock.backends.cuda.launch import NUM_KINDS, Launch, Launcher, kind_of
from crossdock.backends.cuda.scales import dtype_of
from crossdock.kinds import Kinds
from crossdock.layout import Padded
from crossdock.scales import as_integers, room_like
from crossdock.wire import Fp8, Quantized

_VALUES = 2048
"""Of a row that a program takes at a time."""
_VALUES_OF_WARP = 512
"""16 a thread: words of 16 bytes of a narrow row, two of what it becomes."""


class TrainingKernels:
    """Wide kernels that touch no peer's memory and wait for nobody."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._on = launcher.state
        self._spec = launcher.state.arena.spec
        self._launches: Kinds[Launch] = Kinds(NUM_KINDS)
        self._programs = launcher.config.visible_sms * PROGRAMS_PER_SM

    def copy_rows(self, plan: Tensor, rows: Tensor, out: Tensor) -> None:
        """Copies rows ``[R, ...]`` or ``[L, C, ...]`` of a slot, as far as they came; ``plan`` is its memory."""
        if not out.numel():
            return
        pair = [each.view(-1, rows.shape[-1]) for each in (out, rows)]
        num_bytes = rows.shape[-1] * rows.element_size()
        word = math.gcd(8, num_bytes, rows.data_ptr() & 15, out.data_ptr() & 15)
        words, source = (each.view(dtype_of(word)) for each in pair)
        num_words = words.shape[1]
        piece = min(power_of_two(num_words), 4096 // word)
        is_padded, places = isinstance(self._spec.layout, Padded), self._on.plan_shape.places
        self._launch(
            own.copy_arrived,
            words.shape[0] * -(-num_words // piece),
            (words, source, plan, words.shape[0], rows.shape[1] if is_padded else 0),
            {
                "ROW": num_words,
                "PIECE": piece,
                "SEGMENTS": is_padded,
                "COUNTS_AT": places.tokens if is_padded else places.scalars,
            },
            num_warps=max(1, piece * word // 1024),
        )

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """See Backend."""
        if isinstance(rows, Quantized):
            out = self._on.empty(*rows.data.shape, dtype=self._spec.combine_dtype)
            if out.numel():
                data = rows.data.view(torch.uint8).reshape(-1, self._spec.hidden)
                self._dequantize(out, data, rows.scale, None if src_idx is None else src_idx.reshape(-1))
            return out
        if src_idx is None:
            return rows.clone(memory_format=torch.contiguous_format)
        out = self._on.empty(*rows.shape, dtype=rows.dtype)
        if out.numel():
            source = rows.reshape(-1, rows.shape[-1])
            size = rows.element_size()
            word = math.gcd(8, source.shape[1] * size, source.stride(0) * size, source.data_ptr() & 15)
            words, source = (given.view(dtype_of(word)) for given in (out.view(-1, rows.shape[-1]), source))
            num_words = words.shape[1]
            piece = min(power_of_two(num_words), 4096 // word)
            self._launch(
                own.copy_rows,
                words.shape[0] * -(-num_words // piece),
                (words, source, src_idx.reshape(-1), words.shape[0]),
                {"ROW": num_words, "PIECE": piece},
                num_warps=max(1, piece * word // 1024),
            )
        return out

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        grads, y, weights, src_idx = (given.contiguous() for given in (grads, y, weights, src_idx))
        grad_y = self._on.empty(*y.shape, dtype=y.dtype)
        grad_weights = self._on.empty(*y.shape[:-1], dtype=torch.float32)
        hidden = y.shape[-1]
        if grad_weights.numel():
            piece = min(power_of_two(hidden), _VALUES)
            self._launch(
                gradients.weigh_gradients,
                grad_weights.numel(),
                (grad_y, grad_weights, grads, y, weights, src_idx, grad_weights.numel()),
                {"H": hidden, "PIECE": piece},
                num_warps=max(1, piece // _VALUES_OF_WARP),
            )
        return grad_y, grad_weights

    def warm_up(self) -> None:
        """Launches all that training may launch, on one row of a receive slot."""
        spec, view = self._spec, self._on.view
        none = torch.full((1,), -1, dtype=torch.int32, device=self._on.device)
        wide = torch.zeros(1, spec.hidden, dtype=spec.combine_dtype, device=self._on.device)
        weights = torch.zeros(1, dtype=torch.float32, device=self._on.device)
        data = view("data", 0)
        if spec.is_staged:
            if isinstance(spec.wire, Fp8):
                scales = self._on.arena.scales.of_own_rows(1)
                scale = scales.of_rows(self._on.empty(*scales.shape, dtype=scales.dtype), 1)
                self._dequantize(wide, data.view(torch.uint8)[:1], scale, None)
        elif isinstance(spec.wire, Fp8):
            scale = self._on.arena.scales.of_rows(view("scale", 0), data.shape[0])
            for src_idx in (None, none):
                self._dequantize(wide, data.view(torch.uint8)[:1], scale, src_idx)
        elif spec.wire.is_unquantized:
            self.own_rows(data[:1], none)
        if not spec.is_staged:  # else rows are their caller's already
            self.own_rows(wide, none)
            self._warm_up_copies()
        self.weigh_gradients(wide, wide, weights, none)

    def _warm_up_copies(self) -> None:
        """Of whole slots, whose shapes are constants of the kernel, on a plan without rows."""
        plan = torch.zeros(self._on.plan_shape.num_words(0), dtype=torch.int32, device=self._on.device)
        for region in {self._on.arena.region_of_rows(unquantized=unquantized) for unquantized in (False, True)}:
            data = as_integers(self._on.view(region, 0))
            if isinstance(self._spec.layout, Padded):
                data = data.view(self._on.num_local, -1, data.shape[-1])
            self.copy_rows(plan, data, room_like(data))
        scales = self._on.arena.scales
        if scales.num_scales and not scales.column_major:
            num_rows = self._spec.num_slot_rows(self._on.num_ranks)
            scale = as_integers(scales.of_rows(self._on.view("scale", 0), num_rows))
            self.copy_rows(plan, scale, room_like(scale))

    def _dequantize(self, out: Tensor, data: Tensor, scale: Tensor, src_idx: Tensor | None) -> None:
        """``out [R, H]`` from bytes ``data [R, H]``; ``scale`` is of as many rows, or of more."""
        wire, (num_rows, hidden) = self._spec.wire, data.shape
        assert isinstance(wire, Fp8)
        is_exponents, num_groups = wire.scale == "ue8m0", hidden // wire.block
        memory, sizes = _strided(scale, is_exponents=is_exponents)
        groups = max(1, min(power_of_two(num_groups), _VALUES // power_of_two(wire.block)))
        sizes |= {"GROUPS": groups, "EXPONENTS": is_exponents, "HAS_GAPS": src_idx is not None}
        self._launch(
            own.dequantize_rows,
            num_rows * -(-num_groups // groups),
            (out, data, memory, data if src_idx is None else src_idx, num_rows),
            {"H": hidden, "BLOCK": wire.block, **sizes},
            num_warps=max(1, min(16, groups * power_of_two(wire.block) // _VALUES_OF_WARP)),
        )

    def _launch(
        self, kernel: Any, num_items: int, args: tuple[Any, ...], sizes: dict[str, Any], num_warps: int
    ) -> None:
        """On the caller's stream: what it has issued comes before, and what it issues, behind."""
        kinds = tuple(kind_of(arg) if isinstance(arg, Tensor) else None for arg in args)
        key = (kernel.fn.__name__, *sizes.values(), *((kind[0], kind[2]) for kind in kinds if kind))
        launch = self._launches.get(key)
        if launch is None:
            made = self._launcher.bind(
                kernel, lambda items: min(items, self._programs), num_warps=num_warps, enable_fp_fusion=False, **sizes
            )
            launch = self._launches.keep(key, made)
        launch(num_items, self._launcher.streams.current(), *args)


def _strided(scale: Tensor, *, is_exponents: bool) -> tuple[Tensor, dict[str, int]]:
    """Scales ``[R, G]`` or ``[L, C, G]`` as the kernel reads them, where they are, and how they lie there."""
    word_bytes = scale.dtype.itemsize
    words = as_integers(scale)
    size = 1 if is_exponents else word_bytes
    in_scales = word_bytes // size  # of a word
    *of_segments, row, group = words.stride()
    sizes = {"SEGMENT_ROWS": 0, "SEGMENT": 0, "ROW": row * in_scales}
    if of_segments and of_segments[0] != words.shape[1] * row:
        sizes |= {"SEGMENT_ROWS": words.shape[1], "SEGMENT": of_segments[0] * in_scales}
    sizes |= {"GROUP_BYTES": group * word_bytes, "WORD": in_scales}
    memory = words.as_strided((1,), (1,))  # whatever its strides, the kernel begins where it does
    return memory.view(torch.uint8 if is_exponents else torch.float32), sizes
