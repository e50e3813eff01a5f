"""What programs take from ``deep_ep.utils``: events, and helpers of DeepEP's own test programs in modules beside."""

from crossdock.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
