"""Sizes in a terminal and as a page. Needs rich, plotly and jinja2 (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from crossdock.cli import page
from crossdock.cli.page import Card, Chart, as_json
from crossdock.cli.size.charts import hop_chart, time_chart
from crossdock.cli.size.figures import Question, Size
from crossdock.cli.terminal import print_table, without_trailing_blanks
from crossdock.cost import METHODS, Prediction
from crossdock.version import __version__

_WIDTH = 124
"""Columns where the output is no terminal."""
HEADINGS = ("ranks", "picks", "nodes", "NIC MB", "link MB", "dispatch", "combine", "one hop", "SMs", "chunks", "GiB")


def print_sizes(question: Question, sizes: Sequence[Size], path: Path | None) -> None:
    """The table on stdout, and where the page is."""
    with without_trailing_blanks(_WIDTH) as console:
        console.print(Text(str(question), style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "picks" else "right", no_wrap=True)
        for size in sizes:
            table.add_row(*cells(size))
        print_table(console, table)
        for line in notes(question):
            console.print(Text(line, style="dim"))
        if path is not None:
            console.print(Text(f"page    {path}"), soft_wrap=True)


def cells(size: Size) -> tuple[str, ...]:
    """A row of the table."""
    return (
        f"{size.topology.num_ranks}",
        size.picks,
        f"{size.rows.nodes:.2f}",
        _megabytes(size.dispatch, "scale_out"),
        _megabytes(size.dispatch, "scale_up"),
        _time(size.dispatch),
        _time(size.combine),
        f"{size.one_hop.seconds / size.dispatch.seconds:.2f}x",
        "/".join(map(str, dict.fromkeys(size.sms))),
        "" if size.chunks is None else f"{size.chunks.number} x {size.chunks.num_bytes / 2**20:,.1f} MiB",
        f"{size.memory_bytes / 2**30:.1f}",
    )


def notes(question: Question) -> list[str]:
    """What the headings do not say."""
    method = METHODS[question.method]
    beside_us = (method.fixed_s + method.rail_s) * 1e6
    words = (
        "nodes: that a token visits. NIC, link: MB of the busiest rank in a dispatch, each way. one hop: a dispatch "
        "whose rows go to each rank at once, in units of this one. SMs: to store, to load."
    )
    assumed = (
        f"Predicted, not measured: {method.nic_share:.0%} of the NIC's rate, {method.link_share:.0%} of the link's, "
        f"{beside_us:.0f} us between nodes beside bytes. GiB: of a rank, with room for {question.room:g} mean loads."
    )
    return [words, assumed]


def render(question: Question, sizes: Sequence[Size]) -> str:
    """The page."""
    return page.render(
        "size/page.html.j2",
        cards=[_card(size) for size in sizes[-4:]],
        charts=[
            Chart("time", "Time of a call", "Predicted microseconds by ranks.", as_json(time_chart(sizes))),
            Chart(
                "hops",
                "Hops of a dispatch",
                "Each hop alone. They overlap, so that the longer one counts.",
                as_json(hop_chart(sizes)),
            ),
        ],
        measured_on=f"Predicted by crossdock {__version__}; nothing was run.",
        title=str(question),
        headings=HEADINGS,
        rows=[cells(size) for size in sizes],
        notes=notes(question),
    )


def _card(size: Size) -> Card:
    what = f"us, dispatch of {size.topology.num_ranks} ranks, {size.picks}; bound by {size.dispatch.bottleneck}"
    return Card(f"{size.dispatch.seconds * 1e6:,.0f}", what)


def _time(call: Prediction) -> str:
    return f"{call.seconds * 1e6:,.0f} us {call.bottleneck}"


def _megabytes(call: Prediction, name: str) -> str:
    hop = call.of(name)
    return "" if hop is None else f"{hop.num_bytes / 1e6:,.1f}"
