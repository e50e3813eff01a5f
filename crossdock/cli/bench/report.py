"""Figures for the eye: a progress bar while they are measured, then a table. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crossdock.cli.bench.figures import Figure

_WIDTH = 100
"""Columns where the output is no terminal."""


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone when the block ends; gives ``show(done, total)``. Nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting the ranks", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, description="measuring", completed=done, total=total)

        yield show


def print_table(title: str, figures: Sequence[Figure], footer: Sequence[str]) -> None:
    """The figures on stdout, between a line with the configuration and lines that say what they stand on."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("wire")
    for heading in ("median", "p10 – p90", "GB/s", "of limit", "vs gloo"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(*_cells(figure))
    console.print(title, highlight=False, markup=False, style="bold")
    console.print(table)
    for line in footer:
        console.print(line, highlight=False, markup=False, style="dim")


def _cells(figure: Figure) -> tuple[str, ...]:
    return (
        figure.op,
        figure.wire,
        _time(figure.median_us),
        f"{_time(figure.p10_us)} – {_time(figure.p90_us)}",
        f"{figure.gigabytes_per_s:.2f}",
        f"{figure.of_limit:.0%}",
        f"{figure.speedup:.1f}×",
    )


def _time(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.2f} ms"
