"""What commands print to: the terminal as wide as it is, or text of a fixed width. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000


def console_of(width: int) -> Console:
    """Of stdout.

    Args:
        width: columns where that is no terminal.
    """
    console = Console()
    return console if console.is_terminal else Console(width=width)


@contextmanager
def without_trailing_blanks(width: int) -> Iterator[Console]:
    """A console whose lines are printed to stdout when the block ends."""
    console = console_of(width)
    with console.capture() as said:
        yield console
    print("\n".join(line.rstrip() for line in said.get().splitlines()))


def print_table(console: Console, table: Table) -> None:
    """A table; where the terminal is too narrow for its figures, each row as a list, so that none is cut."""
    if Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).minimum <= console.width:
        console.print(table)
        return
    names = [str(column.header) for column in table.columns]
    width = max(map(len, names))
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print()
        for name, cell in zip(names, cells, strict=True):
            value = cell if isinstance(cell, Text) else console.render_str(str(cell))
            console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value))
    console.print()
