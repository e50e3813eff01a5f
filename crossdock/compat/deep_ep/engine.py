"""The only place that makes native Buffers: what a call needs -> Spec -> Buffer, over a connection with room for it.

DeepEP's constructors know bytes, or a few sizes; experts, picks, formats and layouts come with a call. So a Buffer is
laid when a call of its kind first comes, on all ranks alike, and found by the same key from then on.

Letters: P ranks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from crossdock.arena import Arena
from crossdock.buffer import Buffer
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap, Previous, moment_of
from crossdock.connection import Connection
from crossdock.errors import CapacityError, ConfigError, CrossdockError, NotSupported, TransportError
from crossdock.spec import Spec
from crossdock.untraced import apart, get_eval_frame_callback, untraced

Verb = TypeVar("Verb", bound=Callable[..., Any])
_DESTROYED = "the buffer was destroyed; make a new one"
_MAX_EXPERTS = 1024
"""Experts that a connection is made for at first."""
_FIRST_TOKENS = 128
"""Tokens of a rank for which V1's normal calls have room at first."""


def collective(verb: Verb) -> Verb:
    """A verb that all ranks call: what keeps one from it is told to the others at once, as a native call tells it."""

    @functools.wraps(verb)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules and (
            torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None
        ):
            return apart(told)(self, *args, **kwargs)
        try:
            return verb(self, *args, **kwargs)
        except Exception as error:
            self._engine.give_up(error)
            raise

    return cast(Verb, untraced(told))


class CommunicatorGroup:
    """A communicator of mpi4py (``comm=``) as ranks of Crossdock."""

    def __init__(self, comm: Any) -> None:
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._comm = comm

    def all_gather(self, value: Any) -> list[Any]:
        """See ``crossdock.Group``."""
        gathered: list[Any] = self._comm.allgather(value)
        return gathered


class Started:
    """A call that was only started: finished by its client, or before a call that it would be in the way of.

    Called, it finishes and gives nothing, as a hook does; ``result`` gives what the call gives. What was started before
    it is finished first, so that ranks whose clients wait in another order finish all in one. One that has failed
    raises the same again.
    """

    def __init__(self, buffer: Buffer, finish: Callable[[], Any], unfinished: list[Started]) -> None:
        self.buffer = buffer
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None
        self._error: Exception | None = None
        self._moment: EventHandle | None = None
        self._unfinished = unfinished
        unfinished.append(self)

    @untraced
    def __call__(self) -> None:
        """Finishes it, the first time."""
        if get_eval_frame_callback() is not None:
            apart(Started.__call__)(self)
        unfinished = self._unfinished
        while self in unfinished and unfinished[0] is not self:  # one that begins again finishes this one too
            unfinished[0].finish_early()
        if self in unfinished:
            unfinished.remove(self)
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                self._result = finish()
            except Exception as error:
                self._error = error
                raise
        elif self._error is not None:
            raise self._error
        elif self._moment is not None:
            self._moment.current_stream_wait()

    def finish_early(self) -> None:
        """Finishes it where its client has not asked for it, who may be on another stream when that is so."""
        self()
        self._moment = EventHandle()

    def result(self) -> Any:
        """What it gives; finishes it if nobody has."""
        self()
        return self._result


