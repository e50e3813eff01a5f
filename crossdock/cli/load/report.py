"""The figures of a recording as a page and in a terminal. Needs rich, plotly and jinja2 (``crossdock[cli]``)."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from crossdock.cli import page
from crossdock.cli.load.charts import expert_chart, link_chart, placement_chart, rank_chart
from crossdock.cli.load.figures import Figures, Imbalance
from crossdock.cli.page import Card, Chart, as_json
from crossdock.cli.terminal import print_table, without_trailing_blanks
from crossdock.cost import TWO_HOPS
from crossdock.spec import Topology
from crossdock.version import __version__

_WIDTH = 110
"""Columns where the output is no terminal."""


def render(figures: Figures, source: str) -> str:
    """The page."""
    return page.render(
        "load/page.html.j2",
        cards=_cards(figures),
        charts=_charts(figures),
        measured_on=f"Made from {source} by crossdock {__version__}.",
        title=title(figures),
        figures=figures,
    )


def print_figures(figures: Figures, path: Path | None) -> None:
    """What matters, on stdout, and where the page is."""
    with without_trailing_blanks(_WIDTH) as console:
        console.print(Text(title(figures), style="bold"))
        print_table(console, _loads(figures))
        for line in lines(figures):
            console.print(Text(line))
        print_table(console, _placements(figures))
        console.print(Text(fitted(figures), style="dim"))
        if path is not None:
            console.print(Text(f"page    {path}"), soft_wrap=True)


def _loads(figures: Figures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("largest load over the mean", "mean of the steps", "worst step", "all steps together"):
        table.add_column(heading, justify="left" if heading.startswith("largest") else "right")
    for name, imbalance in (("of experts", figures.experts), ("of ranks", figures.ranks)):
        table.add_row(name, *_three(imbalance))
    return table


def _placements(figures: Figures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("placement", "experts", "ranks, mean", "ranks, worst", "rows per token", "busiest link"):
        table.add_column(heading, justify="left" if heading == "placement" else "right")
    for candidate in figures.candidates:
        table.add_row(
            candidate.name,
            str(candidate.num_physical),
            f"{candidate.ranks.mean:.3f}",
            f"{candidate.ranks.worst:.3f}",
            f"{candidate.rows_per_token:.2f}",
            f"{candidate.busiest_bytes / 1e6:.2f} MB",
        )
    return table


def title(figures: Figures) -> str:
    """The configuration in a line."""
    steps, tokens, topk = figures.recording.picks.shape
    spec = figures.spec
    return (
        f"{steps} {'step' if steps == 1 else 'steps'} of {tokens:,} tokens, top-{topk} of {spec.num_experts} experts, "
        f"{figures.recording.num_ranks} ranks; rows of {spec.row_bytes():,} bytes ({spec.wire}, hidden {spec.hidden})"
    )


def lines(figures: Figures) -> list[str]:
    """What the tables do not say."""
    bytes_of = figures.link_bytes
    rank = int(bytes_of.sum(axis=0).argmax())
    bandwidth = Topology(num_ranks=figures.recording.num_ranks).link_bandwidth
    calls = ", ".join(f"a {call.op} {call.seconds * 1e6:.0f} us" for call in (figures.dispatch, figures.combine))
    capacities = ", ".join(f"{layout}(capacity={rows})" for layout, rows in figures.capacities.items())
    visits = (
        f"A token visits {figures.traffic.rows_per_token:.2f} ranks; equally likely picks would visit "
        f"{figures.uniform_rows_per_token:.2f}."
    )
    link = (
        f"Rank {rank} gets most in a step's dispatch: {bytes_of[:, rank].sum() / 1e6:.2f} MB, the mean of the steps. "
        f"The busiest link takes {figures.busiest_s * 1e6:.0f} us at {TWO_HOPS.link_share:.0%} of "
        f"{bandwidth / 1e9:.0f} GB/s."
    )
    predicted = f"Predicted, by crossdock size's model: {calls}; bound by {_bounds(figures)}."
    said = [visits, link, predicted, f"The fullest step fits into {capacities}."]
    if figures.missing_share:
        said.append(f"{figures.missing_share:.1%} of the picks are -1.")
    return said


def _bounds(figures: Figures) -> str:
    names = {"fixed": "what a call costs beside its bytes"}
    found = dict.fromkeys(call.bottleneck for call in (figures.dispatch, figures.combine))
    return " and ".join(names.get(name, name) for name in found)


def fitted(figures: Figures) -> str:
    """What the placements were made from, and measured on."""
    if figures.fitted_steps == figures.measured_steps == len(figures.recording.picks):
        return "Placements are made from this one step and measured on it: a recording of several steps tells more."
    return (
        f"Placements are made from the load of the first {figures.fitted_steps} steps and measured on the other "
        f"{figures.measured_steps}."
    )


def _three(imbalance: Imbalance) -> tuple[str, str, str]:
    return f"{imbalance.mean:.3f}", f"{imbalance.worst:.3f}", f"{imbalance.overall:.3f}"


def _cards(figures: Figures) -> list[Card]:
    best = min(figures.candidates, key=lambda candidate: candidate.ranks.mean)
    return [
        Card(f"{figures.ranks.mean:.2f}", "largest rank's load over the mean, mean of the steps"),
        Card(f"{figures.ranks.worst:.2f}", "in the worst step"),
        Card(f"{figures.experts.overall:.2f}", "largest expert's load over the mean, all steps together"),
        Card(f"{figures.traffic.rows_per_token:.2f}", f"ranks per token; uniform {figures.uniform_rows_per_token:.2f}"),
        Card(f"{figures.busiest_s * 1e6:,.0f} us", "of the busiest link in a dispatch"),
        Card(f"{best.ranks.mean:.2f}", f"with the best placement: {best.name}"),
    ]


def _charts(figures: Figures) -> list[Chart]:
    return [
        Chart(
            "experts",
            "Load of experts",
            "Picks of each expert over all steps. The dotted line is a fair share; the five heaviest are orange.",
            as_json(expert_chart(figures)),
        ),
        Chart(
            "ranks",
            "Load of ranks",
            "Rows that each rank's experts compute. In every step all ranks wait for the one that has most.",
            as_json(rank_chart(figures)),
        ),
        Chart(
            "links",
            "Bytes per link",
            "MB of a step's dispatch from rank to rank, one row per token and rank, the mean of the steps.",
            as_json(link_chart(figures)),
        ),
        Chart("placements", "Other placements", fitted(figures), as_json(placement_chart(figures))),
    ]
