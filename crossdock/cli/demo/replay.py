"""The same again in one process without the library, and whether it comes to the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.cli.demo.generate import generate_plainly
from crossdock.cli.demo.model import Transformer
from crossdock.cli.demo.parameters import Values, initial_values, plain_model
from crossdock.cli.demo.plain import PlainMoE
from crossdock.cli.demo.rank import Job
from crossdock.cli.demo.text import as_text
from crossdock.cli.demo.train import Ranks, train
from crossdock.cli.demo.watch import Watch
from crossdock.errors import CrossdockError

TOLERANCE = 1e-5
"""Sums of float32 run in another order over ranks than in one process; that is all that may differ."""


class Disagreement(CrossdockError):
    """The ranks and the one process came to different results."""


class Compared(NamedTuple):
    """The loss of one step, both ways."""

    step: int
    loss: float
    plain_loss: float

    @property
    def relative(self) -> float:
        """How far they are apart."""
        return abs(self.loss - self.plain_loss) / abs(self.plain_loss)


def replay(job: Job, num_steps: int, device: torch.device | None = None) -> list[float]:
    """The losses of the first steps, in one process, on the device that the ranks used."""
    model = plain_model(job.shape).to(device)
    model.load_state_dict(initial_values(job.shape, job.recipe.seed))
    steps = train(
        model,
        torch.from_numpy(job.train_text),
        job.recipe,
        ranks=Ranks(),
        watch=Watch(),
        balance=lambda rate: balance_plainly(model, rate),
    )
    return list(islice(steps, num_steps))


def balance_plainly(model: Transformer, rate: float) -> None:
    """Makes experts that got more tokens than their share less likely, and the others more."""
    for moe in (module for module in model.modules() if isinstance(module, PlainMoE)):
        load = moe.num_tokens_per_expert.double()
        moe.gate.bias += rate * (load.mean() - load).sign().float()


def compare_losses(losses: Sequence[float], plain_losses: Sequence[float]) -> list[Compared]:
    """Both losses of each step that was replayed.

    Raises:
        Disagreement: they are further apart than rounding explains.

    >>> compare_losses([5.5, 5.25], [5.5])
    [Compared(step=1, loss=5.5, plain_loss=5.5)]
    """
    pairs = [Compared(step, *pair) for step, pair in enumerate(zip(losses, plain_losses, strict=False), start=1)]
    for pair in pairs:
        if not pair.relative <= TOLERANCE:
            raise Disagreement(
                f"step {pair.step} has loss {pair.loss!r} over the ranks and {pair.plain_loss!r} in one process, "
                f"{pair.relative:.1e} apart; at most {TOLERANCE:.0e} is rounding: report this with the command line"
            )
    return pairs


def compare_written(job: Job, values: Values, written: Tensor, device: torch.device | None = None) -> int:
    """How many bytes the ranks wrote, after one process with the same parameters has written the same.

    Raises:
        Disagreement: it has written something else.
    """
    model = plain_model(job.shape).to(device)
    model.load_state_dict(values)
    prompts = torch.from_numpy(job.prompts)
    expected = generate_plainly(model, prompts.to(device), job.noise().to(device)).cpu()
    if (wrong := (written != expected).nonzero()).numel():
        row, position = wrong[0].tolist()
        start, ours, theirs = (
            as_text(part.tolist())
            for part in (expected[row, :position], written[row, position:], expected[row, position:])
        )
        raise Disagreement(
            f"after {start!r} the ranks wrote {ours!r} and one process {theirs!r}, with the same parameters: report "
            f"this with the command line"
        )
    return int((prompts < 0).sum())
