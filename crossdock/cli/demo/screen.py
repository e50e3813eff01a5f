"""The demo in a terminal: a progress bar while it trains, then what came of it. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from crossdock.cli.demo.estimate import Estimate
from crossdock.cli.demo.outcome import Outcome
from crossdock.cli.demo.replay import TOLERANCE, Compared
from crossdock.cli.terminal import console_of, print_table

_WIDTH = 100
"""Columns where the output is no terminal."""
_LINES = 10
"""Progress lines where there is no terminal."""

Show = Callable[..., None]
"""``show(stage)``; in training ``show(stage, steps done, loss, tokens per second, share of dispatch and combine)``."""


class _Left(ProgressColumn):
    """Drawn again and again, so that it counts down also while nobody says how far they are."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__()
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        task.completed = self._estimate.share()
        return Text(f"about {_seconds(self._estimate.left_s())} left", style="cyan")


@contextmanager
def progress(estimate: Estimate, num_steps: int) -> Iterator[Show]:
    """Progress on stderr from the first moment: a bar that goes when the block ends; lines where it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(estimate, num_steps).show
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), _Left(estimate))
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(estimate.stage, total=1.0)

        def show(stage: str, step: int = 0, *figures: float) -> None:
            estimate.begin(stage)
            if figures:
                estimate.reach(step / num_steps)
                loss, tokens_per_s, moving = figures
                # Short, so that bar and all fit into 80 columns.
                stage = f"{step}/{num_steps} loss {loss:.3f}, {tokens_per_s:,.0f} tok/s, {moving:.0%} moving"
            bar.update(task, description=stage)

        yield show


class _Lines:
    """A line when a stage begins, and some while it trains."""

    def __init__(self, estimate: Estimate, num_steps: int) -> None:
        self._estimate, self._num_steps = estimate, num_steps
        self._console = Console(stderr=True, width=_WIDTH)
        self._shown: str | None = None

    def show(self, stage: str, step: int = 0, *figures: float) -> None:
        self._estimate.begin(stage)
        if figures:
            self._estimate.reach(step / self._num_steps)
            if step == self._num_steps or step % max(1, self._num_steps // _LINES) == 0:
                loss, tokens_per_s, moving = figures
                self._print(
                    f"step {step} of {self._num_steps}: loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {moving:.0%} in "
                    f"dispatch and combine"
                )
        elif stage != self._shown:
            self._print(stage)
        self._shown = stage

    def _print(self, what: str) -> None:
        self._console.print(f"{what}; about {_seconds(self._estimate.left_s())} left", highlight=False, soft_wrap=True)


def _seconds(seconds: float) -> str:
    """A guess is not shown to the second.

    >>> [_seconds(value) for value in (3.2, 47.1, 130.0)]
    ['4 s', '50 s', '2 min 10 s']
    """
    if seconds < 10:
        return f"{math.ceil(seconds)} s"
    tens = 10 * math.ceil(seconds / 10)
    return f"{tens} s" if tens < 120 else f"{tens // 60} min {tens % 60} s"


def print_outcome(outcome: Outcome, paths: Sequence[tuple[str, Path]]) -> None:
    """What there is to show, on stdout, and where the files are."""
    console = console_of(_WIDTH)

    def line(text: str = "", style: str = "") -> None:
        console.print(text, highlight=False, markup=False, style=style, soft_wrap=True)

    line(outcome.title, "bold")
    line(
        f"Trained on {outcome.num_files} files of Python's standard library, {outcome.recipe.steps} steps in "
        f"{outcome.train_s:.0f} s: loss {outcome.losses[0]:.2f} → {outcome.last_loss:.2f} nats per byte,"
    )
    line(
        f"{outcome.held_out_loss:.2f} on held-out text ({outcome.bits_per_byte:.2f} bits per byte); "
        f"{outcome.tokens_per_s:,.0f} tokens/s, {outcome.moving_share:.0%} of the time in dispatch and combine."
    )
    print_table(console, _agreement(outcome.compared))
    line(
        f"The losses agree within {outcome.largest_difference:.1e} (at most {TOLERANCE:.0e} is allowed), and all "
        f"{outcome.num_written} bytes"
    )
    line(f"of {outcome.num_sequences} generated sequences are those of the one process. One of them:")
    sample = outcome.samples[0]
    line()
    console.print(Text.assemble((sample.prompt, "bold"), (sample.continuation.rstrip(), "cyan")), soft_wrap=True)
    line()
    for what, path in paths:
        line(f"{what:8}{path}")
    line(outcome.measured_on, "dim")


def _agreement(compared: Sequence[Compared]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "loss, crossdock", "loss, one process", "relative difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in compared:
        table.add_row(str(pair.step), f"{pair.loss:.7f}", f"{pair.plain_loss:.7f}", f"{pair.relative:.1e}")
    return table
