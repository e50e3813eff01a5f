"""All that a run has to show, as one value: the page, the trace and the screen are made from it.

Letters: P ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crossdock.cli.demo.model import Shape
from crossdock.cli.demo.replay import Compared
from crossdock.cli.demo.train import Recipe
from crossdock.cli.demo.watch import Span
from crossdock.cli.machine import Machine
from crossdock.cli.mps import Sharing

MOVES = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what the model made of it."""

    prompt: str
    continuation: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run. Its text is Python's standard library; nats are natural logarithms of probabilities."""

    num_ranks: int
    shape: Shape
    recipe: Recipe
    machine: Machine
    sharing: Sharing | None
    """How ranks shared GPUs; None on CPUs."""
    num_files: int
    text_bytes: int
    num_parameters: int
    losses: Sequence[float]
    held_out_loss: float
    compared: Sequence[Compared]
    spans: Sequence[Sequence[Span]]
    """Of each rank, in the order in which they ended."""
    counts: npt.NDArray[np.int32]
    """[steps, layers, P, E]: rows that each rank sent to each expert."""
    samples: Sequence[Sample]
    num_written: int
    num_sequences: int
    written_per_s: float
    hosts: str | None = None
    """Hosts and ranks on each, ``2x2``; None: one host."""

    @property
    def train_s(self) -> float:
        """From the first step's beginning to the last one's end."""
        steps = [span for spans in self.spans for span in spans if span.name == "step"]
        return max(span.end for span in steps) - min(span.start for span in steps)

    @property
    def tokens_per_s(self) -> float:
        """Bytes of text trained on, by all ranks together."""
        return self.recipe.steps * self.recipe.num_sequences * self.shape.context / self.train_s

    @property
    def last_loss(self) -> float:
        """Over the last steps, because a step's own depends on what it happens to read."""
        last = self.losses[-min(10, max(1, len(self.losses) // 4)) :]
        return sum(last) / len(last)

    @property
    def bits_per_byte(self) -> float:
        """Of held-out text: what a compressor would need that used the model."""
        return self.held_out_loss / math.log(2)

    @property
    def largest_difference(self) -> float:
        """Relative, of the losses that were compared."""
        return max(pair.relative for pair in self.compared)

    @property
    def moving_share(self) -> float:
        """How much of the ranks' time went into dispatch and combine, waiting for peers included."""
        times = [spent(spans) for spans in self.spans]
        moving = sum(time[name] for time in times for name in (*MOVES, "waiting for peers"))
        return moving / sum(sum(time.values()) for time in times)

    @property
    def traffic(self) -> npt.NDArray[np.float64]:
        """[P, P] MB that each rank dispatched to each rank in a step's forward pass, on average."""
        rows = self.counts.reshape(*self.counts.shape[:3], self.num_ranks, -1).sum(axis=(0, 1, 4))
        megabytes: npt.NDArray[np.float64] = rows * self.shape.hidden * 4 / len(self.counts) / 1e6
        return megabytes

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """[steps, layers, E] of all ranks' rows, 1 for a fair share."""
        rows = self.counts.sum(axis=2)
        relative: npt.NDArray[np.float64] = rows / rows.mean(axis=2, keepdims=True)
        return relative

    @property
    def measured_on(self) -> str:
        """The machine, and how ranks shared its GPUs."""
        if self.sharing is None:
            return str(self.machine)
        ranks = f"{self.sharing.warning}; " if self.sharing.warning else f"{self.sharing}; "
        return f"{ranks}{self.machine}"

    @property
    def title(self) -> str:
        """The configuration in a line."""
        shape = self.shape
        on = "" if self.hosts is None else f" on hosts {self.hosts}"
        return (
            f"{self.num_ranks} {'process' if self.num_ranks == 1 else 'processes'}{on}, {shape.num_layers} layers of "
            f"{shape.num_experts} experts, top-{shape.num_topk} from {shape.num_topk_groups} of {shape.num_groups} "
            f"{'group' if shape.num_groups == 1 else 'groups'}, {self.num_parameters / 1e6:.1f} M parameters"
        )


def spent(spans: Sequence[Span]) -> dict[str, float]:
    """Where one rank's training time went, in seconds; the parts add up to its steps.

    >>> spans = [
    ...     Span("dispatch", 0, 1.0, 1.5, 0.25),
    ...     Span("forward", 0, 1.0, 3.0, 0.0),
    ...     Span("optimizer", 0, 3.0, 3.5, 0.0),
    ...     Span("step", 0, 0.5, 3.5, 0.0),
    ... ]
    >>> {name: seconds for name, seconds in spent(spans).items() if seconds}
    {'the model': 1.5, 'dispatch': 0.25, 'waiting for peers': 0.25, 'optimizer': 0.5, 'the rest': 0.5}
    """

    def total(*names: str) -> float:
        return sum(span.end - span.start for span in spans if span.name in names)

    waited_s = {name: sum(span.waited_s for span in spans if span.name == name) for name in MOVES}
    work = ("forward", "backward", "all-reduce", "optimizer")
    return {
        "the model": total("forward", "backward") - total(*MOVES),
        **{name: total(name) - waited_s[name] for name in MOVES},
        "waiting for peers": sum(waited_s.values()),
        "all-reduce": total("all-reduce"),
        "optimizer": total("optimizer"),
        "the rest": total("step") - total(*work),
    }
