"""Consent over two axes: words of mates by memory, of rail peers by notes; and whom a wait is about.

A rank hears of its mates and its rail peers alone. All other ranks are two steps away: whoever sees a flag fails, and
raises a flag of its own. A rank that waits for one that waits itself is told so: from half of the deadline on every
waiting rank says whom its waiting is about, the peer that it misses or whom that peer has named, and says it again when
that changes. At the deadline it raises for the end of that chain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from crossdock.consent import (
    WORD_BITS,
    WORD_MASK,
    Consent,
    Steps,
    Waiting,
    Word,
    stamped,
    stamped_word,
)
from crossdock.errors import TransportError
from crossdock.transport.nodes import NodesTransport

_NEED_SHIFT = 16
"""Of a need: 24 bits of rows over 16 of the rank or expert."""


class NodesConsent(Consent):
    """One rank's side of the protocol among several nodes."""

    def __init__(self, transport: NodesTransport, *, ring: int) -> None:
        super().__init__(transport, rank=transport.rank, num_ranks=transport.num_ranks, ring=ring)
        self._transport = transport
        self._peers = transport.peers
        self._mates: Sequence[int] = transport.mates
        self._said: tuple[int, int] | None = None
        """Call and culprit, as this rank has told them last."""

    @property
    def _rail(self) -> Collection[int]:
        return self._transport.rail_peers.values()

    def post(self, sequence: int, word: Word) -> None:
        """See Consent."""
        if self._said is not None:
            self._tell_about(0)
            self._said = None
        super().post(sequence, word)

    def tell(self, sequence: int) -> None:
        """Tells mates that their tables have this rank's counts, and those that its rail peers have told it."""
        for mate in self._mates:
            self._transport.post(mate, "told", self.entry(sequence), stamped(sequence, 0))

    def told(self, sequence: int) -> Waiting:
        """Done when all mates have written their counts here."""
        yield from self._until(sequence, self._is_posted("told", sequence), self._mates, "tell its counts of")

    def signal(self, sequence: int) -> None:
        """Tells mates that all rows this rank owes them are in place, or that its outputs are."""
        for mate in self._mates:
            self._transport.post(mate, "arrived", self.entry(sequence), stamped(sequence, 0))

    def arrivals(self, sequence: int, words: Sequence[Word], *, from_all: bool) -> Waiting:
        """Done when all mates have signalled."""
        yield from self._until(sequence, self._is_posted("arrived", sequence), self._mates, "send its rows of")

    def tell_need(self, sequence: int, needed: int, worst: int) -> None:
        """Tells rail peers the most rows that a rank (Padded: an expert) of this node needs room for; 0: all fit."""
        for peer in self._rail:
            value = stamped_word(sequence, needed << _NEED_SHIFT | worst)
            self._transport.post(peer, "needs", self.entry(sequence), value)

    def needs(self, sequence: int) -> dict[int, tuple[int, int]]:
        """By rail peer, the rows for which its node has no room, and of whom; of those that have come."""
        return {peer: need for peer in self._rail if (need := self._need_of(sequence, peer)) is not None}

    def _need_of(self, sequence: int, peer: int) -> tuple[int, int] | None:
        value = self._transport.load("needs", self.entry(sequence), peer)
        if value >> WORD_BITS != stamped_word(sequence, 0) >> WORD_BITS:
            return None
        payload = value & WORD_MASK
        return payload >> _NEED_SHIFT, payload & (1 << _NEED_SHIFT) - 1

    def all_needs(self, sequence: int) -> Steps[dict[int, tuple[int, int]]]:
        """Those of all rail peers, once they are here."""
        yield from self._until(
            sequence,
            lambda peer: self._need_of(sequence, peer) is not None,
            [*self._rail],
            "say whether its node has room in",
        )
        return self.needs(sequence)

    def trouble(self, sequence: int, awaited: Sequence[int]) -> TransportError | None:
        """Why the call will not go on, unless what it waits for is here: a peer has given it up, or has left.

        To be asked before another look at what has come: a rank does its part before it fails or leaves.
        """
        for peer in awaited:
            if self.has_left(peer):
                return self.has_closed(peer)
        return next((error for peer in self._peers if (error := self._void(peer, sequence)) is not None), None)

    def suspect(self, sequence: int, missing: Sequence[int]) -> int:
        """See Consent."""
        culprit, seen = missing[0], {self.rank}
        while (named := self._named_by(culprit)) is not None and culprit not in seen:
            seen.add(culprit)
            culprit = named
        if culprit == self.rank:
            culprit = missing[0]
        if self._said != (sequence, culprit):
            self._said = sequence, culprit
            self._tell_about(culprit + 1)
        return culprit

    def hop_to(self, peer: int) -> Literal["scale_up", "scale_out"] | None:
        """See Consent."""
        return "scale_up" if peer in self._transport.mates else "scale_out"

    def described(self, peer: int) -> str:
        """See Consent."""
        node, local = divmod(peer, self._transport.node_size)
        return f"rank {peer} (node {node}, local {local})"

    def _tell_about(self, number: int) -> None:
        for peer in self._peers:
            if peer != self.rank:
                self._transport.post(peer, "about", 0, stamped(self.next_sequence, number))

    def _named_by(self, peer: int) -> int | None:
        """Whom a peer says it waits for, if it has said so in this epoch."""
        if peer not in self._peers or peer == self.rank:
            return None
        value = self._transport.load("about", 0, peer)
        number = value & 0xFFFFFF
        is_now = (value ^ stamped(self.next_sequence, 0)) >> 56 == 0
        return number - 1 if number and is_now else None

    def _is_posted(self, box: str, sequence: int) -> Callable[[int], bool]:
        stamp = stamped(sequence, 0)

        def is_posted(peer: int) -> bool:
            return self._transport.load(box, self.entry(sequence), peer) == stamp

        return is_posted

    def mask(self, ranks: Sequence[int]) -> None:
        """See Consent. Of nodes, whole ones."""
        super().mask(ranks)
        self._mates = [mate for mate in self._mates if mate not in ranks]
