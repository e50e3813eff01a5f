"""Row formats: unquantized ones, FP8 with a scale per block, and opaque ones, which only the caller understands.

Shapes: T tokens (or rows), H hidden, G = H / block scale groups per row; L, C, R as in ``layout``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.fields import set_flag, set_integer

E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-126
_CAST_ROWS = 32
"""Rows cast at a time on CPUs: their float32 values fit in a core's L2 cache, and temporaries stay small."""


class Quantized(NamedTuple):
    """Rows in a quantised format: passed to a dispatch, or received from one.

    data: [..., H] in the wire's dtype. scale: [..., G] in the wire's ``scale_dtype`` (packed: ``[..., ceil(G / 4)]``
    int32). The value of an element is ``data * scale`` of its block. What ``Opaque`` rows mean, and how many columns
    they have, is up to the caller.
    """

    data: Shaped[Tensor, "*rows H"]
    scale: Shaped[Tensor, "*rows G"]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A row format. ``dtype`` is the dtype of the data; an unquantized format has no scales."""

    is_unquantized: ClassVar[bool] = True
    """Whether rows are values that can be summed, and so a combine may have the format too."""

    @property
    def column_major(self) -> bool:
        """Whether received scales lie column-major."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the data."""
        raise NotImplementedError

    def num_columns(self, hidden: int) -> int:
        """Columns of the data for rows of ``hidden`` values."""
        return hidden

    def data_bytes(self, hidden: int) -> int:
        """Bytes of the data of a row of ``hidden`` values."""
        return self.num_columns(hidden) * self.dtype.itemsize

    def num_scales(self, hidden: int) -> int:
        """Columns of the scale tensor for rows of ``hidden`` values; 0 for an unquantized format."""
        return 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scale tensor; float32 for an unquantized format, which has none."""
        return torch.float32

    def check_hidden(self, hidden: int) -> None:
        """Raises ConfigError if rows of ``hidden`` values cannot be sent in this format."""


@dataclass(frozen=True, kw_only=True)
class Bf16(Wire):
    """bfloat16, 2 bytes per value, no scales."""

    dtype = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Fp16(Wire):
    """IEEE half precision, 2 bytes per value, no scales."""

    dtype = torch.float16


@dataclass(frozen=True, kw_only=True)
class Fp32(Wire):
    """IEEE single precision, 4 bytes per value, no scales."""

    dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Fp8(Wire):
    """FP8 e4m3 (``float8_e4m3fn``: no infinities, largest value 448), with one scale per ``block`` values of a row.

    For each block of values ``v``, converted to float32, with every operation in float32 and correctly rounded::

        amax  = max(abs(v)) over the finite v, 0 if there is none
        s     = max(amax / 448, 2**-126)
        s     = s rounded up to a power of two                      (pow2 and ue8m0)
        data  = e4m3(clamp(v / s, -448, 448)), to nearest, ties to even; NaN where v is not finite
        scale = s as float32, or its biased exponent byte           (ue8m0)

    The lower bound keeps ``s`` a normal number: hardware that flushes subnormals gives the same bits, and a block of
    zeros is no special case. e4m3 and e8m0 are defined by the OCP Microscaling Formats specification 1.0; one scale per
    block of 128 values follows DeepSeek-V3 (arXiv 2412.19437, section 3.3).

    Args:
        block: values per scale; must divide hidden.
        scale: ``"f32"``, or ``"ue8m0"``: one exponent byte, value ``2 ** (byte - 127)``.
        pow2: round float32 scales up to powers of two (``"ue8m0"`` scales always are).
        packed: four ``ue8m0`` scales in one int32, the first in the lowest byte; the last int32 of a row is padded
            with zero bytes.
        column_major: memory order of received scales. The shape and values of ``recv.x.scale`` are the same for both:
            ``[R, G]``, or ``[L, C, G]`` for Padded, with G = ``num_scales(hidden)``. False: row-major, without gaps.
            True: strides ``(1, S)``, or ``(G * S, 1, S)`` for Padded, so that the scales of one group are adjacent
            over rows. S is the capacity of the receive slot in rows (Padded: of an expert), rounded up so that S
            scales are a multiple of 16 bytes; the first scale is aligned to 16 bytes too. NVIDIA's TMA needs these
            strides, and DeepGEMM takes such scales without a copy. Some versions of DeepGEMM require the smallest S
            for the tensor's rows, which Padded, ``rows="capacity"`` and ``copy=True`` give. The option does not affect
            scales that are passed to a dispatch or returned by ``quantize``.

    Raises:
        ConfigError: block is not positive, scale is unknown, or packed without ``"ue8m0"``; ``Spec`` raises it if
            block does not divide hidden.

    >>> wire = Fp8(block=4)
    >>> data, scale = wire.quantize(torch.tensor([[1.0, -2.0, 0.0, 448.0, 0.0, 0.0, 0.0, 0.0]]))
    >>> data.float().tolist(), scale[0, 0].item()
    ([[1.0, -2.0, 0.0, 448.0, 0.0, 0.0, 0.0, 0.0]], 1.0)
    """

    dtype = torch.float8_e4m3fn
    is_unquantized = False
    block: int = 128
    scale: Literal["f32", "ue8m0"] = "f32"
    pow2: bool = False
    packed: bool = False
    column_major: bool = False
    _has_pow2_scales: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        set_integer(self, "block", " values per scale; pass a positive divisor of hidden, such as 128", least=1)
        set_flag(self, "pow2", "packed", "column_major")
        if self.scale not in ("f32", "ue8m0"):
            raise ConfigError(f"scale={self.scale!r} is not a scale format; pass 'f32' or 'ue8m0'")
        if self.packed and self.scale != "ue8m0":
            raise ConfigError(f"packed=True packs exponent bytes, but scale={self.scale!r}; pass scale='ue8m0' with it")
        object.__setattr__(self, "_has_pow2_scales", self.pow2 or self.scale == "ue8m0")

    def num_scales(self, hidden: int) -> int:
        num_groups = hidden // self.block
        return -(-num_groups // 4) if self.packed else num_groups

    @property
    def scale_dtype(self) -> torch.dtype:
        if self.packed:
            return torch.int32
        return torch.float32 if self.scale == "f32" else torch.float8_e8m0fnu

    def check_hidden(self, hidden: int) -> None:
        if hidden % self.block:
            raise ConfigError(
                f"hidden={hidden} is not divisible by the scale block {self.block}; "
                f"pass Fp8(block=...) with a divisor of hidden, or a unquantized wire such as Bf16()"
            )

    def quantize(self, x: Shaped[Tensor, "T H"]) -> Quantized:
        """Casts rows to this format by the formula above.

        Args:
            x: [T, H], any floating-point dtype, any device; H must be a multiple of ``block``.
        """
        data = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        scale = torch.empty(x.shape[0], self.num_scales(x.shape[1]), dtype=self.scale_dtype, device=x.device)
        num_rows = _CAST_ROWS if x.device.type == "cpu" else max(1, x.shape[0])
        for start in range(0, x.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            data[rows], scale[rows] = self._quantize_few(x[rows])
        return Quantized(data, scale)

    def _quantize_few(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = x.to(torch.float32).reshape(x.shape[0], -1, self.block)  # [T, G, block]
        amax = v.abs().amax(dim=-1)  # [T, G]; NaN or Inf if a value is
        is_finite = x.device.type == "cpu" and bool(torch.isfinite(amax).all())  # on a GPU the host would wait
        not_finite = None if is_finite else ~torch.isfinite(v)
        if not_finite is not None:
            v = v.masked_fill(not_finite, 0.0)
            amax = v.abs().amax(dim=-1)
        # The divisor is a tensor: on CUDA torch multiplies by the reciprocal of a number, which rounds twice.
        scale = torch.div(amax, amax.new_full((), E4M3_MAX)).clamp_(min=_SMALLEST_NORMAL)
        if self._has_pow2_scales:
            scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        v = torch.div(v, scale.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
        if not_finite is not None:
            v.masked_fill_(not_finite, float("nan"))
        return v.to(self.dtype).view(x.shape), self._stored_scale(scale)

    def dequantize(self, rows: Quantized, dtype: torch.dtype = torch.bfloat16) -> Shaped[Tensor, "*rows H"]:
        """``data * scale`` in float32, then one cast to ``dtype``: [..., H], with any leading dimensions."""
        *lead, hidden = rows.data.shape
        num_groups = hidden // self.block
        v = rows.data.to(torch.float32).view(*lead, num_groups, self.block)
        return (v * self._float_scale(rows.scale, num_groups).unsqueeze(-1)).view(*lead, hidden).to(dtype)

    def dequantize_into(self, out: Shaped[Tensor, "R H"], rows: Quantized) -> None:
        """``dequantize`` into ``out``, with one cast to its dtype; for few rows, whose float32 values it allocates."""
        num_groups = out.shape[1] // self.block
        v = rows.data.to(torch.float32)
        v.view(-1, num_groups, self.block).mul_(self._float_scale(rows.scale, num_groups).unsqueeze(-1))
        out.copy_(v)

    def _stored_scale(self, scale: Tensor) -> Tensor:
        """float32 scales [T, G] in the stored form: [T, G], or packed [T, ceil(G / 4)]."""
        if self.scale == "f32":
            return scale
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
        if not self.packed:
            return exponents.view(torch.float8_e8m0fnu)
        padding = -exponents.shape[1] % 4
        return torch.nn.functional.pad(exponents, (0, padding)).view(torch.int32)

    def _float_scale(self, scale: Tensor, num_groups: int) -> Tensor:
        """Stored scales as float32 [..., G]."""
        if self.scale == "f32":
            return scale
        if scale.stride(-1) != 1:  # contiguous() keeps the strides of a single element
            scale = scale.clone(memory_format=torch.contiguous_format)
        exponents = scale.view(torch.uint8)[..., :num_groups].to(torch.int32)
        return (exponents << 23).view(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Opaque(Wire):
    """Rows that the caller has quantised in a way that the library need not know: all bits arrive as they were sent.

    The library neither casts nor sums them. A dispatch takes ``Quantized(data, scale)``, or a plain tensor where there
    are no scales; a combine has a format of its own, ``Spec.combine_wire`` (Bf16() by default). They have no gradients.

    A row of H values has ``H / values_per_element`` elements of data, and ``ceil(H / block)`` scale words: data
    [T, H / values_per_element], scale [T, ceil(H / block)], and received so: [R, ...], or [L, C, ...] for Padded.

    Args:
        dtype: of the data, of 1 to 4 bytes.
        values_per_element: values of a row in one element of data, such as 2 for 4-bit values in bytes; must divide
            hidden.
        block: values of a row per scale word, which need not divide hidden; None: no scales. Where one word holds
            several scales, all their values count: 512 for four scales of 128 values in an int32.
        scale_dtype: of a scale word, of 1 to 4 bytes.
        column_major: memory order of received scales, as in ``Fp8``.

    Raises:
        ConfigError: a dtype has no, or more than 4 bytes, or a number is not positive; ``Spec`` raises it if
            values_per_element does not divide hidden.

    >>> nvfp4 = Opaque(values_per_element=2, block=16, scale_dtype=torch.float8_e4m3fn)  # two values in a byte
    >>> nvfp4.num_columns(2880), nvfp4.num_scales(2880), nvfp4.data_bytes(2880)
    (1440, 180, 1440)
    >>> mxfp8 = Opaque(dtype=torch.float8_e4m3fn, block=32, scale_dtype=torch.float8_e8m0fnu)
    >>> int8_per_row = Opaque(dtype=torch.int8, block=2880)
    >>> Opaque(dtype=torch.float8_e4m3fn, block=128).num_scales(2880)  # the last block has 64 values
    23
    """

    is_unquantized = False
    dtype: torch.dtype = torch.uint8
    values_per_element: int = 1
    block: int | None = None
    scale_dtype: torch.dtype = torch.float32
    column_major: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "scale_dtype"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or dtype.itemsize > 4 or dtype in _WITH_SCALES:
                raise ConfigError(f"{name}={dtype!r}; pass a torch.dtype of 1 to 4 bytes, such as torch.uint8")
        for name in ("values_per_element", *(() if self.block is None else ("block",))):
            set_integer(self, name, "; pass a positive integer", least=1)
        set_flag(self, "column_major")
        if self.column_major and self.block is None:
            raise ConfigError("column_major=True says how scales lie, and block=None has none; pass block= with it")

    def num_columns(self, hidden: int) -> int:
        return hidden // self.values_per_element

    def num_scales(self, hidden: int) -> int:
        return 0 if self.block is None else -(-hidden // self.block)

    def check_hidden(self, hidden: int) -> None:
        if hidden % self.values_per_element:
            raise ConfigError(
                f"hidden={hidden} is not divisible by values_per_element={self.values_per_element}; pass a divisor of "
                f"hidden, or pad the rows"
            )


_WITH_SCALES = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
"""Dtypes of tensors of torch's that have scales of their own, and so are more than their bits."""
