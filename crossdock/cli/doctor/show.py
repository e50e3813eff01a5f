"""A report in a terminal: as tables where rich is installed, else as plain lines, for a doctor must speak anywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from crossdock.cli.doctor.facts import Fact, Links, Report, RoundTrip

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_WIDTH = 120
"""Columns where the output is no terminal."""
_MARKS = {"ok": "ok", "missing": "missing", "note": "-"}
_STYLES = {"ok": "green", "missing": "bold red", "note": "dim"}


def print_report(report: Report) -> None:
    """All of it on stdout."""
    if importlib.util.find_spec("rich") is None:
        print("\n".join(plain_lines(report)))
    else:
        _print_tables(report)


def plain_lines(report: Report) -> list[str]:
    r"""Without rich.

    >>> from crossdock.cli.doctor.facts import Section
    >>> fact = Fact(name="shm", found="64 MiB", needed="84 MiB", problem="give it more")
    >>> print("\n".join(plain_lines(Report(sections=(Section(title="Host", facts=(fact,)),)))))
    Host
      missing  shm: 64 MiB; needed: 84 MiB
               give it more
    """
    lines = []
    for section in report.sections:
        lines.append(section.title)
        for fact in section.facts:
            needed = f"; needed: {fact.needed}" if fact.needed else ""
            lines.append(f"  {_MARKS[fact.state]:7}  {fact.name}: {fact.found}{needed}")
            if fact.problem is not None and not fact.note:
                lines.append(f"{'':11}{fact.problem}")
    lines += [_of_rank(report, i) for i in range(len(report.ranks))]
    lines += report.disagreements
    for links in _all_links(report):
        lines += [links.transport, *_plain_matrix(links.what_latency, links.latency_us)]
        lines += _plain_matrix(links.what_rate, links.gb_per_s)
    lines += map(_said_of, report.round_trips)
    return lines


def _print_tables(report: Report) -> None:
    from rich.text import Text  # noqa: PLC0415 - an extra, which this command does without

    from crossdock.cli.terminal import console_of  # noqa: PLC0415

    console = console_of(_WIDTH)
    for section in filter(lambda section: section.facts, report.sections):
        rows = [
            (
                Text(_MARKS[fact.state], style=_STYLES[fact.state]),
                Text(fact.name),
                Text(fact.found),
                Text(_needed(fact)),
            )
            for fact in section.facts
        ]
        console.print(
            Text(section.title, style="bold"), _table(("", "", "found", "needed, or what for"), rows), sep="\n"
        )
    for line in (*(_of_rank(report, i) for i in range(len(report.ranks))), *report.disagreements):
        console.print(Text(line))
    for links in _all_links(report):
        for what, matrix in ((links.what_latency, links.latency_us), (links.what_rate, links.gb_per_s)):
            if matrix:
                cells = [(Text(str(i)), *map(Text, map(_figure, row))) for i, row in enumerate(matrix)]
                table = _table(("from / to", *map(str, range(len(matrix)))), cells)
                console.print(Text(f"{links.transport}: {what}", style="bold"), table, sep="\n")
    for trip in report.round_trips:
        style = _STYLES["ok" if trip.problem is None else "missing"]
        console.print(Text(_said_of(trip), style=style))


def _table(headings: Sequence[str], rows: Iterable[Sequence[Text]]) -> Table:
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _said_of(trip: RoundTrip) -> str:
    return f"{trip.transport}: {trip.problem or 'every value came back'}"


def _needed(fact: Fact) -> str:
    return "\n".join(filter(None, (fact.needed, None if fact.note else fact.problem)))


def _of_rank(report: Report, index: int) -> str:
    """A rank's place; its namespaces where they are not those of rank 0."""
    facts, first = report.ranks[index], report.ranks[0]
    others = [name for name, inode in facts.namespaces.items() if first.namespaces.get(name) != inode]
    apart = f", in other namespaces than rank 0: {', '.join(others)}" if others else ""
    return f"rank {facts.rank}: {facts.host}, {facts.device}{apart}"


def _all_links(report: Report) -> list[Links]:
    return [*report.links, *(trip.links for trip in report.round_trips if trip.links is not None)]


def _plain_matrix(what: str, matrix: list[list[float | None]]) -> list[str]:
    if not matrix:
        return []
    return [f"  {what}", *("  " + " ".join(f"{_figure(value):>8}" for value in row) for row in matrix)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
