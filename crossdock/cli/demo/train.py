"""Training: the same loop for a rank of an expert-parallel run and for one process, which has all tokens and experts.

The loss is the mean over the tokens of all ranks. Each rank computes its own tokens' part. Where a token has visited
other ranks' experts, dispatch and combine have brought the gradients there, so those of experts are complete; those of
what every rank holds are summed over ranks, with the loss beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.cli.demo.model import Transformer, loss_sum
from crossdock.cli.demo.parameters import replicated
from crossdock.cli.demo.text import draw_batch
from crossdock.cli.demo.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. ``num_sequences`` are those of all ranks together in a step."""

    steps: int
    seed: int
    num_sequences: int = 16
    learning_rate: float = 5e-3
    warm_up: int = 10
    balance_rate: float = 0.005
    """How far an expert's bias moves in a step when it got too many tokens, or too few."""

    def rate(self, step: int) -> float:
        """The learning rate: up a ramp, then down half a cosine to a twentieth."""
        ramp = min(1.0, (step + 1) / self.warm_up)
        progress = max(0, step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * ramp * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class Ranks:
    """Who trains together, as one of them sees it."""

    rank: int = 0
    num_ranks: int = 1
    sum_over_ranks: Callable[[Tensor], object] = lambda _: None
    """Replaces a tensor by the sum of all ranks'."""

    def own(self, sequences: Tensor) -> Tensor:
        """This rank's part of a batch."""
        first, end = (len(sequences) * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        return sequences[first:end]


def train(
    model: Transformer,
    text: Tensor,
    recipe: Recipe,
    *,
    ranks: Ranks,
    watch: Watch,
    balance: Callable[[float], None],
) -> Iterator[float]:
    """Trains, one step for each loss that is taken: the mean over all ranks' tokens, in nats per byte.

    ``balance(rate)`` moves the gates' biases after each step.
    """
    num_tokens = recipe.num_sequences * model.shape.context
    shared = list(replicated(model))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(recipe.steps):
        watch.step = step
        with watch.span("step"):
            batch = draw_batch(
                text, num_sequences=recipe.num_sequences, length=model.shape.context + 1, seed=recipe.seed, step=step
            )
            with watch.span("forward"):
                loss = loss_sum(model, ranks.own(batch).to(model.device)) / num_tokens
            with watch.span("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            with watch.span("all-reduce"):
                total = _sum_over_ranks(shared, loss, ranks)
            with watch.span("optimizer"):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
                optimizer.step()
                optimizer.zero_grad()
                balance(recipe.balance_rate)
        yield total


@torch.no_grad()
def held_out_loss(model: Transformer, text: Tensor, *, ranks: Ranks, at_once: int, num_sequences: int = 64) -> float:
    """Nats per byte on text that the model has not seen; each rank reads as much, ``at_once`` sequences at a time."""
    length = model.shape.context + 1
    starts = torch.linspace(0, len(text) - length, num_sequences).long()
    sequences = torch.stack([text[start : start + length] for start in starts.tolist()]).long()
    own, total = ranks.own(sequences).to(model.device), torch.zeros((), device=model.device)
    for first in range(0, len(own), at_once):
        total += loss_sum(model, own[first : first + at_once])
    ranks.sum_over_ranks(total)
    return float(total) / (num_sequences * model.shape.context)


def _sum_over_ranks(parameters: Sequence[torch.nn.Parameter], loss: Tensor, ranks: Ranks) -> float:
    """Sums gradients in place, as one tensor; gives the sum of the losses."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)])
    ranks.sum_over_ranks(flat)
    end = 1
    for gradient in gradients:
        first, end = end, end + gradient.numel()
        gradient.copy_(flat[first:end].view_as(gradient))
    return float(flat[0])
