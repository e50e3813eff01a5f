"""What charts of all pages share: colours, and a layout that fits a phone. Needs plotly (``crossdock[cli]``).

Colours are of Okabe and Ito's set, which people of all kinds of colour vision tell apart.
"""

from __future__ import annotations

from typing import Any

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
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "fixedrange": True, "title": {"standoff": 8}}
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
