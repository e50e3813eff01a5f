"""Terminal output: a progress bar, then a table of figures. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crossdock.cli.bench.figures import Figure
from crossdock.cli.bench.outcome import Outcome
from crossdock.cli.terminal import console_of, print_table

_WIDTH = 124
"""Columns of the output if it is no terminal."""


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A transient bar on stderr, as a function ``show(done, total)``. Shows nothing if stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting the ranks", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, description="measuring", completed=done, total=total)

        yield show


def print_outcome(outcome: Outcome) -> None:
    """Prints configuration, figures and notes to stdout."""
    console = console_of(_WIDTH)
    console.print(str(outcome.config), highlight=False, markup=False, style="bold")
    print_table(console, _table(outcome.figures, outcome.baseline))
    if outcome.sweep:
        console.print("By the number of SMs", style="bold")
        print_table(console, _table(outcome.sweep, None))
    for line in outcome.notes():
        console.print(line, highlight=False, markup=False, style="dim")


def _table(figures: Sequence[Figure], baseline: str | None) -> Table:
    """The table of figures; columns for SMs and baseline only if there are any."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op", overflow="fold")  # the only column that wraps
    table.add_column("wire", no_wrap=True)
    columns = [*_COLUMNS]
    if any(figure.num_sms is not None for figure in figures):
        columns.insert(2, ("floor", lambda figure: "" if figure.floor_us is None else _time(figure.floor_us)))
        columns.insert(3, ("host", lambda figure: "" if figure.host_us is None else _time(figure.host_us)))
        columns.insert(0, ("SMs", lambda figure: "" if figure.num_sms is None else str(figure.num_sms)))
    if baseline is not None:
        columns.append((f"vs {baseline.split()[0]}", lambda figure: _times(figure.speedup)))
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(figure.op, figure.wire, *(cell(figure) for _, cell in columns))
    return table


def _time(us: float) -> str:
    if us < 1000:
        return f"{us:.0f} us" if us >= 100 else f"{us:.1f} us"
    return f"{us / 1000:.2f} ms"


def _range(low: float, high: float) -> str:
    """``low`` to ``high``, with one unit if both have the same."""
    first, last = _time(low), _time(high)
    number, unit = first.split()
    return f"{number if last.endswith(f' {unit}') else first} – {last}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}×"


_COLUMNS: tuple[tuple[str, Callable[[Figure], str]], ...] = (
    ("median", lambda figure: _time(figure.median_us)),
    ("p10 – p90", lambda figure: _range(figure.p10_us, figure.p90_us)),
    ("GB/s", lambda figure: f"{figure.gigabytes_per_s:,.2f}"),
    ("of limit", lambda figure: f"{figure.of_limit:.0%}{' (link)' if figure.is_link else ''}"),
)