class Engine:
    """A DeepEP buffer's native side. Collective to make; so is the first call of each kind.

    Args:
        group: as for ``crossdock.Buffer``.
        num_bytes: to be taken at once on a GPU, as memory that lasts; on CPUs it is taken as it is needed.
        takes_all: on CPUs too: once ranks are masked, no more can be.
        timeout_s: how long a call waits for a peer.
    """

    def __init__(self, group: Any, *, num_bytes: int = 0, takes_all: bool = False, timeout_s: float = 100) -> None:
        self.group = group
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._timeout_s = timeout_s
        self._connections: dict[torch.device, Connection] = {}
        self._outgrown: list[Connection] = []
        """Connections that became too small: plans of their Buffers are still good."""
        self._buffers: dict[Hashable, Buffer] = {}
        self.unfinished: list[Started] = []
        """Calls that were started, the oldest first."""
        self.num_tokens = _FIRST_TOKENS
        """Tokens of a rank that V1's normal calls have room for by now, the same on all ranks."""
        self.is_closed = False
        self.comm_stream: torch.cuda.Stream | None = None
        """Where asynchronous calls run; None on CPUs."""
        if self.device.type == "cuda":
            self.comm_stream = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        at_once = num_bytes if takes_all or self.device.type == "cuda" else 0
        connection = self._connect(self.device, at_once, _MAX_EXPERTS)
        self.rank, self.num_ranks = connection.rank, connection.topology.num_ranks

    @property
    def connection(self) -> Connection:
        """That of calls on the device of the process."""
        return self._connections[self.device]

    def buffer(self, key: Hashable, make_spec: Callable[[], Spec], device: torch.device) -> Buffer:
        """The Buffer of that key; the first time it is laid, on all ranks.

        Calls of other Buffers that were started are finished first: their rows lie in the same bytes.
        """
        found = self._buffers.get((key, device))
        if found is None:
            found = self._buffers[key, device] = self._lay(make_spec(), device)
        if self.unfinished:
            self.use(found)
        return found

    def started(self, buffer: Buffer, finish: Callable[[], Any]) -> Started:
        """Keeps account of a call that was started, and finishes it in any case when the next one needs its room."""
        return Started(buffer, finish, self.unfinished)

    def use(self, buffer: Buffer) -> None:
        """Finishes what would be in the way of a call of this Buffer."""
        started = self.unfinished
        while started and (started[0].buffer is not buffer or len(started) >= buffer.spec.num_slots):
            started[0].finish_early()

    def settle(self) -> None:
        """Finishes what was started."""
        while self.unfinished:
            self.unfinished[0].finish_early()

    def grow(self, num_tokens: int) -> None:
        """Makes room for so many tokens of a rank from the next call on: as a CapacityError says it, on all ranks."""
        self.num_tokens = max(self.num_tokens, _power_of_two(num_tokens))

    def _lay(self, spec: Spec, device: torch.device) -> Buffer:
        self.check_open()
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "a CUDA graph is being captured, and this is the first call of its kind (experts, top-k, hidden, "
                "tokens, format, layout), for which ranks make room together; make such a call once before"
            )
        self.settle()
        connection = self._connections.get(device) or self._connect(device, 0, _MAX_EXPERTS)
        need = Arena(spec, connection.topology, connection.control).num_body_bytes
        if spec.num_experts > connection.control.max_experts:
            connection = self._connect(device, max(need, connection.num_bytes), _power_of_two(spec.num_experts))
        elif need > connection.num_bytes:
            connection = self._grow(connection, need)
        return Buffer(connection, spec)

    def _grow(self, connection: Connection, num_bytes: int) -> Connection:
        """The connection with more room, or another one with room where that cannot be."""
        try:
            connection.reserve(num_bytes)
        except NotSupported:
            return self._connect(connection.device, num_bytes, connection.control.max_experts)
        except ConfigError as error:
            if connection.masked:  # which it says itself
                raise
            raise ConfigError(
                f"this call needs more memory, and ranks differ: pass the same sizes, dtypes and options ({error})"
            ) from error
        return connection

    def _connect(self, device: torch.device, num_bytes: int, max_experts: int) -> Connection:
        outgrown = self._connections.pop(device, None)
        if outgrown is not None:
            outgrown.check()  # all that was issued there is done: its order with other calls ends here
            if any(buffer.connection is outgrown for buffer in self._buffers.values()):
                self._outgrown.append(outgrown)
                self._buffers = {
                    key: buffer for key, buffer in self._buffers.items() if buffer.connection is not outgrown
                }
            else:
                outgrown.gather(None)
                outgrown.close()
        connection = Connection(
            self.group, num_bytes or None, device=device, max_experts=max_experts, timeout_s=self._timeout_s
        )
        self._connections[device] = connection
        return connection

    @contextmanager
    def beside(self, *previous: Previous) -> Iterator[EventOverlap]:
        """A block whose work runs on the communication stream, behind events, or the current stream without any.

        Gives what says when it ends: to be waited for by whoever wants to, or by nobody.
        """
        overlap, stream = EventOverlap(), self.comm_stream
        moments = [moment.event for moment in map(moment_of, previous) if moment is not None]
        if stream is None:
            yield overlap
            overlap.event = EventHandle()
            return
        for event in filter(None, moments):
            stream.wait_event(event)
        if not any(moments):
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield overlap
            overlap.event = EventHandle()

    def lend(self, *given: object) -> None:
        """Tells the allocator that the communication stream uses these too, until now; on CPUs nothing."""
        if self.comm_stream is not None:
            for tensor in _tensors(given):
                if tensor.is_cuda:
                    tensor.record_stream(self.comm_stream)

    def hand_out(self, *made: object) -> None:
        """Tells the allocator that tensors of the communication stream are used on the current one."""
        if self.comm_stream is not None:
            current = torch.cuda.current_stream(self.device)
            for tensor in _tensors(made):
                if tensor.is_cuda:
                    tensor.record_stream(current)

    @staticmethod
    def wait_for(*previous: Previous) -> None:
        """The current stream comes after events."""
        for each in previous:
            if (moment := moment_of(each)) is not None:
                moment.current_stream_wait()

    def barrier(self, *, beside: bool, waits: bool) -> None:
        """All ranks have come here: their streams on CUDA, where the host waits if it is asked to. Collective."""
        self.check_open()
        self.settle()
        stream = self.comm_stream
        if stream is None:
            self.connection.gather(None)
            return
        current = torch.cuda.current_stream(self.device)
        if beside:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.connection.exchange_words(1)
            current.wait_stream(stream)
        else:
            self.connection.exchange_words(1)
        if waits:
            self.connection.check()

    def check_open(self) -> None:
        """Raises ConfigError once it has been destroyed."""
        if self.is_closed:
            raise ConfigError(_DESTROYED)

    def give_up(self, error: Exception) -> None:
        """Tells the other ranks that this one does not make a call, unless they know it from the call itself."""
        connection = self._connections.get(self.device)  # None where ranks have failed to make it, which all know
        if connection is None or self.is_closed or isinstance(error, (CapacityError, TransportError)):
            return  # all ranks raise
        is_ours = isinstance(error, CrossdockError)
        connection.abort(str(error) if is_ours else f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leaves, as ``Connection.close``. Local; a second time it does nothing."""
        if not self.is_closed:
            self.is_closed = True
            for connection in (*self._connections.values(), *self._outgrown):
                connection.close()
                connection.refusal = _DESTROYED


def plain(tensor: Tensor) -> Tensor:
    """The tensor as a value: the calls record no gradient, whatever their inputs want."""
    return tensor.detach() if tensor.requires_grad else tensor


def _tensors(given: object) -> Iterator[Tensor]:
    """All tensors in tuples of tuples; a handle's are its own matter."""
    if isinstance(given, Tensor):
        yield given
    elif type(given) in (tuple, list):
        assert isinstance(given, (tuple, list))
        for each in given:
            yield from _tensors(each)


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
