"""A rank's side of the protocol where kernels give and read the words; the host sees to what has failed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from crossdock.backends.cuda.kernels import calls, sync
from crossdock.backends.cuda.kernels.calls import (
    ARRIVE,
    BEGUN,
    CURRENT,
    NEXT,
    NUM_ENDED,
    NUM_MASKED,
    PROGRESS,
    SEQUENCE,
    STATE_WORDS,
    STATUS,
)
from crossdock.backends.cuda.launch import Launch
from crossdock.backends.cuda.plan import DevicePlan
from crossdock.backends.cuda.state import CallState
from crossdock.backends.cuda.stream import CallStreams
from crossdock.consent import (
    CALL_MASK,
    KIND_SHIFT,
    PAYLOAD_BITS,
    REASON_HEADER,
    WORD_BITS,
    Consent,
    Flag,
    Kind,
    Missing,
    Word,
    mismatch,
    stamped,
    stamped_word,
)
from crossdock.errors import ConfigError, CrossdockError, PeerFailed, PeerTimeout
from crossdock.masks import listed
from crossdock.routing import check_picks

_LOOK_S = 0.05
"""How often a host that waits looks whether its peers still exist."""
_GONE_S = 0.5
"""A peer that is gone, and whose part of the call is missing still after this time, will not do it."""
_NUM_PICKS = 16
"""Dispatches that are kept until nobody can ask for their picks."""
_REASON_S = 1.0
"""How long a host looks for the reason of a peer whose word says that it refuses its own call."""


class Passing(Protocol):
    """What the host may wait for."""

    def query(self) -> bool:
        """Whether it has passed."""


class DeviceConsent(Consent):
    """Consent whose words are posted and awaited by one-program kernels; ``state`` on the device counts the calls.

    Sequence numbers here are those of the calls that this host has issued. The device has its own, which also count
    what a replayed graph does; they are read when a call fails, and set for the next epoch.
    """

    def __init__(self, on: CallState, streams: CallStreams) -> None:
        self._on = on
        self._streams = streams
        self.found = on.host_failure.numpy()  # to be looked at before each call
        self._exchange = Launch(streams, calls.exchange_words, 1, (on.calls[0], on.of_words()), {}, {"num_warps": 1})
        self._transport = transport = on.transport
        self.recent_plans: deque[DevicePlan] = deque(maxlen=_NUM_PICKS)
        """Of fresh dispatches, to say what is wrong with their picks if the device refuses them."""
        self.owes_arrival = False
        """Whether the last call that was issued does not tell yet that this rank's rows are in place."""
        super().__init__(transport, rank=transport.rank, num_ranks=transport.num_ranks, ring=on.control.ring)

    def start_from(self, sequence: int) -> None:
        """See Consent. Nothing of this rank may be running."""
        super().start_from(sequence)
        self._restart()

    @property
    def is_fresh(self) -> bool:
        """See Consent. Graphs begin calls without this host."""
        return super().is_fresh and self._state()[NEXT.value] == self.next_sequence

    def mask(self, ranks: Sequence[int]) -> None:
        """See Consent."""
        super().mask(ranks)
        self._restart()

    def may_post(self, sequence: int) -> bool:
        """Never ahead of the calls before it: counts, words and plan of a call follow each other."""
        return False

    def exchange_words(self, num_trips: int) -> None:
        """See Consent. Issued behind the calls before, whose numbers go on on the device alone, as in a graph."""
        payload = Word(Kind.COMBINE, 0).payload
        self._exchange(0, self._streams.enter(), payload, self._on.rank, self._on.max_polls, num_trips)

    def what_holds_addresses(self) -> str | None:
        """See Consent. What a graph gives are rows at addresses, also when it is replayed."""
        if not self._streams.has_captured and not _has_private_pools():
            return None
        return (
            "calls may have been captured in a CUDA graph (or memory of torch has a pool of its own), and graphs hold "
            "addresses of rows; give the connection all the memory that it needs before you capture"
        )

    def settle(self) -> None:
        """See Consent. Of a call that is being captured nothing runs, and CUDA allows no look at any stream."""
        if torch.cuda.is_current_stream_capturing():
            return
        for stream in self._streams.all:
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            for num_polls, _ in enumerate(self.until(event, "do its part of the last call")):
                self._transport.idle(num_polls)

    def until(self, event: Passing, what: str) -> Generator[Missing, None, None]:
        """Done when the event has passed: on the device everything has its deadline.

        Raises:
            PeerTimeout: a peer's process has ended, and its part of the call is missing.
        """
        looked = time.perf_counter()
        gone_since: dict[int, float] = {}
        while not event.query():
            now = time.perf_counter()
            if now - looked > _LOOK_S:
                looked = now
                for peer in self._peers:
                    if peer == self.rank or self._transport.is_alive(peer):
                        continue
                    if now - gone_since.setdefault(peer, now) > _GONE_S and not self._has_done_its_part(peer):
                        raise PeerTimeout(peer, f"rank {peer} did not {what} and is gone: its process ended, or its "
                                          f"buffer was dropped; the call is void")  # fmt: skip
            yield Missing((), what)

    def failure(self) -> CrossdockError | None:
        """What the device has found, from the record that it left in host memory.

        A ConfigError if it is this rank's own picks that are not allowed. While a graph is captured, in which CUDA
        allows no look at device memory, less is said, and said again by the first call after that.
        """
        if self.found[0] == sync.OK.value:
            return None
        status, peer, phase, expected, seen = self.found.tolist()
        if status == sync.TIMED_OUT.value:
            did = "send its rows of" if phase == ARRIVE.value else "begin"
            within = f"within timeout_s={self._on.timeout_s:g}"
            return PeerTimeout(peer, f"rank {peer} did not {did} this call {within}; the call is void")
        if torch.cuda.is_current_stream_capturing() and (status == sync.ABORTED.value or seen >> KIND_SHIFT == 0):
            return PeerFailed(
                peer,
                "it gave up a call before this capture; what it says of that can be read once the capture has ended",
            )
        if status == sync.ABORTED.value:
            return self._void(peer, self._state()[CURRENT.value]) or PeerFailed(peer, "it gave up")
        if seen >> KIND_SHIFT == 0:
            return self._own_refusal() if peer == self.rank else self._refusal(peer)
        return mismatch(peer, Word.of(seen), self.rank, Word.of(expected))

    def fail(self, error: Exception | str, *, first_void: int) -> None:
        """See Consent. Ends the waits of this rank's kernels, and lets them run out, before the next epoch begins.

        Which call is the first that is void, the device knows. Of a call that is being captured nothing runs, and no
        peer can be told: CUDA allows no look at any stream.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        if not self._streams.is_idle:
            current = self._state()[CURRENT.value]
            flag = Flag(epoch=self.num_ended, first_void=current & CALL_MASK, num_more=0)
            self._mailbox.post(self.rank, "aborts", 0, flag.packed())
        self._streams.synchronize()
        self.recent_plans.clear()
        super().fail(error, first_void=self._first_void())
        self._restart()

    def leave(self) -> None:
        """See Consent. A flag ends the waits of peers for calls that this rank does not take part in."""
        if self.is_open and self.failure() is None:
            flag = Flag(epoch=self.num_ended, first_void=self._first_void(), num_more=0)
            self._raise_flag(flag, REASON_HEADER.pack(self.rank, 0) + b"it has closed its buffer")
        super().leave()

    def _refusal(self, peer: int) -> PeerFailed:
        """The error of a peer whose picks are not allowed: in its own words, once its host has seen it."""
        until = time.monotonic() + _REASON_S
        while time.monotonic() < until:
            if isinstance(error := self._void(peer, self._state()[CURRENT.value]), PeerFailed):
                return error
            time.sleep(1e-3)
        return PeerFailed(peer, "its topk_idx has a value that is no expert, or one expert twice")

    def _own_refusal(self) -> ConfigError:
        for plan in self.recent_plans:
            if plan.host_counts is not None and plan.host_counts.is_captured:
                continue  # a graph's: what lies there now is of another replay
            try:
                check_picks(plan.topk_idx.cpu(), num_experts=plan.shape.num_counts - self._num_ranks)
            except ConfigError as error:
                return error
        return ConfigError(
            f"topk_idx has a value that is no expert of the Spec (nor -1, for no pick), or one expert twice; a graph "
            f"was replayed with it, or it was many calls ago{self._of_masked()}"
        )

    def _of_masked(self) -> str:
        """What else a graph may have done that was captured before ranks were masked."""
        masked = sorted(set(range(self._num_ranks)) - set(self._peers))
        if not masked:
            return ""
        return (
            f". Or it was replayed with picks of experts of {listed(masked)}, and captured before they were masked: "
            f"give it buffer.drop_masked(topk_idx), or capture it again"
        )

    def _has_done_its_part(self, peer: int) -> bool:
        """Whether a peer's word for the call under way is here, and its rows."""
        current = self._state()[CURRENT.value]
        entry, load = self.entry(current), self._mailbox.load
        has_begun = load("words", entry, peer) >> WORD_BITS == stamped_word(current, 0) >> WORD_BITS
        return has_begun and load("arrived", entry, peer) >> PAYLOAD_BITS == stamped(current, 0) >> PAYLOAD_BITS

    def _first_void(self) -> int:
        """The first call that this rank does not do its part of: the one that failed, or that is still to send rows.

        None: the next one.
        """
        state = self._state()
        with torch.cuda.stream(self._transport.stream):
            progress: list[list[int]] = self._on.calls[:, self._num_ranks :].tolist()
        is_current = self.owes_arrival or state[STATUS.value] != sync.OK.value
        first: int = state[CURRENT.value if is_current else NEXT.value]
        owed: list[int] = [call[SEQUENCE.value] for call in progress if call[PROGRESS.value] == BEGUN.value]
        earliest: int = min([first, *owed], key=lambda call: (call - first + CALL_MASK // 2) & CALL_MASK) & CALL_MASK
        return earliest

    def _state(self) -> list[int]:
        with torch.cuda.stream(self._transport.stream):
            state: list[int] = self._on.state.tolist()
        return state

    def _restart(self) -> None:
        """The device begins the next call with its number; nothing of this rank is running."""
        state = [0] * STATE_WORDS.value
        state[NEXT.value], state[CURRENT.value] = self.next_sequence, self.next_sequence
        state[NUM_ENDED.value], state[STATUS.value] = self.num_ended, sync.OK.value
        state[NUM_MASKED.value] = self._num_ranks - len(self._peers)
        self.owes_arrival = False
        with torch.cuda.stream(self._transport.stream):
            self._on.state[: len(state)].copy_(torch.tensor(state, dtype=torch.int64, device="cpu"))
            self._on.calls.zero_()
            self._on.failure.zero_()
            self._on.flags.zero_()
        self._transport.stream.synchronize()
        self._on.host_failure.zero_()


def _has_private_pools() -> bool:
    """Whether torch keeps memory apart, as it does for what a graph has allocated while it was captured."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return any(tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) for segment in segments)
