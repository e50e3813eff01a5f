"""A small language model: a transformer whose feed-forward blocks are Mixtures of Experts.

The model does not know where its experts are. Whoever builds it passes ``make_moe``, which makes one block; with
``crossdock.nn.ExpertParallel`` the experts are spread over ranks, and nothing else changes:

    Transformer(shape, lambda: ExpertParallel(Gate(...), GroupedExperts(...), buffer))

Letters: S sequences, N positions, H hidden, V vocabulary (256 bytes), D values of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256
"""Every byte."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that a model is built from. Experts are those of one block."""

    hidden: int = 128
    num_layers: int = 3
    num_heads: int = 4
    context: int = 128
    num_experts: int = 32
    num_topk: int = 4
    intermediate: int = 64
    num_groups: int = 1
    num_topk_groups: int = 1


class Cache:
    """Keys and values of one layer's attention for the positions that have been read, [S, heads, context, D]."""

    def __init__(self, shape: Shape, num_sequences: int, device: torch.device | None = None) -> None:
        size = (num_sequences, shape.num_heads, shape.context, shape.hidden // shape.num_heads)
        self._keys, self._values = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.length = 0
        """Positions that have been read."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values up to and with the new ones, [S, heads, n, D]."""
        start, self.length = self.length, self.length + key.shape[2]
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class Attention(nn.Module):
    """Each position looks at those before it. Positions are told apart by rotating queries and keys (RoPE)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        half = shape.hidden // shape.num_heads // 2
        angles = torch.outer(torch.arange(shape.context), 1e4 ** -(torch.arange(half) / half))  # [context, D / 2]
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        self.rotations: Tensor

    def forward(self, x: Float32[Tensor, "S N H"], cache: Cache | None = None) -> Float32[Tensor, "S N H"]:
        """With a cache, x continues what was read before; it holds one position then."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, S, heads, N, D]
        first = cache.length if cache else 0
        query, key = self._rotated(heads[:2], first)
        value = heads[2]
        if cache:
            key, value = cache.extended(key, value)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        result: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result

    def _rotated(self, heads: Tensor, first: int) -> Tensor:
        cos, sin = self.rotations[:, first : first + heads.shape[-2]]
        left, right = heads.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Layer(nn.Module):
    """Attention, then the experts, each added to what came in."""

    def __init__(self, shape: Shape, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden)
        self.attention = Attention(shape)
        self.moe_norm = nn.RMSNorm(shape.hidden)
        self.moe = moe

    def forward(self, h: Float32[Tensor, "S N H"]) -> Float32[Tensor, "S N H"]:
        h = self.attend(h)
        result: Tensor = h + self.moe(self.moe_norm(h))
        return result

    def attend(self, h: Float32[Tensor, "S N H"], cache: Cache | None = None) -> Float32[Tensor, "S N H"]:
        """The first half of the layer, which needs no other rank."""
        result: Tensor = h + self.attention(self.attention_norm(h), cache)
        return result


class Transformer(nn.Module):
    """Bytes in, a score for each possible next byte out."""

    def __init__(self, shape: Shape, make_moe: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.hidden)
        self.layers = cast("Sequence[Layer]", nn.ModuleList(Layer(shape, make_moe()) for _ in range(shape.num_layers)))
        self.norm = nn.RMSNorm(shape.hidden)

    def forward(self, tokens: Int64[Tensor, "S N"]) -> Float32[Tensor, "S N V"]:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.scores(h)

    @property
    def device(self) -> torch.device:
        """Where the model is, and all that it is given."""
        return self.embedding.weight.device

    def embed(self, tokens: Int64[Tensor, "S N"]) -> Float32[Tensor, "S N H"]:
        """What the first layer gets; as large as what the layers will add to it, or bytes would be lost among that."""
        return functional.rms_norm(self.embedding(tokens), (self.shape.hidden,))

    def scores(self, h: Float32[Tensor, "S N H"]) -> Float32[Tensor, "S N V"]:
        """The embedding serves as the last layer too."""
        return functional.linear(self.norm(h), self.embedding.weight)


def loss_sum(model: nn.Module, sequences: Int64[Tensor, "S N+1"]) -> Float32[Tensor, ""]:
    """Nats, summed over all positions: how surprised the model is by each sequence's next bytes."""
    scores = model(sequences[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten(), reduction="sum")
