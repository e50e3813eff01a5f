"""The charts of the page, as plotly figures that fit a phone. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from crossdock.cli.page.charts import BLUE, GREY, INK, ORANGE, layout, rank_matrix
from crossdock.cli.trace.figures import Figures


def wait_chart(figures: Figures) -> go.Figure:
    """Milliseconds that each rank has waited for each other one."""
    hover = "rank %{y} waited %{z:.2f} ms for rank %{x}<extra></extra>"
    figure = rank_matrix(figures.waits * 1e3, height=_height(figures), tick=8, unit="ms", hover=hover, colour=ORANGE)
    _name_ranks(figure, figures)
    figure.update_xaxes(title="for rank")
    figure.update_yaxes(title="rank")
    return figure


def link_chart(figures: Figures) -> go.Figure:
    """GB/s from each rank to each other one; 0 where it is not known."""
    hover = "from rank %{y} to rank %{x}: %{z:.2f} GB/s<extra></extra>"
    rates = np.nan_to_num(figures.rates) / 1e9
    figure = rank_matrix(rates, height=_height(figures), tick=8, unit="GB/s", hover=hover)
    _name_ranks(figure, figures)
    return figure


def time_chart(figures: Figures) -> go.Figure:
    """Seconds of each rank."""
    waits = figures.waits.sum(axis=1)
    calls = np.maximum(figures.in_calls_s - waits, 0)
    names = [f"rank {rank}" for rank in figures.ranks]
    figure = go.Figure(layout=layout(height=max(200, 110 + 24 * len(names))))
    for what, colour, values in (
        ("waiting for peers", ORANGE, waits),
        ("the rest of calls", BLUE, calls),
        ("outside of calls", GREY, np.maximum(figures.lasted_s - waits - calls, 0)),
    ):
        figure.add_bar(
            x=np.round(values, 6).tolist(),
            y=names,
            name=what,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{y}: %{x:.3f} s " + what + "<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(title="seconds", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure


def expert_chart(figures: Figures) -> go.Figure:
    """Rows of each expert over the mean."""
    relative = figures.expert_rows / figures.expert_rows.mean()
    hot = figures.hot_expert
    figure = go.Figure(layout=layout(height=340))
    figure.add_bar(
        x=list(range(len(relative))),
        y=np.round(relative, 3).tolist(),
        hovertemplate="expert %{x}: %{y:.2f}<extra></extra>",
        marker={"color": [ORANGE if expert == hot else BLUE for expert in range(len(relative))]},
    )
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(bargap=0.1)
    figure.update_xaxes(title="expert", showgrid=False)
    figure.update_yaxes(title="load, 1 = fair share")
    return figure


def _height(figures: Figures) -> int:
    return max(340, 60 + 12 * len(figures.ranks))


def _name_ranks(figure: go.Figure, figures: Figures) -> None:
    """Where ranks of the trace are not the first ones."""
    names = [str(rank) for rank in figures.ranks]
    if names != [str(i) for i in range(len(names))]:
        places = list(range(len(names)))
        figure.update_xaxes(tickvals=places, ticktext=names)
        figure.update_yaxes(tickvals=places, ticktext=names)
