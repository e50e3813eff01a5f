"""Ranks that have met: how they fail, go on without some, and part; and where Specs lie in their memory.

Letters: P ranks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Protocol, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from crossdock import inputs
from crossdock._env import trace_folder
from crossdock.agreement import agree, agree_on_masked
from crossdock.arena import PAGE, Arena, Control
from crossdock.backends.base import Backend, LaunchOptions, Outcome
from crossdock.backends.nodes.consent import NodesConsent
from crossdock.body import Body, Share
from crossdock.connect import check_support, choose_device, connect
from crossdock.consent import Consent, Steps
from crossdock.errors import ConfigError, NotSupported
from crossdock.fields import is_integer, is_positive
from crossdock.masks import listed
from crossdock.pending import CallQueue, Pending
from crossdock.spec import MAX_SLOTS, Spec, Topology
from crossdock.trace import TracedConsent, TracedNodesConsent, TracedQueue, Tracer
from crossdock.transport.base import Group, all_or_none, group_of, raise_on_all
from crossdock.transport.engines import AnyRail, check_rail, choose, named
from crossdock.transport.rail import Engine

Self = TypeVar("Self", bound="Connection")
Value = TypeVar("Value")
AnyGroup = dist.ProcessGroup | DeviceMesh | Group | None


class Order:
    """What the last op of ``crossdock.ops`` gave, for the next one to take, so that compilers keep their order."""

    def __init__(self, device: torch.device) -> None:
        self.last = torch.zeros(1, dtype=torch.int64, device=device)

    def hand_on(self, done: Tensor) -> None:
        """For the next op; of a tensor without contents nothing is kept, which would outlive the mode that made it."""
        if type(done) is Tensor:
            self.last = done


@functools.cache
def _order(device: torch.device) -> Order:
    """One for all buffers of a device: calls of different buffers have one order too."""
    return Order(device)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a buffer has counted since it was made; see ``Buffer.gather_stats`` for all ranks'."""

    num_tokens_per_expert: Tensor
    """int64 [L]: tokens that each local expert has received, over all dispatches but unquantized ones."""
    wait_s: Tensor
    """float64 [P]: seconds this rank has waited for each peer. Stacked, the rows of a slow rank's peers show it."""


class Laid(Protocol):
    """A Spec that has been laid over a connection, with what its calls use: a Buffer."""

    def synchronize(self) -> None:
        """Returns once all that was issued is done."""

    def check_overflow(self) -> None:
        """Raises a CapacityError that was not raised yet."""

    def forget_overflows(self) -> None:
        """Nobody raises them any more, of all that was issued."""

    def without(self, masked: tuple[int, ...]) -> None:
        """Goes on without these ranks."""

    def lie_in(self, segment: Tensor | None) -> None:
        """Rows lie in that segment of this rank's from now on; None: in none."""

    @property
    def stats(self) -> Stats:
        """What was counted so far."""
        raise NotImplementedError


class _Agreed(NamedTuple):
    """What all ranks know of a connection before there is one."""

    members: Group
    control: Control
    body: Body
    device: torch.device
    number: int
    timeout_s: float
    tracer: Tracer | None = None
    rail_engine: Engine | None = None
    row_bytes: int = 1
    name: str = "connection"
    """What its user has made."""


