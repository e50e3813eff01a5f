"""Cost model of dispatch and combine: rows of a routing, bytes over links, seconds, the bottleneck, and SMs.

``predict`` is what a call takes, from a Spec, a Topology, and the ``Rows`` of a routing (``uniform_rows``,
``group_limited_rows``, ``recorded_rows``). What a Buffer decides by itself (who copies rows, how many SMs) asks it,
and ``crossdock size`` prints it. docs/model.md has it beside figures that were measured.
"""

from __future__ import annotations

from crossdock.cost.chunks import Chunks, best_chunks
from crossdock.cost.methods import LOW_LATENCY, METHODS, ONE_GPU, ONE_HOP, SM_BANDWIDTH, SOCKETS, TWO_HOPS, Method
from crossdock.cost.predict import Hop, Op, Prediction, cheaper_expand, link_bytes, predict, receiver_can_expand
from crossdock.cost.rows import Rows, group_limited_rows, ranks_per_token, recorded_rows, uniform_rows
from crossdock.cost.sms import sms_to_fill, sms_to_load, sms_to_store

__all__ = [
    "LOW_LATENCY",
    "METHODS",
    "ONE_GPU",
    "ONE_HOP",
    "SM_BANDWIDTH",
    "SOCKETS",
    "TWO_HOPS",
    "Chunks",
    "Hop",
    "Method",
    "Op",
    "Prediction",
    "Rows",
    "best_chunks",
    "cheaper_expand",
    "group_limited_rows",
    "link_bytes",
    "predict",
    "ranks_per_token",
    "receiver_can_expand",
    "recorded_rows",
    "sms_to_fill",
    "sms_to_load",
    "sms_to_store",
    "uniform_rows",
]
