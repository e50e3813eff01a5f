"""Order between calls, whatever streams they are on: a rank's kernels run one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

try:
    from torch._C import _cuda_getCurrentRawStream as _current_stream
except ImportError:  # torch without CUDA

    def _current_stream(device: int) -> int:
        handle: int = torch.cuda.current_stream(device).cuda_stream
        return handle


class CallStreams:
    """Where calls are issued, and in which order.

    Calls that are waited for at once run on the caller's current stream, behind those issued before, wherever these
    were. Calls that are only started run on a stream beside it, ``side``, behind the caller's current stream too, so
    that what the caller issues next can run beside them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index or 0
        self._own: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.side = self._own
        """Where calls run that are only started: our own stream, or the caller's choice."""
        self._last = self.side
        self._last_raw = self.side.cuda_stream
        self.has_captured = False
        """Whether a call on another stream than the one before it was captured, as ``torch.cuda.graph`` has them."""
        self._entered: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._moved: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def current(self) -> int:
        """The caller's current stream, for what is no part of a call."""
        return _current_stream(self._index)

    def enter(self) -> int:
        """The caller's current stream, on which the next call is launched, behind those before."""
        raw: int = _current_stream(self._index)
        if raw != self._last_raw:
            self._move(torch.cuda.current_stream(self._device), raw)
        return raw

    def enter_side(self) -> int:
        """Our own stream, on which the next call is launched, behind those before and the caller's current stream."""
        self.order()
        if self._last is not self.side:
            self._move(self.side, self.side.cuda_stream)
        return self._last_raw

    def order(self) -> None:
        """What the caller has issued by now on its current stream comes before what is launched on our own."""
        self._entered.record(torch.cuda.current_stream(self._device))
        self.side.wait_event(self._entered)

    def use(self, stream: torch.cuda.Stream | None) -> None:
        """From now on started calls run on that stream, behind those before; None: on our own."""
        self.side = self._own if stream is None else stream

    def wait_for(self, event: torch.cuda.Event, *, on_side: bool) -> None:
        """What is issued from now on, on the caller's current stream or on ``side``, comes after the event."""
        if not on_side:
            torch.cuda.current_stream(self._device).wait_event(event)
            return
        self.order()  # also where a graph is captured: the other stream is of it then
        self.side.wait_event(event)

    def context(self, raw: int) -> AbstractContextManager[object]:
        """In which torch and Triton issue on a stream that ``enter`` or ``enter_side`` has given."""
        return nullcontext() if raw == _current_stream(self._index) else torch.cuda.stream(self._last)

    def event(self) -> torch.cuda.Event:
        """The end of what has been issued."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._last)
        return event

    @property
    def all(self) -> tuple[torch.cuda.Stream, ...]:
        """Where kernels that this host has issued may run, and the graphs that it has replayed.

        A graph runs where it is replayed: on the current stream, or on one that the caller has ordered before it.
        """
        return torch.cuda.current_stream(self._device), self._last, self.side

    @property
    def is_idle(self) -> bool:
        """Whether all that was issued is done."""
        return all(stream.query() for stream in self.all)

    def synchronize(self) -> None:
        """Waits for all that was issued."""
        for stream in self.all:
            stream.synchronize()

    def _move(self, stream: torch.cuda.Stream, raw: int) -> None:
        """The next call is on another stream than the last one.

        A capture begins when all is done, and allows no look at a stream outside of it; within, order is kept.
        """
        is_capturing = torch.cuda.is_current_stream_capturing()
        self.has_captured |= is_capturing
        if not is_capturing or self._is_last_captured():
            self._moved.record(self._last)
            stream.wait_event(self._moved)
        self._last, self._last_raw = stream, raw

    def _is_last_captured(self) -> bool:
        with torch.cuda.stream(self._last):
            return torch.cuda.is_current_stream_capturing()
