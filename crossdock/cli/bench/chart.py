"""A chart of bandwidth over the number of SMs, as a self-contained HTML page. Needs plotly (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from crossdock.cli.bench.figures import Figure
from crossdock.cli.bench.outcome import Outcome

_INK, _GRID = "#1f2933", "#e4e7eb"
_BLUE, _PINK = "#0072b2", "#cc79a7"
"""Colours of the Okabe-Ito palette, which is safe for colour-blind readers."""


def sweep_page(outcome: Outcome) -> str:
    """The page: GB/s of all ranks together by number of SMs, beside the limits measured in the same run."""
    assert outcome.limits.write is not None
    assert outcome.pairs
    figure = go.Figure(layout=_layout(outcome))
    dispatches, combines = zip(*outcome.pairs, strict=True)
    _add(figure, "dispatch, written", dispatches, limit=outcome.limits.write, colour=_BLUE)
    _add(figure, "combine, read + written", combines, limit=outcome.limits.copy, colour=_PINK)
    num_sms = [dispatch.num_sms for dispatch in dispatches]
    figure.update_xaxes(title="SMs of each rank", tickvals=num_sms, rangemode="tozero", gridcolor=_GRID)
    figure.update_yaxes(title="GB/s, all ranks together", rangemode="tozero", gridcolor=_GRID)
    page: str = figure.to_html(include_plotlyjs=True, default_height="600px", config={"displayModeBar": False})
    return page


def _add(figure: go.Figure, name: str, results: Sequence[Figure], *, limit: float, colour: str) -> None:
    num_sms = [result.num_sms for result in results]
    figure.add_scatter(
        x=num_sms,
        y=[result.of_limit * limit / 1e9 for result in results],
        customdata=[(result.median_us, result.of_limit) for result in results],
        hovertemplate="%{x} SMs: %{y:,.0f} GB/s, %{customdata[0]:,.0f} us, %{customdata[1]:.0%} of it<extra></extra>",
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 8},
    )
    figure.add_scatter(
        x=[0, max(n for n in num_sms if n is not None)],
        y=[limit / 1e9] * 2,
        name=f"its limit, {limit / 1e9:,.0f}",
        mode="lines",
        line={"color": colour, "width": 1.5, "dash": "dash"},
        hoverinfo="skip",
    )


def _layout(outcome: Outcome) -> go.Layout:
    assert outcome.sharing is not None
    lines = [str(outcome.config), f"{outcome.machine.gpu}; {outcome.sharing}"]
    if outcome.sharing.warning:
        lines.append("<b>Ranks took turns on the GPU, without MPS: this says nothing about speed.</b>")
    return go.Layout(
        template="none",
        title={
            "text": "<br>".join(lines),
            "x": 0.02,
            "xanchor": "left",
            "y": 0.98,
            "yanchor": "top",
            "font": {"size": 14},
        },
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        margin={"l": 70, "r": 20, "t": 40 + 20 * len(lines), "b": 100},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    )
