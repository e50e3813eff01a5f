"""The four charts of the page, as plotly figures that fit a phone. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from crossdock.cli.demo.outcome import Outcome, spent
from crossdock.cli.page.charts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MAX_COLUMNS,
    ORANGE,
    PINK,
    SKY,
    layout,
    load_map,
    rank_matrix,
)

PARTS = {
    "the model": BLUE,
    "dispatch": ORANGE,
    "combine": PINK,
    "waiting for peers": GREY,
    "all-reduce": GREEN,
    "optimizer": SKY,
    "the rest": "#e3e6ea",
}


def loss_chart(outcome: Outcome) -> go.Figure:
    """Loss by step; the one-process run's first steps on top of it."""
    steps = list(range(1, len(outcome.losses) + 1))
    figure = go.Figure(layout=layout(height=340))
    figure.add_scatter(
        x=steps, y=list(outcome.losses), name="crossdock", mode="lines", line={"color": BLUE, "width": 1.5}
    )
    figure.add_scatter(
        x=[pair.step for pair in outcome.compared],
        y=[pair.plain_loss for pair in outcome.compared],
        name="one process",
        mode="markers",
        marker={"color": ORANGE, "size": 7, "symbol": "circle-open", "line": {"width": 2}},
    )
    figure.add_scatter(
        x=[steps[0], steps[-1]],
        y=[outcome.held_out_loss] * 2,
        name="held-out text, at the end",
        mode="lines",
        line={"color": GREEN, "width": 2, "dash": "dot"},
    )
    figure.update_xaxes(title="step", dtick=1 if len(steps) < MAX_COLUMNS // 10 else None)
    figure.update_yaxes(title="nats per byte")
    return figure


def load_chart(outcome: Outcome) -> go.Figure:
    """Load of every expert by step, layer above layer."""
    load = outcome.load
    num_steps, num_layers, num_experts = load.shape
    per_column = -(-num_steps // MAX_COLUMNS)
    columns = [load[first : first + per_column].mean(axis=0) for first in range(0, num_steps, per_column)]
    rows = np.stack(columns, axis=-1).reshape(num_layers * num_experts, -1)
    figure = load_map(
        rows,
        range(0, num_steps, per_column),
        height=90 + 5 * len(rows) if len(rows) > 50 else 340,
        customdata=_names(num_layers, num_experts, len(columns)),
        hovertemplate="%{customdata}, step %{x}: %{z:.2f}<extra></extra>",
    )
    for layer in range(1, num_layers):
        figure.add_hline(y=layer * num_experts - 0.5, line={"color": INK, "width": 1})
    figure.update_xaxes(title="step", showgrid=False, dtick=1 if num_steps < MAX_COLUMNS // 10 else None)
    middles = [layer * num_experts + (num_experts - 1) / 2 for layer in range(num_layers)]
    names = [f"layer {layer}" for layer in range(num_layers)]
    figure.update_yaxes(tickvals=middles, ticktext=names, tickangle=-90, autorange="reversed", showgrid=False, ticks="")
    return figure


def traffic_chart(outcome: Outcome) -> go.Figure:
    """What each rank dispatched to each rank."""
    return rank_matrix(outcome.traffic, height=340, tick=4)


def time_chart(outcome: Outcome) -> go.Figure:
    """Each rank's training time, part by part."""
    times = [spent(spans) for spans in outcome.spans]
    figure = go.Figure(layout=layout(height=70 + 40 * len(times)))
    for name, colour in PARTS.items():
        figure.add_bar(
            x=[round(time[name], 3) for time in times],
            y=[f"rank {rank}" for rank in range(len(times))],
            name=name,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{y}, " + name + ": %{x:.1f} s<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.3, showlegend=False)
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure


def _names(num_layers: int, num_experts: int, num_columns: int) -> npt.NDArray[np.str_]:
    names = [f"layer {layer}, expert {expert}" for layer in range(num_layers) for expert in range(num_experts)]
    return np.repeat(np.array(names)[:, None], num_columns, axis=1)
