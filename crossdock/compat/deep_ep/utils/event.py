"""Events, where some programs look for them."""

from crossdock.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
