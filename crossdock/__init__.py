"""Crossdock: expert-parallel dispatch and combine for Mixture-of-Experts models."""

import importlib
from types import ModuleType

from crossdock import autograd
from crossdock.arena import Arena
from crossdock.backends.base import Counters, PlanTensors
from crossdock.buffer import Buffer, Stats
from crossdock.connection import Connection
from crossdock.errors import (
    BackendUnavailable,
    CapacityError,
    ConfigError,
    CrossdockError,
    NotSupported,
    PeerFailed,
    PeerTimeout,
    TransportError,
)
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.pending import Pending
from crossdock.plan import Hop, Plan, local_counts, make_plan
from crossdock.received import Received
from crossdock.routing import (
    Routing,
    group_limited_topk,
    hot_expert_load,
    record_load,
    recorded_load,
    softmax_topk,
    uniform_load,
    zipf_load,
)
from crossdock.spec import Spec, Topology
from crossdock.transport.base import Group
from crossdock.transport.inproc import ThreadGroup, run_local
from crossdock.version import __version__
from crossdock.wire import Bf16, Fp8, Fp16, Fp32, Opaque, Quantized, Wire

__all__ = [
    "Arena",
    "BackendUnavailable",
    "Bf16",
    "Buffer",
    "CapacityError",
    "Compact",
    "ConfigError",
    "Connection",
    "Counters",
    "CrossdockError",
    "Expanded",
    "Fp8",
    "Fp16",
    "Fp32",
    "Group",
    "Hop",
    "Layout",
    "NotSupported",
    "Opaque",
    "Padded",
    "PeerFailed",
    "PeerTimeout",
    "Pending",
    "Plan",
    "PlanTensors",
    "Quantized",
    "Received",
    "Routing",
    "Spec",
    "Stats",
    "ThreadGroup",
    "Topology",
    "TransportError",
    "Wire",
    "__version__",
    "autograd",
    "group_limited_topk",
    "hot_expert_load",
    "local_counts",
    "make_plan",
    "record_load",
    "recorded_load",
    "run_local",
    "softmax_topk",
    "uniform_load",
    "zipf_load",
]


def __getattr__(name: str) -> ModuleType:
    """Imports ``crossdock.nn`` on first use: its import of ``torch.distributed.tensor`` takes 0.8 s."""
    if name == "nn":
        return importlib.import_module("crossdock.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
