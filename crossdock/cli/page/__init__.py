"""Pages that commands leave behind: one HTML file each, which needs no network. Needs plotly and jinja2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


class Card(NamedTuple):
    """A key figure."""

    figure: str
    what: str


class Part(NamedTuple):
    """An entry of a chart's legend."""

    name: str
    colour: str
    share: str


class Chart(NamedTuple):
    """A figure with what it shows; ``json`` is what plotly.js draws."""

    name: str
    title: str
    text: str
    json: str
    legend: Sequence[Part] = ()


def render(template: str, *, cards: Sequence[Card], charts: Sequence[Chart], measured_on: str, **values: object) -> str:
    """A page.

    Args:
        template: its path within ``crossdock/cli``; it extends ``page/base.html.j2``.
        measured_on: the last line.
        values: what the template's own blocks use.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossdock.cli", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        cards=cards, charts=charts, measured_on=measured_on, plotly=get_plotlyjs(), **values
    )


def as_json(figure: go.Figure) -> str:
    """The figure without plotly's default template, safe inside a script element."""
    figure.update_layout(template="none")
    return json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
