"""The three charts of the page, as plotly figures that fit a phone. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from crossdock.cli.load.figures import Figures
from crossdock.cli.page.charts import (
    BLUE,
    GREY,
    INK,
    LESS_OR_MORE,
    MAX_COLUMNS,
    MAX_LABELLED,
    ORANGE,
    SKY,
    colour_bar,
    layout,
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
    figure = go.Figure(layout=layout(height=max(340, 90 + 12 * num_ranks)))
    figure.add_heatmap(
        z=np.round(columns, 3).tolist(),
        x=[start + 1 for start in starts],
        hovertemplate="rank %{y}, step %{x}: %{z:.2f}<extra></extra>",
        zmin=0,
        zmax=2,
        colorscale=LESS_OR_MORE,
        colorbar=colour_bar("load, 1 = fair share", [0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2+"]),
    )
    figure.update_xaxes(title="step", showgrid=False)
    figure.update_yaxes(title="rank", autorange="reversed", showgrid=False, ticks="")
    return figure


def link_chart(figures: Figures) -> go.Figure:
    """MB of a step's dispatch from each rank to each other one."""
    megabytes = figures.link_bytes / 1e6
    is_small = len(megabytes) <= MAX_LABELLED
    figure = go.Figure(layout=layout(height=max(340, 60 + 12 * len(megabytes))))
    figure.add_heatmap(
        z=np.round(megabytes, 4).tolist(),
        texttemplate="%{z:.2f}" if is_small else None,
        hovertemplate="from rank %{y} to rank %{x}: %{z:.3f} MB<extra></extra>",
        zmin=0,
        zmax=max(float(megabytes.max()), 1e-9),
        colorscale=[[0.0, "#ffffff"], [1.0, SKY]],
        colorbar=None if is_small else colour_bar("MB per step"),
        showscale=not is_small,
        xgap=2,
        ygap=2,
    )
    ticks = {"dtick": 1 if is_small else 8, "showgrid": False, "ticks": ""}
    figure.update_xaxes(title="to rank", **ticks)
    figure.update_yaxes(title="from rank", autorange="reversed", **ticks)
    return figure


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
    figure.update_xaxes(title="largest rank, 1 = all equal", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure
