"""What charts of all pages share: colours, and a layout that fits a phone. Needs plotly (``crossdock[cli]``).

Colours are of Okabe and Ito's set, which people of all kinds of colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

INK, GRID = "#1f2933", "#e4e7eb"
BLUE, ORANGE, GREEN, SKY, PINK, GREY = "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#b8bfc6"
LESS_OR_MORE = [[0.0, "#b35806"], [0.25, "#f1a340"], [0.5, "#f7f7f7"], [0.75, "#67a9cf"], [1.0, "#053061"]]
"""Orange below the middle, blue above it."""
MAX_COLUMNS = 120
"""Steps are averaged until there are at most so many columns: a phone has some 300 points."""
MAX_LABELLED = 8
"""Ranks whose traffic is also written as figures."""


def layout(height: int) -> go.Layout:
    """Without a margin, and with axes that stay where they are."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        "ticklabelstandoff": 4,
        "title": {"standoff": 8},
    }
    return go.Layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        xaxis=axis,
        yaxis=axis,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"font": {"size": 13}},
    )


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, as far as these values reach: what a logarithmic axis is labelled with.

    >>> log_ticks([700, 6000])
    [1000, 2000, 5000]
    """
    least, most = min(values) / 1.2, max(values) * 1.2
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if least <= (tick := step * 10**decade) <= most]


def colour_bar(title: str, values: list[float] | None = None, names: list[str] | None = None) -> dict[str, Any]:
    """A flat one above the chart, because a phone has no width to spare."""
    bar: dict[str, Any] = {
        "orientation": "h",
        "thickness": 10,
        "outlinewidth": 0,
        "y": 1,
        "yanchor": "bottom",
        "ypad": 4,
    }
    bar["title"] = {"text": title, "side": "top"}
    return bar if values is None else {**bar, "tickvals": values, "ticktext": names}


def rank_matrix(
    values: npt.NDArray[Any],
    *,
    height: int,
    tick: int,
    unit: str = "MB per step",
    hover: str = "from rank %{y} to rank %{x}: %{z:.3f} MB<extra></extra>",
    colour: str = SKY,
) -> go.Figure:
    """Something of each pair of ranks, such as what one sends to the other, ``[P, P]``; of few ranks also as figures.

    Args:
        tick: ranks between two that are named, where there are many.
    """
    is_small = len(values) <= MAX_LABELLED
    figure = go.Figure(layout=layout(height=height))
    figure.add_heatmap(
        z=np.round(values, 4).tolist(),
        texttemplate="%{z:.2f}" if is_small else None,
        hovertemplate=hover,
        zmin=0,
        zmax=max(float(values.max()), 1e-9),
        colorscale=[[0.0, "#ffffff"], [1.0, colour]],
        colorbar=None if is_small else colour_bar(unit),
        showscale=not is_small,
        xgap=2,
        ygap=2,
    )
    ticks = {"dtick": 1 if is_small else tick, "showgrid": False, "ticks": ""}
    figure.update_xaxes(title="to rank", **ticks)
    figure.update_yaxes(title="from rank", autorange="reversed", **ticks)
    return figure


def load_map(values: npt.NDArray[Any], first_steps: Sequence[int], *, height: int, **more: Any) -> go.Figure:
    """Loads ``[rows, columns]`` by step, 1 a fair share; a column may be the mean of several steps, from its first."""
    figure = go.Figure(layout=layout(height=height))
    figure.add_heatmap(
        z=np.round(values, 3).tolist(),
        x=[first + 1 for first in first_steps],
        zmin=0,
        zmax=2,
        colorscale=LESS_OR_MORE,
        colorbar=colour_bar("load, 1 = fair share", [0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2+"]),
        **more,
    )
    return figure
