"""The plots of the page, as plotly figures that fit a phone. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from crossdock.cli.page.charts import BLUE, GREEN, ORANGE, PINK, layout, log_ticks
from crossdock.cli.size.figures import Size

_COLOURS = (BLUE, ORANGE, GREEN)


def time_chart(sizes: Sequence[Size]) -> go.Figure:
    """Dispatch and combine by ranks, a line for each routing; both axes are logarithmic."""
    figure = go.Figure(layout=layout(height=380))
    for colour, (picks, of_routing) in zip(_COLOURS, _by_routing(sizes), strict=False):
        ranks = [size.topology.num_ranks for size in of_routing]
        for op, dash in (("dispatch", "solid"), ("combine", "dot")):
            times = [round(getattr(size, op).seconds * 1e6, 1) for size in of_routing]
            bounds = [getattr(size, op).bottleneck for size in of_routing]
            figure.add_scatter(
                x=ranks, y=times, customdata=bounds, name=f"{op}, {picks}", mode="lines+markers",
                line={"color": colour, "dash": dash},
                hovertemplate="%{x} ranks: %{y:,.0f} us, %{customdata}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="ranks", type="log", tickvals=sorted({size.topology.num_ranks for size in sizes}))
    microseconds = [getattr(size, op).seconds * 1e6 for size in sizes for op in ("dispatch", "combine")]
    figure.update_yaxes(title="us", type="log", tickvals=log_ticks(microseconds), tickformat=",")
    return figure


def hop_chart(sizes: Sequence[Size]) -> go.Figure:
    """Microseconds of each hop of a dispatch, and of what is beside bytes."""
    names = [f"{size.topology.num_ranks}, {size.picks}" for size in sizes]
    figure = go.Figure(layout=layout(height=140 + 44 * len(names)))
    for what, colour, values in (
        ("over the rail", BLUE, [_seconds(size, "scale_out") for size in sizes]),
        ("within the node", ORANGE, [_seconds(size, "scale_up") for size in sizes]),
        ("beside bytes", PINK, [size.dispatch.fixed_s for size in sizes]),
    ):
        figure.add_bar(
            x=[round(value * 1e6, 1) for value in values], y=names, name=what, orientation="h",
            marker={"color": colour}, hovertemplate="%{y}: %{x:,.0f} us<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="us", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure


def _by_routing(sizes: Sequence[Size]) -> Iterator[tuple[str, list[Size]]]:
    """Lines: all uniform sizes, all limited ones, all recorded ones."""
    kinds: dict[str, list[Size]] = {}
    for size in sizes:
        kind = size.picks if size.picks in ("uniform", "recorded") else f"{size.picks.split()[0]} groups"
        kinds.setdefault(kind, []).append(size)
    yield from kinds.items()


def _seconds(size: Size, name: str) -> float:
    hop = size.dispatch.of(name)
    return 0.0 if hop is None else hop.seconds
