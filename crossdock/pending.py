"""Calls that were started: their order, what they wait for, and what becomes of them when one fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypeVar

from crossdock.backends.base import Counters, Event, Outcome
from crossdock.consent import Consent, Kind, Missing, Steps
from crossdock.errors import ConfigError, CrossdockError, PeerTimeout, TransportError
from crossdock.spec import Spec
from crossdock.transport.base import Transport
from crossdock.turn import Turn

Result = TypeVar("Result")
CallKind = Kind | Literal["mask", "restart"]
"""The last two are calls that have no word."""
_LOOK_AGAIN_S = 0.05
"""How often a rank that waits looks whether the peers it misses still exist."""


class Owner(Protocol):
    """Whose calls they are: the receive slots of a Spec."""

    @property
    def spec(self) -> Spec:
        """What travels."""
        raise NotImplementedError


class Pending(Generic[Result]):
    """A call that was started. ``wait()`` finishes it; nothing of ours runs in between.

    It holds the inputs, which must not change before ``wait()`` has returned. Calls run in the order in which they were
    started, so waiting for one finishes those before it.
    """

    def __init__(
        self,
        queue: CallQueue,
        kind: CallKind,
        sequence: int,
        steps: Steps[Outcome[Any]],
        finish: Callable[[Any], Result] | None,
        held: tuple[object, ...] = (),
        owner: Owner | None = None,
    ) -> None:
        self.kind = kind
        self.owner = owner
        self.sequence = sequence
        self.steps = steps
        """What is left of it."""
        self.has_sent = False
        """Whether the next call may begin though this one is not done."""
        self.outcome: Outcome[Any] | None = None
        self.counters: Counters | None = None
        self.error: BaseException | None = None
        """What ``wait()`` raises, when the call has failed."""
        self._queue = queue
        self._finish = finish
        self._held = held
        self._results: list[Result] = []

    @property
    def is_done(self) -> bool:
        """Whether ``wait()`` would return (or raise) at once; on CUDA the work itself may still be under way."""
        return self.outcome is not None or self.error is not None

    @property
    def event(self) -> Event | None:
        """On CUDA, a ``torch.cuda.Event`` at the end of the call's work, for any stream to wait for.

        None on CPUs, and as long as not all of the work could be issued: while an earlier call still asks the host, or
        has failed.
        """
        return None if self.outcome is None else self.outcome[1]

    def wait(self) -> Result:
        """The call's result, once it is there; later calls of ``wait()`` give the same.

        On CUDA the caller's current stream waits for the work; the host waits only for counts that it asked for.

        Raises:
            PeerTimeout: a peer did not do its part within the buffer's ``timeout_s``; the call is void.
            PeerFailed: a peer gave up; the call is void.
            CapacityError: more rows than a rank has room for; all ranks raise, no row was moved.
            TransportError: no memory for rows that were to be expanded here; the other ranks raise PeerFailed.
        """
        if self._results:
            return self._results[0]
        with self._queue.turn:
            return self.finished()

    def finished(self) -> Result:
        """``wait()`` for a caller whose turn it is."""
        if self.outcome is None and self.error is None:
            self._queue.drive(self)
        self._queue.forget(self)
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        result, event = self.outcome
        if event is not None:
            event.wait()
        if not self._results:
            finish, self._finish, self._held = self._finish, None, ()  # which may hold what holds this
            self._results.append(result if finish is None else finish(result))
        return self._results[0]

    def void(self, error: BaseException) -> None:
        """Gives up: ``wait()`` will raise the error."""
        self.error, self._finish = error, None
        self.steps.close()


class CallQueue:
    """The calls in flight, oldest first. Only the oldest moves rows, so calls are done in the same order everywhere."""

    def __init__(self, consent: Consent, transport: Transport, *, depth: int, timeout_s: float) -> None:
        self.last_error: BaseException | None = None
        """What the last call ended with, when it was an error; the peers know."""
        self.turn = Turn(self.left_by)
        """To be held around every call."""
        self.wait_s = [0.0] * transport.num_ranks
        """How long this rank has waited for each peer, in seconds."""
        self._consent = consent
        self._transport = transport
        self._depth = depth
        self._timeout_s = timeout_s
        self.running: deque[Pending[Any]] = deque()
        """Those that have been started and not been driven to their end."""
        self._unwaited: list[Pending[Any]] = []
        self._unraised: CrossdockError | None = None
        self._is_told = False
        """Whether the peers know of a failure here, behind which no call has been started, and no abort came."""
        self._failing: tuple[CrossdockError | Exception | str, int] | None = None
        """The failure that the peers are being told, and how many epochs had ended before."""

    def check_room(self, owner: Owner | None = None, most: int | None = None) -> None:
        """Raises what may keep the next call from being started.

        That is the failure of a call that was started and not waited for (the epoch has ended, and a call of the next
        one would be the caller's answer to an error it has not seen), or ConfigError when as many calls as there are
        slots have been started and not waited for (``most`` of one owner; of all owners, as many as there is room for).
        Behind a failure that was raised, it goes where the peers are.
        """
        consent = self._consent
        goes_on = consent.is_open and consent.taken is None and not consent.found[0]
        if self._unraised is not None or self._failing is not None or not goes_on:
            self.check_failure()
            self._consent.catch_up()
        if self._unwaited and len(self._unwaited) >= (most or self._depth):
            self._check_unwaited(owner, most or self._depth)

    def _check_unwaited(self, owner: Owner | None, most: int) -> None:
        num_own = sum(call.owner is owner for call in self._unwaited)
        if num_own >= most:
            raise ConfigError(
                f"{num_own} calls were started and not waited for; num_slots={most}: "
                f"call wait() on the oldest first, or make the Spec with more slots"
            )
        if len(self._unwaited) >= self._depth:
            raise ConfigError(
                f"{len(self._unwaited)} calls of all Specs were started and not waited for; "
                f"max_in_flight={self._depth}: call wait() on the oldest first, or make the Connection with more"
            )

    def check_failure(self) -> None:
        """Raises a failure that nobody has seen: of a call that nobody waited for, or that the device found."""
        self._recover()
        if self._unraised is None and (error := self._consent.failure()) is not None:
            self._fail(error)
            self._unraised = error
        if self._unraised is not None:
            self.last_error, self._unraised = self._unraised, None
            raise self.last_error

    def settle(self) -> None:
        """Waits for what was issued to a device; ``check_failure`` raises what went wrong."""
        try:
            self._consent.settle()
        except PeerTimeout as error:
            self._fail(error)
            self._unraised = error

    def start(
        self,
        kind: CallKind,
        sequence: int,
        steps: Steps[Outcome[Any]],
        finish: Callable[[Any], Result] | None = None,
        held: tuple[object, ...] = (),
        owner: Owner | None = None,
        counters: Counters | None = None,
    ) -> Pending[Result]:
        """Puts a call behind the others; ``drive`` moves it.

        Args:
            finish: makes the call's result of what its steps gave, when it is waited for.
            held: what its work reads, kept for as long as it may.
            owner: whose calls may be only so many in flight.
            counters: tensors of the caller's; on CPUs, what the host waits for peers is added to them.
        """
        pending = Pending(self, kind, sequence, steps, finish, held, owner)
        pending.counters = counters
        self.last_error = None
        self.running.append(pending)
        self._unwaited.append(pending)
        self._consent.taken, self._is_told = None, False
        return pending

    def drive(self, target: Pending[Any] | None = None) -> Missing | None:
        """Moves calls, the oldest first: until the target is done, or, without one, as far as no peer is waited for.

        A call that was started behind others that have sent all that peers wait for may begin before they are done.
        Gives what is missing, if it stopped for that.
        """
        patience: _Patience | None = None
        running = self.running
        call = running[0] if running else None
        if target is None and running and call is not running[-1]:
            call = self._newest_to_begin()
        while call is not None and (target is None or (target.outcome is None and target.error is None)):
            missing = None
            try:
                missing = next(call.steps)
            except StopIteration as stop:
                call.outcome = stop.value
            except CrossdockError as error:
                call.error = error
            except BaseException as error:
                self._fail(f"{type(error).__name__}: {error}")
                raise
            if missing is None and call.error is None:
                running.remove(call)
            elif missing is None:
                self._retire(call)
            else:
                call.has_sent = missing.has_sent
                if target is not None:
                    patience = patience or _Patience()
                    self._wait(call, missing, patience)
                elif call.has_sent or call is running[0]:
                    return missing
            call = running[0] if running else None
        return None

    def _newest_to_begin(self) -> Pending[Any]:
        """Of several, the newest call, if none before it has anything to send; else the oldest."""
        has_room = all(call.has_sent for call in list(self.running)[:-1])
        return self.running[-1 if has_room else 0]

    def _retire(self, call: Pending[Any]) -> None:
        """Takes a call that has failed out of the queue; if its failure is also that of peers, it ends the epoch."""
        if isinstance(call.error, TransportError):
            self._unraised = call.error
            self._fail(call.error)
        elif isinstance(call.error, CrossdockError) and self._consent.failure() is not None:
            self._fail(call.error)  # the device has ended the epoch by it
        else:
            self.running.remove(call)

    def forget(self, pending: Pending[Any]) -> None:
        """A call that is done has been waited for: its slot may be taken, and its error has been raised."""
        if pending in self._unwaited:
            self._unwaited.remove(pending)
        self.last_error = pending.error
        if self._unraised is pending.error:
            self._unraised = None

    def drain(self) -> None:
        """Finishes every call in flight; their results stay to be waited for."""
        if self.running:
            self.drive(self.running[-1])

    def refuse(self, error: Exception) -> None:
        """Gives up a call that cannot begin; those in flight are finished first, and their results stay.

        On a device too: or a peer, which may be calls behind, would find void what all ranks have begun.
        """
        num_ended = self._consent.num_ended
        try:
            self.drain()
            self.settle()
        finally:
            if self._consent.num_ended == num_ended:  # else the peers know already that this epoch has ended
                self._fail(error)
            self.last_error, self._unraised = error, None

    def abandon(self, reason: str) -> None:
        """Gives up what is in flight, and the epoch with it; one that has just ended by a failure ends once.

        So the answer to a failure is no other one, which peers would answer again.
        """
        self._recover()
        if self._unraised is None and not self._is_told:
            self._fail(reason)
        self.last_error, self._unraised = TransportError(f"this rank gave up: {reason}"), None
        self._is_told = False

    def left_by(self, error: BaseException) -> None:
        """An exception from elsewhere, an interrupt above all, has left a call: it is given up, unless it has been."""
        if not self._is_told:
            self._fail(f"{type(error).__name__}: {error}")
        self.last_error, self._unraised = TransportError(f"this rank gave up: {error}"), None

    def give_up(self, reason: str) -> None:
        """Gives up what is in flight, and ends an epoch in any case; what has failed before counts as raised."""
        self._fail(reason)
        self.last_error = self._unraised = None

    def renew(self, reason: str) -> None:
        """Gives up what is in flight, and begins an epoch, unless one has just begun by a failure.

        That failure counts as raised, whatever it was.
        """
        self._recover()
        self.settle()
        if self._unraised is None and (error := self._consent.failure()) is not None:
            self._fail(error)
        elif self._unraised is None and not self._consent.is_fresh:
            self._fail(reason)
        self.last_error = self._unraised = None
        self._consent.catch_up()

    def reset(self) -> None:
        """Forgets failures that nobody has seen; gives up what is in flight, if anything is."""
        self._recover()
        if self._unwaited:
            self.abandon("it was reset")
        self.last_error = self._unraised = None

    def _fail(self, error: Exception | str) -> None:
        """Tells all peers that this rank gives up, and voids what is in flight here.

        An interrupt may leave it at any point. Then it is done again, and an epoch that has ended is not ended twice.
        """
        if self._failing is None:
            self._failing = error, self._consent.num_ended
        error, num_ended = self._failing
        if self._consent.num_ended == num_ended:
            taken = self._consent.next_sequence if self._consent.taken is None else self._consent.taken
            first = self.running[0].sequence if self.running else taken
            self._consent.fail(error, first_void=first)
        cause = error if isinstance(error, CrossdockError) else TransportError(f"this rank gave up: {error}")
        for pending in self.running:
            pending.void(pending.error or cause)
        self.running.clear()
        self._unwaited.clear()
        self._is_told = True
        self._failing = None

    def _recover(self) -> None:
        """Gives up what an interrupt has left half done: a failure, or a call whose number was taken."""
        if self._failing is not None:
            self._fail(self._failing[0])
        elif self._consent.taken is not None:
            self._fail("it was interrupted")

    @property
    def num_unwaited(self) -> int:
        """Calls that have been started and not waited for."""
        return len(self._unwaited)

    def has_unwaited(self, sequence: int) -> bool:
        """Whether the call of that number has been started and not waited for."""
        return any(other.sequence == sequence for other in self._unwaited)

    def is_unwaited(self, pending: Pending[Any] | None) -> bool:
        """Whether a call has been started and not waited for."""
        return pending in self._unwaited

    def _wait(self, call: Pending[Any], missing: Missing, patience: _Patience) -> None:
        """Gives the core away until a call's peers may have done more; gives them up when they are late or gone."""
        now = time.perf_counter()
        if call is patience.call:
            for peer in missing.peers:
                self.wait_s[peer] += now - patience.last
                if call.counters is not None and call.counters.wait_ns is not None and call.counters.wait_ns.is_cpu:
                    call.counters.wait_ns[peer] += round(1e9 * (now - patience.last))
        else:
            patience.call, patience.num_polls, patience.began, patience.gone = call, 0, now, None
        patience.last = now
        if patience.gone is not None and patience.gone in missing.peers:  # also after another look at what it did
            self._give_up(call, patience.gone, missing, " and is gone: its process ended, or its buffer was dropped")
        elif missing.peers and now - patience.began > self._timeout_s:  # without, the device has the deadline
            culprit = self._consent.suspect(call.sequence, missing.peers)
            self._give_up(call, culprit, missing, f" within timeout_s={self._timeout_s:g}")
        elif now - patience.looked > _LOOK_AGAIN_S:
            patience.looked = now
            patience.gone = next((peer for peer in missing.peers if not self._transport.is_alive(peer)), None)
            if 2 * (now - patience.began) > self._timeout_s and missing.peers:
                self._consent.suspect(call.sequence, missing.peers)
        self._transport.idle(patience.num_polls)
        patience.num_polls += 1

    def _give_up(self, call: Pending[Any], peer: int, missing: Missing, how: str) -> None:
        """Fails for a peer that has not done what is missed, or that another has named, which waits for it."""
        consent = self._consent
        hop, who = consent.hop_to(peer), consent.described(peer)
        where = "" if hop is None else f" over {hop}"
        what = f"{missing.what} this {call.kind}"
        if peer not in missing.peers:
            what = f"do its part of this {call.kind}, for which {consent.described(missing.peers[0])} waits"
        self._unraised = PeerTimeout(peer, f"{who} did not {what}{where}{how}; the call is void", hop)
        self._fail(self._unraised)


class _Patience:
    """How long a host has waited for the peers of one call."""

    def __init__(self) -> None:
        self.call: Pending[Any] | None = None
        self.num_polls = 0
        self.began = self.looked = self.last = time.perf_counter()
        self.gone: int | None = None
        """A peer that no longer exists; it may have done its part just before it went."""
