"""The page of a sweep: bandwidth over the number of SMs. Needs plotly and jinja2 (``crossdock[cli]``)."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from crossdock.cli import page
from crossdock.cli.bench.figures import Figure
from crossdock.cli.bench.outcome import Outcome
from crossdock.cli.page import Card, Chart, as_json
from crossdock.cli.page.charts import BLUE, PINK, layout


def sweep_page(outcome: Outcome) -> str:
    """GB/s of all ranks together by number of SMs, beside the limits measured in the same run."""
    assert outcome.limits.write is not None
    assert outcome.sharing is not None
    assert outcome.pairs
    dispatches, combines = zip(*outcome.pairs, strict=True)
    drawn = (
        ("dispatch, written", dispatches, outcome.limits.write, BLUE),
        ("combine, read + written", combines, outcome.limits.copy, PINK),
    )
    figure = go.Figure(layout=layout(height=480))
    for name, results, limit, colour in drawn:
        _add(figure, name, results, limit=limit, colour=colour)
    num_sms = [dispatch.num_sms for dispatch in dispatches]
    figure.update_xaxes(title="SMs of each rank", tickvals=num_sms, rangemode="tozero")
    figure.update_yaxes(title="GB/s, all ranks together", rangemode="tozero")
    return page.render(
        "bench/page.html.j2",
        cards=[_card(name.partition(",")[0], results) for name, results, _, _ in drawn],
        charts=[Chart("sweep", "Bandwidth", "Dashed: what the same run measured as the limit.", as_json(figure))],
        measured_on=f"{outcome.machine.gpu}; {outcome.sharing}",
        title=str(outcome.config),
        warning="Ranks took turns on the GPU, without MPS: this says nothing about speed."
        if outcome.sharing.warning
        else None,
    )


def _card(name: str, results: Sequence[Figure]) -> Card:
    best = max(results, key=lambda result: result.of_limit)
    return Card(f"{best.of_limit:.0%}", f"of the limit, {name} with {best.num_sms} SMs")


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
