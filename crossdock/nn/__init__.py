"""Modules above the differentiable verbs: a gate, experts, and the layer that brings tokens to them and back."""

from crossdock.nn.experts import GroupedExperts
from crossdock.nn.gate import Gate
from crossdock.nn.grouped import expert_ids, grouped_mm
from crossdock.nn.layer import ExpertParallel
from crossdock.nn.mesh import ShardExperts
from crossdock.nn.placement import Placement
from crossdock.nn.replicas import sum_replica_gradients

__all__ = [
    "ExpertParallel",
    "Gate",
    "GroupedExperts",
    "Placement",
    "ShardExperts",
    "expert_ids",
    "grouped_mm",
    "sum_replica_gradients",
]