class Connection:
    """Ranks that have met: one segment of memory at each, one sequence of calls. Collective to make, local to close.

    Any number of Buffers lie over one, ``Buffer(connection, spec)``, each with its Spec, and share its bytes and its
    order of calls: prefill and decode, several batch sizes, forward and backward of several models. All ranks make the
    same Buffers in the same order, and issue the same calls in the same order, whatever Spec each call is of.

    Args:
        group: as for ``Buffer``.
        num_bytes: of each rank's segment for rows, all Specs together; what a Spec needs is
            ``Arena(spec, Topology(num_ranks=P)).num_body_bytes``. None: none yet, see ``reserve``.
        device: as for ``Buffer``.
        topology: of the ranks; None: one scale-up domain of all. ``Topology.of(group)`` finds out which ranks share
            memory.
        timeout_s: how long a call waits for a peer before it raises ``PeerTimeout``.
        max_experts: the most experts, of all ranks, of any Spec: rows of counts are so long.
        max_in_flight: the most calls that may be started and not yet waited for, 1 to 6; also the most ``num_slots``.
        trace: as for ``Buffer``; of the calls of all Specs.
        rail: how rows travel between nodes that share no memory: ``"dist"`` (torch.distributed), ``"nixl"``, or an
            engine; ``"auto"`` takes what is there, and none where all ranks share memory; None: none.

    Raises:
        ConfigError: the ranks brought different arguments or versions; on all ranks.
        TransportError: a rank could not allocate its segment (the message says what to do); on all ranks.

    >>> from crossdock import Buffer, Fp32, Spec, run_local
    >>> prefill = Spec(num_experts=4, num_topk=2, hidden=2, max_tokens=64, wire=Fp32())
    >>> decode = Spec(num_experts=4, num_topk=2, hidden=2, max_tokens=2, wire=Fp32())
    >>> def program(group):
    ...     with Connection(group, num_bytes=1 << 20) as connection:
    ...         buffers = Buffer(connection, prefill), Buffer(connection, decode)
    ...         return [buffer.dispatch(torch.ones(1, 2), torch.tensor([[0, 3]])).num_rows for buffer in buffers]
    >>> run_local(program, num_ranks=2)
    [[2, 2], [2, 2]]
    """

    def __init__(
        self,
        group: AnyGroup,
        num_bytes: int | None = None,
        *,
        device: torch.device | str | None = None,
        topology: Topology | None = None,
        timeout_s: float = 100,
        max_experts: int = 512,
        max_in_flight: int = MAX_SLOTS,
        trace: str | os.PathLike[str] | None = None,
        rail: AnyRail = "auto",
    ) -> None:
        members, tracer = _members_of(group, trace)

        def look() -> dict[str, object]:
            _check_sizes(num_bytes, max_experts, max_in_flight)
            return _common(members, tracer, device, topology, rail, timeout_s) | {
                "num_bytes": num_bytes,
                "max_experts": max_experts,
                "max_in_flight": max_in_flight,
            }

        number = agree(members if tracer is None else tracer.members, look)
        chosen, topology = choose_device(members, device), topology or Topology(num_ranks=members.size)
        engine = choose(members, topology, rail)
        control = Control(
            topology=topology,
            max_experts=int(max_experts),
            max_in_flight=int(max_in_flight),
            over_rail=engine is not None,
        )
        body = Body(control.num_bytes, _whole_pages(int(num_bytes or 0)))
        self._join(_Agreed(members, control, body, chosen, number, timeout_s, tracer, engine))
        self.group = group

    @classmethod
    def of_spec(
        cls,
        group: AnyGroup,
        spec: Spec,
        launch_options: LaunchOptions,
        *,
        device: torch.device | str | None,
        timeout_s: float,
        trace: str | os.PathLike[str] | None,
        topology: Topology | None = None,
        rail: AnyRail = "auto",
    ) -> Connection:
        """What a Buffer that has one of its own makes: as large as the Spec needs. Collective."""
        if isinstance(group, Spec):
            raise ConfigError("group is a Spec; pass Buffer(group, spec), with None for the default group")
        members, tracer = _members_of(group, trace)

        def look() -> dict[str, object]:
            options = _common(members, tracer, device, topology, rail, timeout_s)
            if not isinstance(spec, Spec):
                raise ConfigError(f"spec is a {type(spec).__name__}; pass a crossdock.Spec")
            launch_options.check(spec, choose_device(members, device))
            return options | {"expand": launch_options.expand, "mover": launch_options.mover}

        number = agree(members if tracer is None else tracer.members, look, spec)
        chosen, topology = choose_device(members, device), topology or Topology(num_ranks=members.size)
        engine = choose(members, topology, rail)
        check_support(spec, chosen, topology, over_rail=engine is not None)
        control = Arena(spec, topology).control_words
        if engine is not None:
            control = replace(control, over_rail=True)
        arena = Arena(spec, topology, control)
        body = Body(arena.begin, arena.num_bytes - arena.begin)
        made = cls.__new__(cls)
        agreed = _Agreed(members, control, body, chosen, number, timeout_s, tracer, engine, arena.row_bytes, "buffer")
        made._join(agreed)  # noqa: SLF001 - one of this class
        made.group = group
        return made

    @torch.inference_mode(mode=False)  # what is made here outlives the mode that it is made in
    def _join(self, agreed: _Agreed) -> None:
        members, control = agreed.members, agreed.control
        self.device = agreed.device
        self.topology = control.topology
        self.rank = members.rank
        self.control = control
        self.number = agreed.number
        """63 random bits, the same on all ranks."""
        self._members = members
        self._body = agreed.body
        parts = connect(
            members,
            control,
            agreed.body.end,
            agreed.device,
            number=agreed.number,
            timeout_s=agreed.timeout_s,
            row_bytes=agreed.row_bytes,
            consent_type=Consent if agreed.tracer is None else TracedConsent,
            nodes_consent_type=NodesConsent if agreed.tracer is None else TracedNodesConsent,
            rail_engine=agreed.rail_engine,
        )
        self.transport, self.consent, self._lay = parts.transport, parts.consent, parts.lay
        depth = control.max_in_flight
        if agreed.tracer is None:
            self.queue = CallQueue(self.consent, self.transport, depth=depth, timeout_s=agreed.timeout_s)
        else:
            self.queue = agreed.tracer.queue(parts, depth=depth, number=agreed.number, timeout_s=agreed.timeout_s)
        self.is_closed = False
        self.refusal: str | None = None
        """Why no call can begin; None while calls can."""
        self._name = agreed.name
        self.order = _order(agreed.device)
        self.masked: tuple[int, ...] = ()
        """The ranks that ``mask`` has left out, in order."""
        self._laid: list[ref[Laid]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of each rank's segment for rows."""
        return self._body.num_bytes

    def place(self, spec: Spec, *, exclusive: bool) -> tuple[Arena, Share]:
        """Where a Spec lies here, and with whom it shares these bytes. Local; the same on all ranks.

        Raises:
            ConfigError: there is no room for it, or it does not fit the connection.
            NotSupported: no backend here carries it out.
        """
        check_support(spec, self.device, self.topology, over_rail=self.control.over_rail)
        if spec.num_experts > self.control.max_experts:
            raise ConfigError(
                f"num_experts={spec.num_experts}, and the connection was made for at most "
                f"max_experts={self.control.max_experts}; make it with more"
            )
        if spec.num_slots > self.control.max_in_flight:
            raise ConfigError(
                f"num_slots={spec.num_slots}, and the connection was made for at most "
                f"max_in_flight={self.control.max_in_flight} calls; make it with more, or the Spec with fewer slots"
            )
        return self._body.place(Arena(spec, self.topology, self.control), exclusive=exclusive)

    def lay(self, laid: Laid, arena: Arena, launch_options: LaunchOptions, *, buffer_id: int) -> Backend:
        """What carries out the calls of a Spec that has its place. Local: compiles and loads its kernels.

        Calls in flight are finished first.

        Raises:
            ConfigError: the connection is closed, or its memory was released.
        """
        self.check_open()
        self.queue.drain()
        backend = self._lay(arena, launch_options, buffer_id=buffer_id)
        if self.masked:
            backend.mask(self.masked)
        if isinstance(self.queue, TracedQueue):
            self.queue.lay(arena.spec, backend)
        self._laid = [known for known in self._laid if known() is not None]
        self._laid.append(ref(laid))
        return backend

    def leave(self, arena: Arena) -> None:
        """A Spec is used no more; bytes that were its alone are free."""
        self._body.leave(arena)

    def reserve(self, num_bytes: int) -> None:
        """Makes room for so many bytes of rows at each rank; fewer than there are change nothing. Collective.

        Plans and Buffers go on as before, and on CPUs rows do too: what lies in the memory stays where it is. On GPUs
        larger memory takes its place, for a moment there are both, and rows of dispatches before are stale.

        Raises:
            ConfigError: ranks ask for different numbers, or a call was started and not waited for; on all ranks. Or a
                rank is masked.
            TransportError: a rank has no room; on all ranks, and nothing has changed.
            NotSupported: on GPUs, a rank has captured calls in CUDA graphs, which hold addresses; on all ranks.
        """
        with self.queue.turn:
            self.check_open()
            self._agree_on(num_bytes, _problem_of_bytes(num_bytes) or self._what_is_started(), "reserve")
            if (size := _whole_pages(int(num_bytes))) > self._body.num_bytes:
                self._free_memory()
                if self.transport.grow(self._members, self._body.first + size):
                    self._lie_in(self.transport.segment)
                self._body.grew(size)

    def release(self) -> None:
        """Gives the memory of all Specs back to the system; calls are refused until ``reacquire``. Collective.

        For a server that sleeps, or a trainer that needs the memory for another phase. Rows in slots are stale; plans
        and Buffers stay, and on CPUs addresses too.

        Raises:
            ConfigError: a call was started and not waited for, on some rank; on all ranks. Or a rank is masked.
            NotSupported: the system cannot, or, on GPUs, a rank has captured calls in CUDA graphs, which hold
                addresses; on all ranks.
        """
        with self.queue.turn:
            self.check_open()
            self._agree_on(None, self._what_is_started(), "release")
            self._free_memory()
            if self.transport.release(self._members, self._body.first):
                self._lie_in(None)
            self._body.vacate(self.queue)
            self.refusal = "the connection's memory was released; call reacquire() on all ranks first"

    def reacquire(self) -> None:
        """Takes the memory again that ``release`` has given back. Collective.

        Raises:
            ConfigError: it was not released.
            TransportError: a rank has no room; on all ranks. It may be called again.
        """
        with self.queue.turn:
            if self.is_closed or self.refusal is None:
                raise ConfigError(self.refusal or "the connection's memory was not released; nothing is to be done")
            if self.transport.reacquire(self._members):
                self._lie_in(self.transport.segment)
            self.refusal = None

    def _what_is_started(self) -> str | None:
        if self.queue.num_unwaited:
            return f"{self.queue.num_unwaited} calls were started and not waited for; call wait() on them first"
        return None

    def _free_memory(self) -> None:
        """Nothing that was issued is running any more, on no rank; NotSupported where memory cannot lie elsewhere."""
        self._synchronize()
        raise_on_all(self._members, self.consent.what_holds_addresses(), NotSupported)

    def _lie_in(self, segment: Tensor | None) -> None:
        """This rank's memory lies elsewhere: rows that were handed out are stale."""
        self._body.vacate(self.queue)
        for laid in self._all_laid():
            laid.lie_in(segment)

    def _agree_on(self, value: object, problem: str | None, what: str) -> None:
        """Raises ConfigError on all ranks where any has a problem, or another value. Collective."""
        if self.masked:
            raise ConfigError(
                f"masked: {listed(self.masked)}; {what}() needs all ranks: make a connection of those that are left"
            )
        gathered = self._members.all_gather((value, problem))
        for rank, (theirs, their_problem) in enumerate(gathered):
            if their_problem is not None:
                raise ConfigError(f"rank {rank}: {their_problem}")
            if theirs != gathered[0][0]:
                raise ConfigError(
                    f"rank 0 calls {what}({gathered[0][0]}), rank {rank} {what}({theirs}); pass the same on all ranks"
                )

    def _all_laid(self) -> Iterator[Laid]:
        return filter(None, (known() for known in self._laid))

    def check(self) -> None:
        """Raises what has failed without being raised: once, and after all that was issued is done.

        That is the CapacityError of a ``rows="capacity"`` dispatch that has been waited for, and on CUDA, where a call
        may return before the host knows how it went, also PeerFailed, PeerTimeout, or the ConfigError of picks that are
        not allowed.
        """
        with self.queue.turn:
            self.check_open()
            self.queue.settle()
            self._synchronize()
            self.queue.check_failure()
            for laid in self._all_laid():
                laid.check_overflow()

    def _synchronize(self) -> None:
        for laid in self._all_laid():
            laid.synchronize()

    def exchange_words(self, num_trips: int) -> None:
        """Gives a word to every rank and waits for everyone's, so many times, on CUDA; nothing else moves.

        One of them is the shortest that a call can take, a one-way trip between all ranks: what benchmarks hold
        latencies against. Collective; it returns at once, its work goes on the stream of the buffer's calls.

        Raises:
            ConfigError: calls are in flight.
            NotSupported: on CPUs.
        """
        self.check_open()
        if self.queue.running:
            raise ConfigError("exchange_words while calls are in flight; wait for them first")
        self.consent.exchange_words(num_trips)

    def abort(self, reason: str) -> None:
        """Gives up on this rank, between two calls or with calls in flight: every peer raises PeerFailed at once.

        What is in flight here is void. The next call works again, on all ranks. Leaving the ``with`` block by an
        exception does this too. Right behind a call that failed here it says nothing new, and no peer is told again.
        """
        with self.queue.turn:
            self.check_open()
            self.queue.abandon(reason)

    def reset(self) -> None:
        """Forgets failures and overflows that were not raised yet. Local; no word to the peers.

        Calls in flight, if there are any, are given up, as ``abort`` does. It does not bring ranks together that have
        begun different numbers of calls: see ``restart``.
        """
        with self.queue.turn:
            self.check_open()
            for laid in self._all_laid():
                laid.forget_overflows()
            self.queue.reset()

    def restart(self) -> None:
        """Begins again together, whatever each rank has begun, left out or caught before. Collective.

        What is in flight is void, on all ranks: one that is in a call, or begins one, raises PeerFailed, and may come
        here then. Failures and overflows that were not raised are forgotten. Plans stay valid, and rows in their slots.
        To be called by a server, for example, that has caught what it does not know. It may be called any number of
        times.

        Raises:
            PeerTimeout: a rank did not come within ``timeout_s``, or is gone; on all that came. Call it again on all.
            PeerFailed: a rank has closed its buffer.
            ConfigError: a CUDA graph is being captured.

        >>> from crossdock import Buffer, Fp32, PeerTimeout, Spec, run_local
        >>> spec = Spec(num_experts=2, num_topk=1, hidden=1, max_tokens=1, wire=Fp32())
        >>> def program(group):
        ...     with Buffer(group, spec, timeout_s=0.3) as buffer:
        ...         for step in range(group.rank):  # rank 0 begins no call, rank 1 one
        ...             try:
        ...                 buffer.dispatch(torch.ones(1, 1), torch.tensor([[0]]))
        ...             except PeerTimeout as error:
        ...                 print(error)
        ...         group.all_gather(None)
        ...         buffer.restart()
        ...         return buffer.dispatch(torch.ones(1, 1), torch.tensor([[1]])).num_rows
        >>> run_local(program, num_ranks=2)
        rank 0 did not begin this dispatch within timeout_s=0.3; the call is void
        [0, 2]
        """
        with self.queue.turn:
            self.check_open()
            self._check_no_capture()
            self.queue.give_up("it restarts its buffer; call restart() on all ranks")
            for laid in self._all_laid():
                laid.forget_overflows()
            meeting: Pending[int] = self.queue.start("restart", self.consent.next_sequence, self._meet_again())
            self.consent.begin(meeting.wait())

    def _meet_again(self) -> Steps[Outcome[int]]:
        num_ended = yield from self.consent.meet()
        return num_ended, None

    def mask(self, *ranks: int) -> None:
        """Goes on without ranks that are gone. Collective among all that are left; what is in flight is void.

        To be called with the same ranks on all that are left, after a call has failed because of them. From then on
        nothing is awaited from a masked rank, and nothing sent to it: picks of its experts are dropped, as if they were
        -1. Plans from before are not valid any more, nor are rows of theirs. Ranks keep their numbers and experts; a
        process that takes the place of one that has ended comes in with a new Buffer of all ranks.

        Args:
            ranks: whose processes have ended, or that have closed their buffers; those that are masked already may be
                among them.

        Raises:
            ConfigError: ranks were given that still live, or not the same on all; nobody is masked, on all ranks. Or
                this rank's arguments make no sense; the others raise PeerFailed.
            PeerFailed, PeerTimeout: a rank that was to agree gave up, is late, or is gone too; nobody is masked. Call
                it again on all that are left, with that rank if it is gone.

        >>> from crossdock import Buffer, Fp32, Spec, run_local
        >>> spec = Spec(num_experts=3, num_topk=2, hidden=1, max_tokens=1, wire=Fp32())
        >>> def program(group):
        ...     with Buffer(group, spec) as buffer:
        ...         if group.rank == 1:
        ...             return "leaves"
        ...         buffer.mask(1)
        ...         recv = buffer.dispatch(torch.ones(1, 1), torch.tensor([[1, 2]]))
        ...         return buffer.masked, buffer.combine(recv.x, recv.plan).item()
        >>> run_local(program, num_ranks=3)
        [((1,), 1.0), 'leaves', ((1,), 1.0)]
        """
        with self.queue.turn:
            self.check_open()
            self._check_no_capture()
            self.queue.renew(f"it masks {', '.join(map(str, ranks))}")
            try:
                inputs.check_ranks(ranks, num_ranks=self.topology.num_ranks)
                if self.control.over_rail:
                    inputs.check_whole_nodes({*self.masked, *ranks}, self.topology)
            except ConfigError as error:
                self.queue.refuse(error)
                raise
            wanted = {*self.masked, *ranks}
            agreement = agree_on_masked(self.consent, self.transport, wanted)
            self.queue.start("mask", self.consent.next_sequence, agreement).wait()
            new = sorted(wanted - set(self.masked))
            self.masked = tuple(sorted(wanted))
            self.transport.mask(new)
            self.consent.mask(new)
            for laid in self._all_laid():
                laid.without(self.masked)

    def close(self) -> None:
        """Leaves: a peer that waits for this rank raises PeerFailed. Local; rows that were handed out stay readable.

        On CUDA it returns once what was issued is done. In a child that was forked from this process it says nothing.
        """
        if self.is_closed:
            return
        if not self.queue.turn.is_of_this_process:
            self._end()
            self.transport.close()
            return
        with self.queue.turn:
            self._end()
            self._synchronize()
            if isinstance(self.queue, TracedQueue):
                self._end_trace(self.queue)
            self.consent.leave()
            self.transport.close()

    def _end_trace(self, queue: TracedQueue) -> None:
        stats = [laid.stats for laid in self._all_laid()]
        num_ranks, waits = self.topology.num_ranks, torch.tensor(queue.wait_s, dtype=torch.float64, device="cpu")
        loads = [(num_ranks * each.num_tokens_per_expert.numel(), each.num_tokens_per_expert) for each in stats]
        queue.end(loads, (stats[0].wait_s if stats else waits).tolist())

    def _end(self) -> None:
        self.is_closed = True
        self.refusal = f"the {self._name} is closed; make a new one"

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up_by(error)
        self.close()

    def give_up_by(self, error: BaseException | None) -> None:
        """An exception has left a ``with`` block: peers are told, unless they know."""
        is_ours = self.queue.turn.is_of_this_process and not self.is_closed
        if error is not None and self.queue.last_error is None and is_ours:
            self.abort(f"{type(error).__name__}: {error}")

    def all_or_none(self) -> AbstractContextManager[None]:
        """See ``crossdock.transport.base.all_or_none``, among the ranks that have met."""
        return all_or_none(self._members)

    def gather(self, value: Value) -> list[Value]:
        """Everybody's, by rank. Collective; the group waits for all."""
        return self._members.all_gather(value)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        where = f"rank={self.rank}, num_ranks={self.topology.num_ranks}"
        return f"Connection({where}, {self._body.end:,} bytes, {state})"

    def _check_no_capture(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "a CUDA graph is being captured, and mask() and restart() ask the host; call them outside of it"
            )

    def check_open(self) -> None:
        """Raises what keeps any call from being started."""
        if self.refusal is not None:
            raise ConfigError(self.refusal)


def _members_of(group: AnyGroup, trace: str | os.PathLike[str] | None) -> tuple[Group, Tracer | None]:
    """The ranks that a user's group names; what writes a trace of them, if one is wanted."""
    members = group_of(group)
    folder = trace_folder() if trace is None else trace
    return members, None if folder is None else Tracer(folder, members)


def _common(
    members: Group,
    tracer: Tracer | None,
    device: torch.device | str | None,
    topology: Topology | None,
    rail: AnyRail,
    timeout_s: float,
) -> dict[str, object]:
    """Checks the arguments of any connection, and gives those that are the same on all ranks."""
    if not is_positive(timeout_s):
        raise ConfigError(f"timeout_s={timeout_s!r}; pass a positive number of seconds")
    if tracer is not None:
        tracer.check()
    _check_topology(topology, members.size)
    check_rail(rail)
    return {"device": choose_device(members, device).type, "topology": topology, "rail": named(rail)}


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def _problem_of_bytes(num_bytes: object) -> str | None:
    if is_integer(num_bytes, least=0):
        return None
    return f"num_bytes={num_bytes!r}; pass bytes of each rank's segment, an integer"


def _check_sizes(num_bytes: object, max_experts: object, max_in_flight: object) -> None:
    if num_bytes is not None and (problem := _problem_of_bytes(num_bytes)) is not None:
        raise ConfigError(problem)
    if not is_integer(max_experts, least=1):
        raise ConfigError(f"max_experts={max_experts!r}; pass a positive integer")
    if not is_integer(max_in_flight, least=1, most=MAX_SLOTS):
        raise ConfigError(f"max_in_flight={max_in_flight!r} calls; pass 1 to {MAX_SLOTS}")


def _check_topology(topology: object, num_ranks: int) -> None:
    if topology is None:
        return
    if not isinstance(topology, Topology):
        raise ConfigError(
            f"topology is a {type(topology).__name__}; pass a crossdock.Topology, or None for one domain of all ranks"
        )
    if topology.num_ranks != num_ranks:
        raise ConfigError(f"the Topology has {topology.num_ranks} ranks, the group {num_ranks}; pass one of as many")
