"""The three charts of the page, as plotly figures that fit a phone. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from crossdock.cli.load.figures import Figures
from crossdock.cli.page.charts import (
    BLUE,
    GREY,
    INK,
    MAX_COLUMNS,
    MAX_LABELLED,
    ORANGE,
    layout,
    load_map,
    rank_matrix,
)

_NUM_NAMED = 5
"""Experts with the largest load, which are named."""


def expert_chart(figures: Figures) -> go.Figure:
    """Picks of each expert over all steps, the heaviest first; 1 is a fair share."""
    load = figures.traffic.expert_picks.sum(axis=0)
    order = np.argsort(-load, kind="stable")
    relative = load[order] / max(load.mean(), 1e-9)
    figure = go.Figure(layout=layout(height=340))
    figure.add_bar(
        x=list(range(1, len(order) + 1)),
        y=np.round(relative, 3).tolist(),
        customdata=order.tolist(),
        hovertemplate="expert %{customdata}: %{y:.2f}<extra></extra>",
        marker={"color": [ORANGE] * _NUM_NAMED + [BLUE] * max(0, len(order) - _NUM_NAMED)},
    )
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(bargap=0.05)
    figure.update_xaxes(title="experts, the heaviest first", showgrid=False)
    figure.update_yaxes(title="load, 1 = fair share")
    return figure


def rank_chart(figures: Figures) -> go.Figure:
    """Load of every rank by step; one step is bars."""
    load = figures.traffic.rank_picks
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    num_steps, num_ranks = relative.shape
    if num_steps == 1:
        figure = go.Figure(layout=layout(height=340))
        figure.add_bar(x=list(range(num_ranks)), y=np.round(relative[0], 3).tolist(), marker={"color": BLUE})
        figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
        figure.update_xaxes(title="rank", dtick=1 if num_ranks <= 2 * MAX_LABELLED else None)
        figure.update_yaxes(title="load, 1 = fair share")
        return figure
    per_column = -(-num_steps // MAX_COLUMNS)
    starts = range(0, num_steps, per_column)
    columns = np.stack([relative[start : start + per_column].mean(axis=0) for start in starts], axis=1)
    hover = "rank %{y}, step %{x}: %{z:.2f}<extra></extra>"
    figure = load_map(columns, starts, height=max(340, 90 + 12 * num_ranks), hovertemplate=hover)
    figure.update_xaxes(title="step", showgrid=False)
    figure.update_yaxes(title="rank", autorange="reversed", showgrid=False, ticks="")
    return figure


def link_chart(figures: Figures) -> go.Figure:
    """MB of a step's dispatch from each rank to each other one."""
    megabytes = figures.link_bytes / 1e6
    return rank_matrix(megabytes, height=max(340, 60 + 12 * len(megabytes)), tick=8)


def placement_chart(figures: Figures) -> go.Figure:
    """Imbalance of ranks with each candidate."""
    names = [candidate.name for candidate in figures.candidates]
    figure = go.Figure(layout=layout(height=120 + 40 * len(names)))
    for what, colour, values in (
        ("mean of the steps", BLUE, [candidate.ranks.mean for candidate in figures.candidates]),
        ("worst step", GREY, [candidate.ranks.worst for candidate in figures.candidates]),
    ):
        figure.add_bar(
            x=np.round(values, 3).tolist(),
            y=names,
            name=what,
            orientation="h",
            marker={"color": colour},
            texttemplate="%{x:.2f}",
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="1 = all ranks equal", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure
