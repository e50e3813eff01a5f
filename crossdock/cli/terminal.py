"""What commands print to: the terminal as wide as it is, or text of a fixed width. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


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
