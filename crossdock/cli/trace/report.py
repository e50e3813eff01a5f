"""The figures in a terminal and as a page. Needs rich, plotly and jinja2 (``crossdock[cli]``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from crossdock.cli import page
from crossdock.cli.page import Card, Chart, as_json
from crossdock.cli.terminal import print_table, without_trailing_blanks
from crossdock.cli.trace.charts import expert_chart, link_chart, time_chart, wait_chart
from crossdock.cli.trace.figures import REASONS, REST, ROWS, WORDS_OF_COMBINE, WORDS_OF_DISPATCH, Figures
from crossdock.version import __version__

_WIDTH = 110
"""Columns where the output is no terminal."""
_MOST_RANKS = 12
"""Whose waits for each other are printed as a matrix."""
_MOST_FAILURES = 4


def print_figures(figures: Figures, files: Sequence[tuple[str, Path]]) -> None:
    """What matters, on stdout, and where the files are."""
    with without_trailing_blanks(_WIDTH) as console:
        console.print(Text(title(figures), style="bold"))
        print_table(console, _table([HEADINGS, *rows(figures)]))
        if len(figures.ranks) <= _MOST_RANKS and figures.waits.any():
            print_table(console, _table(matrix(figures)))
        if hops := by_hop(figures):
            print_table(console, _table(hops))
        for line in lines(figures):
            console.print(Text(line))
        console.print()
        for name, path in files:
            console.print(Text(f"{name:8}{path}"), soft_wrap=True)


def render(figures: Figures, source: str) -> str:
    """The page."""
    return page.render(
        "trace/page.html.j2",
        cards=_cards(figures),
        charts=_charts(figures),
        measured_on=f"Made from {source} by crossdock {__version__}.",
        title=title(figures),
        headings=HEADINGS,
        hops=by_hop(figures),
        rows=rows(figures),
        lines=lines(figures),
    )


HEADINGS = ("rank", "in calls", "it waits", "others wait", *REASONS[:3], "share", "its rows / mean")


def rows(figures: Figures) -> list[tuple[str, ...]]:
    """A line for each rank, below ``HEADINGS``: seconds of its own, and those that others have waited for it."""
    all_s = max(float(figures.waits.sum()), 1e-12)
    return [
        (
            str(rank),
            seconds(figures.in_calls_s[i]),
            seconds(figures.waits[i].sum()),
            seconds(figures.charged_s[i]),
            *(seconds(figures.waited_s[reason][:, i].sum()) for reason in REASONS[:3]),
            f"{figures.charged_s[i] / all_s:.0%}",
            f"{figures.rank_rows[i]:.2f}" if figures.rank_rows.size else "",
        )
        for i, rank in enumerate(figures.ranks)
    ]


def matrix(figures: Figures) -> list[tuple[str, ...]]:
    """Who waited for whom, headings first."""
    head = ("waited", *(f"for {rank}" for rank in figures.ranks))
    own = [[seconds(value) for value in of_rank] for of_rank in figures.waits]
    return [head, *((f"rank {rank}", *values) for rank, values in zip(figures.ranks, own, strict=True))]


def by_hop(figures: Figures) -> list[tuple[str, ...]]:
    """Over several nodes, how long each rank missed others over each axis, and whom most; headings first."""
    if not figures.hops:
        return []
    cells = [("rank", *(text for name in figures.hops for text in (f"waits over {name}", "most for")))]
    for i, rank in enumerate(figures.ranks):
        of_rank = [hop.waited_s[i] for hop in figures.hops.values()]
        most = [(seconds(own.sum()), f"rank {figures.ranks[own.argmax()]}" if own.any() else "") for own in of_rank]
        cells.append((str(rank), *(text for pair in most for text in pair)))
    return cells


def title(figures: Figures) -> str:
    """The run in a line."""
    num_ranks, lasted = len(figures.ranks), float(figures.lasted_s.max())
    return (
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {figures.num_calls:,} calls in {seconds(lasted)}: "
        f"{figures.calls_share:.0%} of the time in calls, {figures.waiting_share:.0%} waiting for peers"
    )


def lines(figures: Figures) -> list[str]:
    """What the figures mean."""
    said = [_of_rank(figures), *(_of_link(figures, hop) for hop in figures.hops or (None,)), _of_expert(figures)]
    if math.isinf(figures.clocks_within_s):
        said.append(
            "Clocks of several machines were put on one by their clocks on the wall alone: nobody knows how well."
        )
    elif figures.clocks_within_s:
        said.append(
            f"Clocks of several machines were put on one by what ranks told each other, to within "
            f"{seconds(figures.clocks_within_s)}."
        )
    if figures.on_device:
        said.append(
            "Kernels waited: what for is not known, and a wait for several ranks at once is charged to each of them."
        )
    said += [
        f"Rank {failure.rank} gave up after {failure.at_s:.3f} s: {failure.text}"
        for failure in figures.failures[:_MOST_FAILURES]
    ]
    if len(figures.failures) > _MOST_FAILURES:
        said.append(f"{len(figures.failures) - _MOST_FAILURES} more failures are in the timeline.")
    return [line for line in said if line]


def _of_rank(figures: Figures) -> str:
    if (late := figures.slow_rank) is None:
        return "Slow rank: none stands out."
    rank, charged = figures.ranks[late], float(figures.charged_s[late])
    share = charged / float(figures.waits.sum())
    by_reason = {reason: float(figures.waited_s[reason][:, late].sum()) for reason in REASONS}
    reason = max(by_reason, key=lambda reason: by_reason[reason])
    why = {
        WORDS_OF_DISPATCH: "its program came late to dispatches",
        WORDS_OF_COMBINE: f"it came late to combines, which is the time of its experts{_load_of(figures, late)}",
        ROWS: "its rows came late: it writes slowly, or has much to write",
        REST: "",
    }[reason]
    tail = f"; {by_reason[reason] / charged:.0%} of that because {why}" if why else ""
    missed = [f"{seconds(hop.waited_s[:, late].sum())} over {name}" for name, hop in figures.hops.items()]
    over = f" Its peers missed it {' and '.join(missed)}; the others waited for these." if missed else ""
    return f"Slow rank: {rank}. Others waited {seconds(charged)} for it, {share:.0%} of all waiting{tail}.{over}"


def _load_of(figures: Figures, late: int) -> str:
    return f" ({figures.rank_rows[late]:.2f} times the mean rank's rows)" if figures.rank_rows.size else ""


def _of_link(figures: Figures, hop: str | None) -> str:
    over = "" if hop is None else f" over {hop}"
    if (link := figures.slowest_link(hop)) is None:
        return f"Slow link{over}: not known; rows are moved by devices, or few at a time."
    src, dst = (figures.ranks[i] for i in link)
    rate, median = figures.rates[link] / 1e9, float(np.nanmedian(figures.rates_over(hop))) / 1e9
    if figures.is_link_slow(hop):
        return (
            f"Slow link{over}: from rank {src} to rank {dst}, {rate:.2f} GB/s; the median link has {median:.2f} GB/s."
        )
    return (
        f"Slow link{over}: none stands out; the slowest, {src} to {dst}, has {rate:.2f} GB/s, the median "
        f"{median:.2f} GB/s."
    )


def _of_expert(figures: Figures) -> str:
    if not figures.expert_rows.sum():
        return ""
    if (hot := figures.hot_expert) is None:
        most = int(figures.expert_rows.argmax())
        times = figures.expert_rows[most] / figures.expert_rows.mean()
        return f"Hot expert: none stands out; expert {most} has most rows, {times:.2f} times the mean."
    share, times = (
        figures.expert_rows[hot] / figures.expert_rows.sum(),
        figures.expert_rows[hot] / figures.expert_rows.mean(),
    )
    where = ""
    if (rank := figures.expert_rank[hot]) is not None:
        times_rank = figures.rank_rows[figures.ranks.index(rank)]
        where = f", on rank {rank}, which has {times_rank:.2f} times the mean rank's rows"
    return f"Hot expert: {hot}, with {share:.0%} of all rows, {times:.2f} times the mean{where}."


def seconds(value: float) -> str:
    """A time, short.

    >>> [seconds(value) for value in (0.0, 2.6e-6, 0.01234, 3.21)]
    ['0', '3 us', '12.3 ms', '3.21 s']
    """
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.0f} us" if value >= 5e-7 else "0"


def _table(cells: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(cells[0]):
        table.add_column(heading, justify="right" if i else "left")
    for row in cells[1:]:
        table.add_row(*row)
    return table


def _cards(figures: Figures) -> list[Card]:
    late, hot, link = figures.slow_rank, figures.hot_expert, figures.slowest_link()
    return [
        Card(f"{figures.waiting_share:.0%}", "of the ranks' time waiting for peers"),
        Card(f"{figures.calls_share:.0%}", "in calls, waiting included"),
        Card("none" if late is None else f"rank {figures.ranks[late]}", "that others wait for"),
        Card("none" if hot is None else f"expert {hot}", "with far more rows than others"),
        Card("?" if link is None else f"{figures.rates[link] / 1e9:.2f} GB/s", "of the slowest link"),
        Card(f"{len(figures.failures)}", "failures"),
    ]


def _charts(figures: Figures) -> list[Chart]:
    charts = [
        Chart(
            "waits",
            "Who waited for whom",
            "Milliseconds that each rank has waited for each. A wait for several is charged to the last of them.",
            as_json(wait_chart(figures)),
        ),
        Chart(
            "time",
            "Where the time went",
            "Seconds of each rank: waiting for peers, the rest of its calls, and outside of them.",
            as_json(time_chart(figures)),
        ),
    ]
    if figures.expert_rows.sum():
        charts.append(
            Chart(
                "experts",
                "Load of experts",
                "Rows that came to each expert. The dotted line is a fair share.",
                as_json(expert_chart(figures)),
            )
        )
    if figures.slowest_link() is not None:
        charts.append(
            Chart(
                "links",
                "Links",
                "GB/s from rank to rank: bytes of rows over the time in which they were written.",
                as_json(link_chart(figures)),
            )
        )
    return charts
