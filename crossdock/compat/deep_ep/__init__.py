"""DeepEP's interfaces over Crossdock: ``Buffer`` (V1), ``ElasticBuffer`` (V2), ``EPBuffer`` (V2.5)."""

from crossdock.compat.deep_ep.config import Config
from crossdock.compat.deep_ep.cpp import topk_idx_t
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap
from crossdock.compat.deep_ep.v1 import Buffer

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
