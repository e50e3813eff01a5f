"""The demo in a terminal: a progress bar while it trains, then what came of it. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from crossdock.cli.demo.outcome import Outcome
from crossdock.cli.demo.replay import TOLERANCE, Compared

_WIDTH = 100
"""Columns where the output is no terminal."""
_LINES = 10
"""Progress lines where there is no terminal."""

Show = Callable[[int, float, float, float], None]
"""``show(steps done, loss, tokens per second, share of time in dispatch and combine)``."""


@contextmanager
def training_bar(num_steps: int) -> Iterator[Show]:
    """Progress of training on stderr: a bar that goes when the block ends, or some lines where it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *progress: _show_line(num_steps, *progress)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("starting the ranks", total=None, figures="")

        def show(step: int, loss: float, tokens_per_s: float, moving: float) -> None:
            # Short, so that all of it fits into 80 columns.
            figures = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {moving:.0%} dispatch + combine"
            progress.update(task, description="", completed=step, total=num_steps, figures=figures)

        yield show


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Says on stderr what is being done, as long as it is; nothing where that is no terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(what, total=None)
        yield


def print_outcome(outcome: Outcome, paths: Sequence[tuple[str, Path]]) -> None:
    """What there is to show, on stdout, and where the files are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)

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
    console.print(_agreement(outcome.compared))
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


def _show_line(num_steps: int, step: int, loss: float, tokens_per_s: float, moving: float) -> None:
    if step == num_steps or step % max(1, num_steps // _LINES) == 0:
        Console(stderr=True, width=_WIDTH).print(
            f"step {step} of {num_steps}: loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, "
            f"{moving:.0%} in dispatch and combine",
            highlight=False,
        )
