"""Figures of a run over hosts: table and JSON lines. Needs rich (``crossdock[cli]``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table

from crossdock.cli.bench.host_figures import HostFigure
from crossdock.cli.bench.over_hosts import HostsConfig
from crossdock.cli.machine import Machine
from crossdock.cli.terminal import print_table, without_trailing_blanks

_WIDTH = 124
_NAMES = "picks", "op"
_FIGURES = "median", "p10 – p90", "on the link", "of bound", "TCP", "of TCP", "flat", "vs flat", "predicted"


def json_lines(config: HostsConfig, figures: Sequence[HostFigure], machine: Machine) -> Iterator[str]:
    """A line for each operation."""
    for figure in figures:
        yield json.dumps({**asdict(config), **asdict(figure), "machine": asdict(machine)})


def print_hosts(config: HostsConfig, figures: Sequence[HostFigure], machine: Machine) -> None:
    """The table, and how it was measured, on stdout."""
    with without_trailing_blanks(_WIDTH) as console:
        console.print(str(config), highlight=False, markup=False, style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in _NAMES:
            table.add_column(name, no_wrap=True)
        for figure in _FIGURES:
            table.add_column(figure, justify="right", no_wrap=True)
        for measured in figures:
            table.add_row(*_cells(measured))
        print_table(console, table)
        for line in _notes(config, machine):
            console.print(line, highlight=False, markup=False, style="dim")


def _cells(figure: HostFigure) -> tuple[str, ...]:
    return (
        figure.picks,
        figure.op,
        _ms(figure.median_ms),
        f"{_ms(figure.p10_ms)} – {_ms(figure.p90_ms)}",
        f"{figure.link_bytes / 1e6:,.2f} MB",
        f"{figure.link_bytes / figure.bound_bytes:.3f}",
        _ms(figure.tcp_ms),
        f"{figure.median_ms / figure.tcp_ms:.2f}",
        _ms(figure.flat_ms),
        f"{figure.flat_ms / figure.median_ms:.1f}×",
        _ms(figure.predicted_ms),
    )


def _ms(value: float) -> str:
    """Whole numbers, where they have two digits at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _notes(config: HostsConfig, machine: Machine) -> list[str]:
    return [
        f"ms, slowest rank's median of {config.repeats} calls after one; rows and sums equal gloo's, bit for bit.",
        "On the link: what the fullest host sends in a call, by its interface. Bound: one row for each token and",
        "foreign host, with metadata and places. TCP: plain sockets for as many bytes. Flat: gloo's all_to_all_single.",
        f"Hosts are network namespaces of one machine: {machine}",
    ]
