"""Where DeepEP has had its buffers since 2.0: ``deep_ep.buffers.elastic`` and ``deep_ep.buffers.legacy``."""

from crossdock.compat.deep_ep import elastic
from crossdock.compat.deep_ep import v1 as legacy
from crossdock.compat.deep_ep.elastic import ElasticBuffer
from crossdock.compat.deep_ep.ep_handle import EPHandle
from crossdock.compat.deep_ep.v1 import Buffer

__all__ = ["Buffer", "EPHandle", "ElasticBuffer", "elastic", "legacy"]
