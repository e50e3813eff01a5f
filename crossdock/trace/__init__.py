"""A trace of what a rank's buffer does, written while it runs: ``Buffer(trace="folder")``, read by ``crossdock trace``.

A traced buffer has a queue, a turn and a consent of other classes; others have not even an ``if`` for it.
"""

from crossdock.trace.part import open_problem, write_spans
from crossdock.trace.tracer import TracedConsent, TracedNodesConsent, TracedQueue, Tracer

__all__ = ["TracedConsent", "TracedNodesConsent", "TracedQueue", "Tracer", "open_problem", "write_spans"]
