"""Ranks that have met: how a buffer is made, fails, goes on without some ranks, counts, and ends.

Letters: E experts, L local experts, P ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from crossdock import inputs
from crossdock.agreement import agree, agree_on_masked
from crossdock.arena import Arena
from crossdock.backends.base import LaunchOptions, Outcome
from crossdock.connect import connect, vet
from crossdock.consent import Steps
from crossdock.errors import ConfigError
from crossdock.kinds import NUM_CALL_KINDS, CallKind, Kinds
from crossdock.masks import drop_picks, listed
from crossdock.memo import PlanMemo
from crossdock.pending import CallQueue, Pending
from crossdock.slots import ReceiveSlots
from crossdock.spec import Spec, Topology
from crossdock.transport.base import Group, group_of

Self = TypeVar("Self", bound="Connection")


class Order:
    """What the last op of ``crossdock.ops`` gave, for the next one to take, so that compilers keep their order."""

    def __init__(self, device: torch.device) -> None:
        self.last = torch.zeros(1, dtype=torch.int64, device=device)


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


class Connection:
    """A rank's transport, backend, consent and calls in flight. Collective to make, local to close.

    See ``crossdock.Buffer``, which is one with verbs.
    """

    @torch.inference_mode(mode=False)  # what is made here outlives the mode that it is made in
    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Group | None,
        spec: Spec,
        *,
        device: torch.device | str | None,
        launch_options: LaunchOptions,
        timeout_s: float,
        debug: bool,
    ) -> None:
        if isinstance(group, Spec):
            raise ConfigError("group is a Spec; pass Buffer(group, spec), with None for the default group")
        members = group_of(group)
        self.device, problem = vet(members, device, spec, launch_options)
        options: dict[str, object] = {
            "device": self.device.type,
            "expand": launch_options.expand,
            "mover": launch_options.mover,
        }
        number = agree(members, spec, timeout_s, options, problem)
        self.group = group
        self.spec = spec
        self.topology = Topology(num_ranks=members.size)
        self.rank = members.rank
        self.arena = Arena(spec, self.topology)
        self._members = members
        self._id = number
        self._debug = debug
        parts = connect(members, self.arena, self.device, launch_options, number=number, timeout_s=timeout_s)
        self.launch = parts.launch
        """How kernels are launched, printable; None on CPUs."""
        self._transport, self._backend, self._consent = parts.transport, parts.backend, parts.consent
        self._queue = CallQueue(self._consent, self._transport, depth=spec.num_slots, timeout_s=timeout_s)
        self._slots = ReceiveSlots(self.arena, self._transport.segment)
        self._memo = PlanMemo(spec)
        self._kinds: Kinds[CallKind] = Kinds(NUM_CALL_KINDS)
        self._is_closed = False
        self.order = _order(self.device)
        self.masked: tuple[int, ...] = ()
        """The ranks that ``mask`` has left out, in order."""

    def check(self) -> None:
        """Raises what has failed without being raised: once, and after all that was issued is done.

        That is the CapacityError of a ``rows="capacity"`` dispatch that has been waited for, and on CUDA, where a call
        may return before the host knows how it went, also PeerFailed, PeerTimeout, or the ConfigError of picks that are
        not allowed.
        """
        with self._queue.turn:
            self._check_open()
            self._queue.settle()
            self._backend.synchronize()
            self._queue.check_failure()
            self._check_overflow()

    def exchange_words(self, num_trips: int) -> None:
        """Gives a word to every rank and waits for everyone's, so many times, on CUDA; nothing else moves.

        One of them is the shortest that a call can take, a one-way trip between all ranks: what benchmarks hold
        latencies against. Collective; it returns at once, its work goes on the stream of the buffer's calls.

        Raises:
            ConfigError: calls are in flight.
            NotSupported: on CPUs.
        """
        self._check_open()
        if self._queue.running:
            raise ConfigError("exchange_words while calls are in flight; wait for them first")
        self._consent.exchange_words(num_trips)

    def abort(self, reason: str) -> None:
        """Gives up on this rank, between two calls or with calls in flight: every peer raises PeerFailed at once.

        What is in flight here is void. The next call works again, on all ranks. Leaving the ``with`` block by an
        exception does this too. Right behind a call that failed here it says nothing new, and no peer is told again.
        """
        with self._queue.turn:
            self._check_open()
            self._queue.abandon(reason)

    def reset(self) -> None:
        """Forgets failures and overflows that were not raised yet. Local; no word to the peers.

        Calls in flight, if there are any, are given up, as ``abort`` does. It does not bring ranks together that have
        begun different numbers of calls: see ``restart``.
        """
        with self._queue.turn:
            self._check_open()
            self._backend.synchronize()
            self._backend.overflows.clear()
            self._queue.reset()

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
        with self._queue.turn:
            self._check_open()
            self._backend.check_capture(asks_host=True)
            self._queue.give_up("it restarts its buffer; call restart() on all ranks")
            self._backend.synchronize()
            self._backend.overflows.clear()
            meeting: Pending[int] = self._queue.start("restart", self._consent.next_sequence, self._meet())
            self._consent.begin(meeting.wait())

    def _meet(self) -> Steps[Outcome[int]]:
        num_ended = yield from self._consent.meet()
        return Outcome(num_ended)

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
        with self._queue.turn:
            self._check_open()
            self._backend.check_capture(asks_host=True)
            self._queue.renew(f"it masks {', '.join(map(str, ranks))}")
            try:
                inputs.check_ranks(ranks, num_ranks=self.topology.num_ranks)
            except ConfigError as error:
                self._queue.refuse(error)
                raise
            wanted = {*self.masked, *ranks}
            agreement = agree_on_masked(self._consent, self._transport, wanted)
            self._queue.start("mask", self._consent.next_sequence, agreement).wait()
            new = sorted(wanted - set(self.masked))
            self.masked = tuple(sorted(wanted))
            self._transport.mask(new)
            self._consent.mask(new)
            self._backend.mask(self.masked)
            self._memo.clear()
            self._kinds.clear()

    def drop_masked(self, topk_idx: Tensor) -> Tensor:
        """The picks with -1 in place of masked ranks' experts; the verbs do that themselves.

        Graphs do not that were captured before a rank was masked: what they are given has to be free of such picks.
        """
        if not self.masked:
            return topk_idx
        return drop_picks(topk_idx, self.masked, num_local=self.spec.num_local_experts(self.topology.num_ranks))

    def close(self) -> None:
        """Leaves: a peer that waits for this rank raises PeerFailed. Local; rows that were handed out stay readable.

        On CUDA it returns once what was issued is done. In a child that was forked from this process it says nothing.
        """
        if self._is_closed:
            return
        if not self._queue.turn.is_of_this_process:
            self._is_closed = True
            self._transport.close()
            return
        with self._queue.turn:
            self._is_closed = True
            self._backend.synchronize()
            self._consent.leave()
            self._transport.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_ours = self._queue.turn.is_of_this_process and not self._is_closed
        if error is not None and self._queue.last_error is None and is_ours:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    @property
    def stats(self) -> Stats:
        """What this rank has counted so far."""
        return Stats(
            num_tokens_per_expert=self._backend.num_tokens_per_expert.clone(),
            wait_s=torch.tensor(self._queue.wait_s, dtype=torch.float64, device="cpu") + self._backend.wait_s.cpu(),
        )

    def gather_stats(self) -> Stats:
        """Everybody's: tokens per expert int64 [E], and waits float64 [P, P] of each rank for each peer. Collective.

        Raises:
            ConfigError: a rank is masked, and the group that would gather them waits for it.
        """
        if self.masked:
            raise ConfigError(
                f"masked: {listed(self.masked)}; the group that gathers statistics would wait there: gather "
                f"buffer.stats in a group of the ranks that are left"
            )
        all_stats: list[Any] = self._members.all_gather(self.stats)
        return Stats(
            num_tokens_per_expert=torch.cat([stats.num_tokens_per_expert for stats in all_stats]),
            wait_s=torch.stack([stats.wait_s for stats in all_stats]),
        )

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        where = f"rank={self.rank}, num_ranks={self.topology.num_ranks}"
        return f"{type(self).__name__}({where}, {self.arena.num_bytes:,} bytes, {state})"

    def _check_overflow(self) -> None:
        for overflow in self._backend.overflows:
            sequence, error = overflow
            if not self._queue.has_unwaited(sequence):  # or ranks would raise in different calls, as it was found
                self._backend.overflows.remove(overflow)
                raise error

    def _check_ready(self) -> None:
        """Raises what keeps the next call from being started."""
        if self._is_closed:
            self._check_open()
        self._queue.check_room()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("the buffer is closed; make a new one")
