"""Calls that were started: their order, what they wait for, and what becomes of them when one fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Literal, Protocol, TypeVar

from crossdock.backends.base import Event
from crossdock.consent import Consent, Kind, Missing, Steps
from crossdock.errors import ConfigError, CrossdockError, PeerTimeout, TransportError
from crossdock.transport.base import Transport

Result = TypeVar("Result")
_LOOK_AGAIN_S = 0.05
"""How often a rank that waits looks whether the peers it misses still exist."""


class Work(Protocol):
    """What a call leaves to a device."""

    event: Event | None
    """Its end, once all of it has been issued."""
    held: tuple[object, ...]
    """What it reads."""


class Pending(Generic[Result]):
    """A call that was started. ``wait()`` finishes it; nothing of ours runs in between.

    It holds the inputs, which must not change before ``wait()`` has returned. Calls run in the order in which they were
    started, so waiting for one finishes those before it.
    """

    def __init__(
        self, queue: CallQueue, kind: Kind | Literal["mask"], sequence: int, steps: Steps[Result], work: Work | None
    ) -> None:
        self.kind = kind
        self.sequence = sequence
        self._queue = queue
        self._steps = steps
        self._work = work
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self.has_sent = False
        """Whether the next call may begin though this one is not done."""

    @property
    def is_done(self) -> bool:
        """Whether ``wait()`` would return (or raise) at once; on CUDA the work itself may still be under way."""
        return bool(self._result) or self._error is not None

    @property
    def event(self) -> Event | None:
        """On CUDA, a ``torch.cuda.Event`` at the end of the call's work, for any stream to wait for.

        None on CPUs, and as long as not all of the work could be issued: while an earlier call still asks the host, or
        has failed.
        """
        return None if self._work is None else self._work.event

    def wait(self) -> Result:
        """The call's result, once it is there; later calls of ``wait()`` give the same.

        On CUDA the caller's current stream waits for the work; the host waits only for what it has to be told.

        Raises:
            PeerTimeout: a peer did not do its part within the buffer's ``timeout_s``; the call is void.
            PeerFailed: a peer gave up; the call is void.
            CapacityError: more rows than a rank has room for; all ranks raise, no row was moved.
        """
        self._queue.finish(self)
        if self._error is not None:
            raise self._error
        if self._work is not None:
            if self._work.event is not None:
                self._work.event.wait()
            self._work.held = ()
        return self._result[0]

    def advance(self) -> Missing | None:
        """Goes as far as it can without waiting: what it waits for, or None when it is done."""
        try:
            missing = next(self._steps)
        except StopIteration as stop:
            self._result.append(stop.value)
        except CrossdockError as error:
            self._error = error
        else:
            self.has_sent = missing.has_sent
            return missing
        return None

    def void(self, error: BaseException) -> None:
        """Gives up: ``wait()`` will raise the error."""
        self._error = error
        self._steps.close()

    @property
    def error(self) -> BaseException | None:
        """What ``wait()`` raises, when the call has failed."""
        return self._error


class CallQueue:
    """The calls in flight, oldest first. Only the oldest moves rows, so calls are done in the same order everywhere."""

    def __init__(self, consent: Consent, transport: Transport, *, depth: int, timeout_s: float) -> None:
        self.last_error: BaseException | None = None
        """What the last call ended with, when it was an error; the peers know."""
        self.wait_s = [0.0] * transport.num_ranks
        """How long this rank has waited for each peer, in seconds."""
        self._consent = consent
        self._transport = transport
        self._depth = depth
        self._timeout_s = timeout_s
        self._running: deque[Pending[object]] = deque()
        self._unwaited: list[Pending[object]] = []
        self._untold: CrossdockError | None = None

    def check_room(self) -> None:
        """Raises what may keep the next call from being started.

        That is the failure of a call that was started and not waited for (the epoch has ended, and a call of the next
        one would be the caller's answer to an error it has not seen), or ConfigError when as many calls as there are
        slots have been started and not waited for.
        """
        self.check_failure()
        if len(self._unwaited) >= self._depth:
            raise ConfigError(
                f"{len(self._unwaited)} calls were started and not waited for; num_slots={self._depth}: "
                f"call wait() on the oldest first, or make the Spec with more slots"
            )

    def check_failure(self) -> None:
        """Raises the failure of a call that this rank was not told of: nobody waited, or the device found it."""
        if self._untold is None and (error := self._consent.failure()) is not None:
            self._fail(error)
            self._untold = error
        if self._untold is not None:
            self.last_error, self._untold = self._untold, None
            raise self.last_error

    def settle(self) -> None:
        """Waits for what was issued to a device; ``check_failure`` raises what went wrong."""
        try:
            self._consent.settle()
        except PeerTimeout as error:
            self._fail(error)
            self._untold = error

    def start(
        self,
        kind: Kind | Literal["mask"],
        sequence: int,
        steps: Steps[Result],
        work: Work | None = None,
        *,
        waits: bool = True,
    ) -> Pending[Result]:
        """Puts a call behind the others and goes as far as is possible without waiting.

        Args:
            kind: a mask is a call that has no word.
            work: what it leaves to a device.
            waits: whether the device waits for peers in its first step. Those may wait for what calls before it have
                still to send, so these come first.
        """
        pending = Pending(self, kind, sequence, steps, work)
        self.last_error = None
        may_begin = not waits and bool(self._running) and all(call.has_sent for call in self._running)
        self._running.append(pending)  # type: ignore[arg-type]
        self._unwaited.append(pending)  # type: ignore[arg-type]
        if may_begin:
            self._step(pending)  # type: ignore[arg-type]
        else:
            self._advance()
        return pending

    def finish(self, pending: Pending[Result]) -> None:
        """Drives the oldest calls until this one is done, one way or the other."""
        if not pending.is_done:
            self._wait_until(lambda: pending.is_done)
        if self.is_unwaited(pending):
            self._unwaited.remove(pending)  # type: ignore[arg-type]
        self.last_error = pending.error
        if self._untold is pending.error:
            self._untold = None

    def drain(self) -> None:
        """Finishes every call in flight; their results stay to be waited for."""
        self._wait_until(lambda: not self._running)

    def refuse(self, error: Exception) -> None:
        """Gives up a call that cannot begin; those in flight are finished first, and their results stay."""
        num_ended = self._consent.num_ended
        try:
            self.drain()
        finally:
            if self._consent.num_ended == num_ended:  # else the peers know already that this epoch has ended
                self._fail(error)
            self.last_error, self._untold = error, None

    def abandon(self, reason: str) -> None:
        """Gives up what is in flight, and the epoch with it; one that has just ended by a failure ends once."""
        if self._untold is None:
            self._fail(reason)
        self.last_error, self._untold = TransportError(f"this rank gave up: {reason}"), None

    def renew(self, reason: str) -> None:
        """Gives up what is in flight, and begins an epoch, unless one has just begun by a failure.

        That failure counts as told, whatever it was.
        """
        self.settle()
        if self._untold is None and (error := self._consent.failure()) is not None:
            self._fail(error)
        elif self._untold is None and not self._consent.is_fresh:
            self._fail(reason)
        self.last_error = self._untold = None

    def forget(self) -> None:
        """Forgets failures that nobody has seen; gives up what is in flight, if anything is."""
        if self._unwaited:
            self.abandon("it was reset")
        self.last_error = self._untold = None

    def _fail(self, error: Exception | str) -> None:
        """Tells all peers that this rank gives up, and voids what is in flight here."""
        first = self._running[0].sequence if self._running else self._consent.next_sequence
        self._consent.fail(error, first_void=first)
        cause = error if isinstance(error, CrossdockError) else TransportError(f"this rank gave up: {error}")
        for pending in self._running:
            pending.void(pending.error or cause)
        self._running.clear()
        self._unwaited.clear()

    @property
    def is_idle(self) -> bool:
        """Whether every call that was started has been driven to its end."""
        return not self._running

    def has_unwaited(self, sequence: int) -> bool:
        """Whether the call of that number has been started and not waited for."""
        return any(other.sequence == sequence for other in self._unwaited)

    def is_unwaited(self, pending: Pending[Result] | None) -> bool:
        """Whether a call has been started and not waited for."""
        return pending in self._unwaited

    def _advance(self) -> Missing | None:
        """Moves the oldest call, then the next: what the oldest waits for, or None when none is left."""
        while self._running:
            missing = self._step(self._running[0])
            if missing is not None:
                return missing
        return None

    def _step(self, call: Pending[object]) -> Missing | None:
        """Moves a call as far as it can without waiting: what it waits for, or None when it is done or has failed."""
        try:
            missing = call.advance()
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        if missing is not None:
            return missing
        if isinstance(call.error, TransportError):
            self._untold = call.error
            self._fail(call.error)
        elif isinstance(call.error, CrossdockError) and self._consent.failure() is not None:
            self._fail(call.error)  # the device has ended the epoch by it
        else:
            self._running.remove(call)
        return None

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        head, num_polls = None, 0
        began = looked = last = time.perf_counter()
        while not is_done():
            missing = self._advance()
            if missing is None or is_done():
                continue
            now = time.perf_counter()
            if self._running[0] is not head:
                head, num_polls, began = self._running[0], 0, now
            else:
                for peer in missing.peers:
                    self.wait_s[peer] += now - last
            last = now
            if missing.peers and now - began > self._timeout_s:  # without, the device has the deadline
                self._give_up(missing.peers[0], missing.what, f"within timeout_s={self._timeout_s:g}")
            elif now - looked > _LOOK_AGAIN_S:
                looked = now
                self._look_for_the_gone(missing)
            self._transport.idle(num_polls)
            num_polls += 1

    def _look_for_the_gone(self, missing: Missing) -> None:
        """Gives up when a missing peer no longer exists, and did not do its part just before it went."""
        gone = [peer for peer in missing.peers if not self._transport.is_alive(peer)]
        if gone and (still := self._advance()) is not None and gone[0] in still.peers:
            self._give_up(gone[0], still.what, "and is gone: its process ended, or its buffer was dropped")

    def _give_up(self, peer: int, what: str, when: str) -> None:
        kind = self._running[0].kind
        when = f"{when}; the call is void"
        self._untold = PeerTimeout(peer, f"rank {peer} did not {what} this {kind} {when}")
        self._fail(self._untold)
