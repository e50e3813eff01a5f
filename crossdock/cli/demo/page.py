"""The report: one HTML file that needs no network. Needs plotly and jinja2 (``crossdock[cli]``)."""

from __future__ import annotations

from crossdock.cli import page
from crossdock.cli.demo.charts import PARTS, load_chart, loss_chart, time_chart, traffic_chart
from crossdock.cli.demo.outcome import Outcome, spent
from crossdock.cli.demo.replay import TOLERANCE
from crossdock.cli.page import Card, Chart, Part, as_json


def render(outcome: Outcome) -> str:
    """The page."""
    return page.render(
        "demo/page.html.j2",
        cards=_cards(outcome),
        charts=_charts(outcome),
        measured_on=f"Measured on {outcome.measured_on}.",
        outcome=outcome,
        tolerance=TOLERANCE,
    )


def _cards(outcome: Outcome) -> list[Card]:
    return [
        Card(f"{outcome.losses[0]:.2f} → {outcome.last_loss:.2f}", "loss, nats per byte"),
        Card(f"{outcome.bits_per_byte:.2f}", "bits per byte of held-out text"),
        Card(f"{outcome.tokens_per_s:,.0f}", "tokens per second"),
        Card(f"{outcome.moving_share:.0%}", "of the time in dispatch and combine, waiting included"),
        Card(f"{outcome.largest_difference:.0e}", "largest relative difference from one process"),
        Card(f"{outcome.num_written:,}", "bytes generated, all as in one process"),
    ]


def _parts(outcome: Outcome) -> list[Part]:
    times = [spent(spans) for spans in outcome.spans]
    all_s = sum(sum(time.values()) for time in times)
    return [Part(name, colour, f"{sum(time[name] for time in times) / all_s:.0%}") for name, colour in PARTS.items()]


def _charts(outcome: Outcome) -> list[Chart]:
    num_ranks, cores = outcome.num_ranks, outcome.machine.cores
    shared = (
        f" {num_ranks} ranks share {cores} {'core' if cores == 1 else 'cores'} here: while one waits, another computes."
        if num_ranks > cores
        else ""
    )
    settled = "" if outcome.sharing is None else " On a GPU, each part is done before the next begins."
    num_compared = len(outcome.compared)
    return [
        Chart(
            "loss",
            "Loss",
            "How surprised the model is by the next byte of Python source. The circles are the first "
            f"{num_compared} steps, repeated in one process without the library.",
            as_json(loss_chart(outcome)),
        ),
        Chart(
            "load",
            "Expert load",
            "How many tokens each expert got, a row per expert. White is a fair share; each gate's bias pulls its "
            "experts towards it.",
            as_json(load_chart(outcome)),
        ),
        Chart(
            "traffic",
            "Traffic",
            "MB of rows that the ranks dispatched to each other in a step's forward pass, on average. The diagonal "
            "stays on its rank.",
            as_json(traffic_chart(outcome)),
        ),
        Chart(
            "time",
            "Where the time went",
            "Seconds of training on each rank; dispatch and combine without the time they waited for peers."
            f"{settled}{shared}",
            as_json(time_chart(outcome)),
            _parts(outcome),
        ),
    ]
