"""Moments in a device's work, as DeepEP's programs hand them on. On CPUs all that was issued is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from crossdock.errors import ConfigError

Self = TypeVar("Self", bound="EventOverlap")


class EventHandle:
    """A moment of the current CUDA stream: what was issued there before this was made."""

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None
        """None where no device has been used."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.event = torch.cuda.current_stream().record_event()

    def current_stream_wait(self) -> None:
        """What is issued from now on, on the current stream, comes after that moment. The host does not wait."""
        if self.event is not None:
            self.event.wait()


class EventOverlap:
    """The end of a call, or nothing to wait for: a call that was not asynchronous gives one without ``event``.

    Args:
        event: when it ends; None: the call has been joined already.
        extra_tensors: kept as long as this is.
        hook_after_wait: what is left to do once it has been waited for; done once.

    Raises:
        AssertionError: when something that has no event is waited for.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: Sequence[Tensor] | None = None,
        hook_after_wait: Callable[[], Any] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait = hook_after_wait
        self._is_released_at_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """The current stream waits; gives what the hook gives, the first time. A hook that fails is called again.

        Args:
            release_handle: forget the event, and what was kept for it.
        """
        assert self.event is not None, (
            "there is no event to wait for: the call was not asynchronous, so its results are ordered behind the "
            "current stream already; ask for async_finish=True (async_with_compute_stream=True), or leave the wait out"
        )
        self.event.current_stream_wait()
        result = None
        if (hook := self.hook_after_wait) is not None:
            result = hook()
            self.hook_after_wait, self.event = None, EventHandle()  # who waits later waits for what the hook did too
        if release_handle:
            self.event = self.extra_tensors = None
        return result

    wait = current_stream_wait

    def register_hook_after_wait(self, fn: Callable[[], Any]) -> None:
        """Does that too, at the first wait, behind what is to be done there already."""
        before = self.hook_after_wait

        def both() -> Any:
            result = None if before is None else before()
            later = fn()
            return later if before is None else result

        self.hook_after_wait = both

    def __call__(self: Self, release_handle: bool = False) -> Self:
        """For ``with event(release_handle=True):``."""
        self._is_released_at_exit = release_handle
        return self

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._is_released_at_exit)
        self._is_released_at_exit = False


Previous = EventOverlap | EventHandle | None
"""What a call may be told to come after."""


def moment_of(previous: Previous) -> EventHandle | None:
    """The event of what was given as ``previous_event``; None where there is nothing to wait for.

    Raises:
        ConfigError: it is neither of the two.
    """
    if previous is None:
        return None
    event = previous.event if isinstance(previous, EventOverlap) else previous
    if event is None or isinstance(event, EventHandle):
        return event
    raise ConfigError(
        f"previous_event is a {type(previous).__name__}; pass an EventOverlap, an EventHandle (Buffer.capture()), or "
        f"None"
    )
