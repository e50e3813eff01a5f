"""Writing text, a byte at a time: how a model is served with ``Buffer``'s plain verbs.

Each rank has two micro-batches in flight. While one's rows travel to their experts, the other's attention is computed:

    attention A | dispatch A ->
    attention B | dispatch B ->   ... A arrives, its experts run | combine A -> ... B arrives, its experts run | ...

The layout is ``Padded``: a few tokens per step, the same memory at every step, and no rank asks the host how many came.

Letters: S sequences of a micro-batch, N positions, H hidden, V vocabulary, L local experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.cli.demo.model import VOCABULARY, Cache, Layer, Transformer
from crossdock.nn import ExpertParallel
from crossdock.pending import Pending

UNKNOWN = -1
"""A byte of a prompt that the model has to write."""
TEMPERATURE = 0.6
"""Below 1: likely bytes are drawn more often than the model says. The likeliest alone would soon go in circles."""


class MicroBatch:
    """Some sequences that are written together."""

    def __init__(self, model: Transformer, prompts: Int64[Tensor, "S N"], noise: Float32[Tensor, "S N V"]) -> None:
        self.tokens = prompts.clone()
        self.noise = noise
        self.caches = [Cache(model.shape, len(prompts), model.device) for _ in model.layers]
        self.h = torch.empty(0)
        self.combining: Pending[Tensor] | None = None
        self._model = model

    def read(self, position: int) -> None:
        """Begins with the bytes at a position, [S, 1, H]."""
        self.h = self._model.embed(self.tokens[:, position : position + 1])

    def arrive(self) -> None:
        """Adds what the last layer's experts made of it, if they have been asked."""
        if self.combining is not None:
            self.h = self.h + self.combining.wait().view_as(self.h)
            self.combining = None

    def write(self, position: int) -> None:
        """Draws the bytes of a position, where the prompt leaves them to the model."""
        draw_bytes(self.tokens, position, self._model.scores(self.h), self.noise)


@torch.no_grad()
def generate(model: Transformer, buffer: Buffer, batches: Sequence[MicroBatch]) -> None:
    """Completes each micro-batch's tokens, whose unknown bytes are -1. Collective.

    Prompts are read through the same path, a byte at a time.
    """
    for position in range(batches[0].tokens.shape[1] - 1):
        for batch in batches:
            batch.read(position)
        for index, layer in enumerate(model.layers):
            _through(layer, index, buffer, batches)
        for batch in batches:
            batch.arrive()
            batch.write(position + 1)


def _through(layer: Layer, index: int, buffer: Buffer, batches: Sequence[MicroBatch]) -> None:
    """All micro-batches through one layer; their last sums are still under way when this returns."""
    moe = layer.moe
    assert isinstance(moe, ExpertParallel)
    sent = []
    for batch in batches:
        batch.arrive()
        batch.h = layer.attend(batch.h, batch.caches[index])
        x = layer.moe_norm(batch.h).flatten(0, 1)  # [S, H]
        picks, weights = moe.gate(x)
        # Sums that are made elsewhere need the weights there.
        travel = {"weights": weights} if buffer.spec.reduce == "node" else {}
        sent.append((batch, buffer.dispatch_start(x, picks, **travel), weights))
    for batch, rows, weights in sent:
        recv = rows.wait()
        y = recv.output_rows()
        y.copy_(moe.experts(recv.x, recv.num_tokens_per_expert))  # [L, C, H]
        of_rows = recv.weights if buffer.spec.reduce == "node" else weights
        batch.combining = buffer.combine_start(y, recv.plan, weights=of_rows)


@torch.no_grad()
def generate_plainly(
    model: Transformer, prompts: Int64[Tensor, "S N"], noise: Float32[Tensor, "S N V"]
) -> Int64[Tensor, "S N"]:
    """The same in one process, all sequences together."""
    tokens = prompts.clone()
    caches = [Cache(model.shape, len(prompts), model.device) for _ in model.layers]
    for position in range(prompts.shape[1] - 1):
        h = model.embed(tokens[:, position : position + 1])
        for layer, cache in zip(model.layers, caches, strict=True):
            h = layer.attend(h, cache)
            h = h + layer.moe(layer.moe_norm(h))
        draw_bytes(tokens, position + 1, model.scores(h), noise)
    return tokens


def draw_noise(num_sequences: int, length: int, seed: int) -> Float32[Tensor, "S N V"]:
    """What makes ``draw_bytes`` a draw, for all sequences and positions."""
    uniform = torch.rand(num_sequences, length, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return -(-uniform.clamp_min(torch.finfo().tiny).log()).log()


def draw_bytes(
    tokens: Int64[Tensor, "S N"], position: int, scores: Float32[Tensor, "S 1 V"], noise: Float32[Tensor, "S N V"]
) -> None:
    """Draws the bytes of a position where they are unknown; the same noise and scores give the same bytes.

    The largest of scores with Gumbel noise is a draw by their softmax (Gumbel, 1954).
    """
    unknown = tokens[:, position] == UNKNOWN
    noisy = scores[:, 0] / TEMPERATURE + noise[:, position]
    tokens[unknown, position] = noisy[unknown].argmax(dim=1)


def prompts_of(texts: Sequence[bytes], length: int) -> Int64[Tensor, "S N"]:
    """Prompts as rows of bytes, -1 from their ends to ``length``.

    >>> prompts_of([b"if", b"for"], 4)
    tensor([[105, 102,  -1,  -1],
            [102, 111, 114,  -1]])
    """
    rows = torch.full((len(texts), length), UNKNOWN)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text))
    return rows
