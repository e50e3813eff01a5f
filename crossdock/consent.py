"""Who may touch what, when: words, sequence numbers, abort. Logic over a Mailbox that neither waits nor moves rows.

Every collective call begins with one word from each rank to each peer. It says: everything I issued before this is
done, my slot may be overwritten, my outputs may be read. No peer memory is touched before the words of all ranks for
this call have been seen. What has to wait for peers is a generator that yields the peers still missing; whoever drives
it decides how to wait and for how long.

A sequence number has 40 bits: 8 of the epoch, 32 of the call in it. A call that fails on any rank ends the epoch on
all: the rank that fails raises a flag at every peer, which names its first call that is void; a rank that misses
something of such a call fails too, flags it as well, and each goes on with call 0 of the next epoch, once all have left
the one before: so the ranks are in step again, and nothing that was in flight can be mistaken for something later. Both
parts wrap around by themselves (there is no epoch 0, the value of a word that nobody wrote), and are compared as such.

Ranks whose programs have left out or repeated calls are a failure apart: one raises what another has raised a call ago,
and begins an epoch in which the other has waited in vain meanwhile. So a rank that has raised a failure, and begun no
call since, leaves without a word all epochs that peers have ended because they waited too long (``catch_up``); failures
of any other reason it raises, one per call, as its peers did. And ranks may meet on purpose, whatever each has counted:
in boxes of their own (``meet``), where each says how many epochs it has ended, and all begin the one behind the most.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from crossdock.errors import ConfigError, CrossdockError, NotSupported, PeerFailed, PeerTimeout, TransportError
from crossdock.masks import Proposal, num_words

EPOCH_SHIFT = 32
CALL_MASK = 2**EPOCH_SHIFT - 1
SEQUENCE_MASK = 2**40 - 1
NUM_EPOCHS = 255
PAYLOAD_BITS = 24
PAYLOAD_MASK = 2**PAYLOAD_BITS - 1
WORD_BITS = 40
WORD_MASK = 2**WORD_BITS - 1
"""Payload of a begin word; above it, 24 bits of the sequence number: 8 of the epoch, 16 of the call."""
WORD_CALL_BITS = 16
KIND_SHIFT = 38
SLOT_SHIFT = 35
OUTPUT_SHIFT = 32
SLOT_MASK = 7
SIGNATURE_MASK = 2**32 - 1
"""Where a begin word's payload has its fields."""
CALL_SIGNATURE_BITS = 16
"""Of the signature, in which calls of one Spec differ; the others are the Spec's alone."""
PUSHED = 7
"""In place of an output slot: this rank pushes its rows, they are not to be pulled."""
FLAG_EPOCH_BITS = 16
FLAG_EPOCH_SHIFT = 16
MOST_MORE = 2**15 - 1

_WORD_STAMP_MASK = (1 << 64 - WORD_BITS) - 1

PROPOSAL_SHIFT = 24
PROPOSED, HEARD, FIRST_WORD = 0, 1, 2
"""What a rank says where it wants others masked: that its proposal is here, that it has heard all others, and which.

Where ranks restart, the first two: the epoch that it could begin, and the one that all can, once it has heard all."""

REASON_HEADER = struct.Struct("<iB")
"""Who is at fault, and how: it gave up, or was late, over one axis or the other."""
_HOPS: tuple[Literal["scale_up", "scale_out"] | None, ...] = (None, "scale_up", "scale_out")


@dataclass(frozen=True)
class Missing:
    """What a call is waiting for: peers, and what they have not done yet."""

    peers: Sequence[int]
    what: str
    has_sent: bool = False
    """Whether all that peers wait for has been issued, or is up to ``wait()``: the next call may begin."""


Result = TypeVar("Result")
Steps = Generator[Missing, None, Result]
"""What waits on its way to a result."""
Waiting = Steps[None]


class Kind(IntEnum):
    """What a rank is doing; 0 is no word."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Word:
    """What a begin word says besides its sequence number: 40 bits of payload.

    Fields: kind (2 bits); slot (3), where peers may write: a receive slot of a dispatch, a returned slot of a combine;
    output_slot (3), where peers may read a combine's rows, or ``PUSHED``; signature (32), a checksum of what must be
    the same on all ranks (Spec, plan, extras, row mode).
    """

    kind: Kind
    slot: int
    output_slot: int = PUSHED
    signature: int = 0

    @cached_property
    def payload(self) -> int:
        """The word in 40 bits."""
        fields = self.kind << KIND_SHIFT | self.slot << SLOT_SHIFT | self.output_slot << OUTPUT_SHIFT
        return fields | self.signature & SIGNATURE_MASK

    @staticmethod
    def of(payload: int) -> Word:
        """The word from its 40 bits."""
        slot, output_slot = payload >> SLOT_SHIFT & SLOT_MASK, payload >> OUTPUT_SHIFT & SLOT_MASK
        return Word(Kind(payload >> KIND_SHIFT & 3), slot, output_slot, payload & SIGNATURE_MASK)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What a rank that fails raises at its peers, in 64 bits: which calls are void.

    Fields: epoch (16 bits of its number, counted from 0 and not around), which it has ended; first_void (32), the first
    call of that epoch which is void: calls before it stand; num_more (15), how many of the following epochs it has
    ended too, before all its peers had left the first: whole epochs, for nobody can have begun a call in them.
    """

    epoch: int
    first_void: int
    num_more: int

    @property
    def last_ended(self) -> int:
        """The last epoch that it is about."""
        return self.epoch + self.num_more

    def makes_void(self, epoch: int, call: int) -> bool:
        """Whether a call is void by this flag."""
        is_void: bool = epoch <= self.last_ended
        if epoch == self.epoch:
            is_void = (call - self.first_void) & CALL_MASK <= CALL_MASK // 2
        return is_void

    def packed(self) -> int:
        """The flag as a signed 64-bit integer that is not 0."""
        epoch = self.epoch & (1 << FLAG_EPOCH_BITS) - 1
        word = self.first_void << 32 | epoch << FLAG_EPOCH_SHIFT | self.num_more << 1 | 1
        return word - 2**64 if word >= 2**63 else word

    @staticmethod
    def of(word: int, *, near: int) -> Flag | None:
        """The flag from its 64 bits, of the epoch ``near`` this one that they stand for; None: none was raised."""
        if not word:
            return None
        half = 1 << FLAG_EPOCH_BITS - 1
        behind = (near - (word >> FLAG_EPOCH_SHIFT) + half) % (2 * half) - half
        return Flag(epoch=near - behind, first_void=word >> 32 & CALL_MASK, num_more=word >> 1 & MOST_MORE)


class Mailbox(Protocol):
    """Boxes of 64-bit words at every rank, one entry per (index, sender)."""

    def post(self, peer: int, box: str, index: int, value: int) -> None:
        """Writes this rank's entry ``box[index]`` at a peer, after everything this rank wrote before (release)."""

    def load(self, box: str, index: int, sender: int) -> int:
        """Reads a sender's entry here; what it wrote before is visible then (acquire)."""

    def write_reason(self, peer: int, text: bytes) -> None:
        """Leaves a text at a peer, to be read after a flag; what does not fit is cut off."""

    def read_reason(self, sender: int) -> bytes:
        """The text that a sender left here."""

    def forget(self, box: str) -> None:
        """Zeroes this rank's own box."""


def stamped(sequence: int, value: int) -> int:
    """A count or signal on its way: 40 bits of sequence number, 24 of value, as a signed 64-bit integer."""
    word = (sequence & SEQUENCE_MASK) << PAYLOAD_BITS | value
    return word - 2**64 if word >= 2**63 else word


def stamped_word(sequence: int, payload: int) -> int:
    """A begin word on its way: its epoch and the low bits of its call, over 40 bits of payload.

    16 bits of the call's number are enough: an entry of the ring is written anew by every ``ring``-th call.
    """
    word = _word_stamp(sequence) << WORD_BITS | payload
    return word - 2**64 if word >= 2**63 else word


class Consent:
    """One rank's side of the protocol.

    Args:
        mailbox: reaches the peers' boxes.
        rank: this rank.
        num_ranks: P.
        ring: entries per sender in each ring box: a power of two (the call number wraps), at least twice the calls a
            rank may have in flight. With m in flight, a rank posts call n when its own n - m is complete; every peer
            had begun that one, and so had completed n - 2 m.
        first: the first sequence number; all ranks start with the same.
    """

    found: Any = (0,)
    """The first is not 0 once a device has found a failure that this host has not heard of."""

    def __init__(
        self, mailbox: Mailbox, *, rank: int, num_ranks: int, ring: int, first: int = 1 << EPOCH_SHIFT
    ) -> None:
        self._mailbox = mailbox
        self.rank = rank
        self._num_ranks = num_ranks
        self._peers: Sequence[int] = range(num_ranks)
        """Those that take part, this rank included."""
        self._ring = ring
        self.start_from(first)

    def start_from(self, sequence: int) -> None:
        """Makes this the next call's number, on all ranks before any call."""
        self.next_sequence = sequence
        self.num_ended = (sequence >> EPOCH_SHIFT) - 1
        self.taken: int | None = None
        """A number that was taken for a call that has not been started yet."""
        self.is_open = True
        self._flag: Flag | None = None
        self._last_posted = sequence - 1
        self._num_proposals = 0
        self._last_met = 0

    def _restart(self) -> None:
        """Tells a device, if there is one, the number of the next call; nothing of this rank is running."""

    @property
    def epoch(self) -> int:
        """The epoch of the next call, as sequence numbers have it: 1 to 255, then 1 again."""
        return self.num_ended % NUM_EPOCHS + 1

    @property
    def is_fresh(self) -> bool:
        """Whether the epoch has begun by a failure, and no call has been taken in it."""
        return not self.is_open and self.next_sequence & CALL_MASK == 0

    def take(self) -> int:
        """The sequence number of the next call."""
        self.taken = sequence = self.next_sequence
        self.next_sequence = sequence & ~CALL_MASK | (sequence + 1) & CALL_MASK
        return sequence

    def entry(self, sequence: int) -> int:
        """The ring entry of a call."""
        return sequence % self._ring

    def may_post(self, sequence: int) -> bool:
        """Whether the call's word can be given without waiting: its epoch is open, and its turn has come."""
        return self.is_open and (sequence - self._last_posted) & CALL_MASK == 1

    def opening(self, sequence: int) -> Waiting:
        """Done when every rank has left the epochs before the call's, so that it needs no word of them any more."""

        def has_left(peer: int) -> bool:
            flag = self._flag_of(peer)
            return flag is not None and flag.last_ended >= self.num_ended - 1

        if not self.is_open:
            others = [peer for peer in self._peers if peer != self.rank]
            yield from self._until(sequence, has_left, others, "see that an earlier call failed, before")
            self.is_open = True

    def post(self, sequence: int, word: Word) -> None:
        """Gives this rank's word for the call to every rank, itself included."""
        self._last_posted = sequence
        value = stamped_word(sequence, word.payload)
        for peer in self._peers:
            self._mailbox.post(peer, "words", self.entry(sequence), value)

    def words(self, sequence: int, own: Word) -> Steps[Sequence[Word]]:
        """All ranks' words for the call, once they are here.

        Raises:
            PeerFailed: a rank does something else in this call; all ranks find that, and all raise.
        """
        payloads, stamp = dict.fromkeys(self._peers, 0), _word_stamp(sequence)

        def arrived(peer: int) -> bool:
            value = self._mailbox.load("words", self.entry(sequence), peer)
            payloads[peer] = value & WORD_MASK
            return value >> WORD_BITS & _WORD_STAMP_MASK == stamp

        yield from self._until(sequence, arrived, self._peers, "begin")
        words = {peer: Word.of(payloads[peer]) for peer in self._peers}
        for peer, word in words.items():
            if word.kind != own.kind:
                raise mismatch(peer, word, self.rank, own)
        for peer, word in words.items():
            if word.signature != own.signature:
                raise mismatch(peer, word, self.rank, own)
        return [words.get(peer, own) for peer in range(self._num_ranks)]  # nobody looks for rows of a masked rank

    def signal(self, sequence: int) -> None:
        """Tells every rank that all rows this rank owes it in this call are in place."""
        for peer in self._peers:
            self._mailbox.post(peer, "arrived", self.entry(sequence), stamped(sequence, 0))

    def arrivals(self, sequence: int, words: Sequence[Word], *, from_all: bool) -> Waiting:
        """Done when all rows that are owed to this rank are in place: by all ranks, or by those that push."""
        senders = [peer for peer in self._peers if from_all or words[peer].output_slot == PUSHED]

        def arrived(peer: int) -> bool:
            return _is_stamped(self._mailbox.load("arrived", self.entry(sequence), peer), sequence)

        yield from self._until(sequence, arrived, senders, "send its rows of")

    def check(self, sequence: int) -> None:
        """Raises when any peer has given up this call: it is void, and what it let this rank read may have changed."""
        for peer in self._peers:
            if (gone := self._void(peer, sequence)) is not None:
                raise gone

    def exchange_words(self, num_trips: int) -> None:
        """Words to all and from all, so many times, as calls of nothing else: to be timed.

        Raises:
            NotSupported: words are given by the host.
        """
        raise NotSupported("only kernels exchange words without a call; pass device='cuda' to the Buffer")

    def what_holds_addresses(self) -> str | None:
        """Why this rank's memory cannot come to lie elsewhere; None where nothing keeps it."""
        return None

    def settle(self) -> None:
        """Returns once all that was issued to a device is done; here nothing is.

        Raises:
            PeerTimeout: a peer that is waited for is gone.
        """

    def failure(self) -> CrossdockError | None:
        """What has ended the epoch without this rank's host having been told; None here, where the host sees to it."""
        return None

    def fail(self, error: Exception | str, *, first_void: int) -> None:
        """Ends the epoch here and flags it at every peer: all calls from ``first_void`` on are void.

        An error that a peer caused is passed on under that peer's rank.
        """
        culprit = error.rank if isinstance(error, (PeerFailed, PeerTimeout)) else self.rank
        why = error.reason if isinstance(error, PeerFailed) else str(error)
        how = 1 + _HOPS.index(error.hop) if isinstance(error, PeerTimeout) else 0
        reason = REASON_HEADER.pack(culprit, how) + why.encode(errors="replace")
        for box in ("words", "arrived"):  # nobody writes there before it has seen the flag, or only for void calls
            self._mailbox.forget(box)
        if self.is_open or self._flag is None:
            self._flag = Flag(epoch=self.num_ended, first_void=first_void & CALL_MASK, num_more=0)
        else:  # a peer may still be in an epoch that the last flag is about
            self._flag = replace(self._flag, num_more=min(self._flag.num_more + 1, MOST_MORE))
        self._raise_flag(self._flag, reason)
        self._number(self.num_ended + 1, is_open=False)

    def _number(self, num_ended: int, *, is_open: bool) -> None:
        """Goes on with the first call of the epoch behind so many."""
        first = num_ended % NUM_EPOCHS + 1 << EPOCH_SHIFT
        # No call from here on: an interrupt comes before all of it, or after.
        self.num_ended = num_ended
        self.is_open = is_open
        self.next_sequence = first
        self.taken = None
        self._last_posted = first - 1
        self._num_proposals = 0

    def catch_up(self) -> None:
        """Leaves epochs in which peers have waited too long, this rank among those they missed: it has begun no call.

        Only behind a failure, and before the first call of an epoch. See the head of this file.
        """
        num_ended = -1
        while num_ended != self.num_ended and (error := self._missed()) is not None:
            num_ended = self.num_ended
            self.fail(error, first_void=self.next_sequence)

    def _missed(self) -> PeerTimeout | None:
        """Why the epoch has ended without this rank, if it has, because peers waited too long."""
        if not self.is_fresh:
            return None
        errors = (self._void(peer, self.next_sequence) for peer in self._peers if peer != self.rank)
        return next((error for error in errors if isinstance(error, PeerTimeout)), None)

    def meet(self) -> Steps[int]:
        """How many epochs count as ended once all ranks are here, and each knows that of all. Collective.

        To be begun behind a failure. A rank that gives up takes back that it is here, by a negative number.

        Raises:
            PeerFailed: a rank has left.
        """
        own, said, process = self.num_ended + 1, 0, os.getpid()
        others = [peer for peer in self._peers if peer != self.rank]
        is_agreed = False

        def load(index: int, peer: int) -> int:
            return self._mailbox.load("restarts", index, peer)

        try:
            self._tell(PROPOSED, own)
            while True:
                left = [peer for peer in others if self.has_left(peer)]  # before what it says: who has met may leave
                heard = {peer: load(HEARD, peer) for peer in others}
                missing = [peer for peer in others if heard[peer] != said]
                if said and not missing:
                    break
                # Those that have met may propose the next time before others see the end of this. So what is said is
                # taken back only if a peer has heard more from all, which it has not before this rank proposes again.
                if not said or max(heard.values()) > said:
                    proposals = {peer: load(PROPOSED, peer) for peer in others}
                    absent = [peer for peer in others if proposals[peer] <= self._last_met]  # or as it was then
                    target = max([own, *proposals.values(), *heard.values()])  # of ranks that only a peer reaches
                    if not absent and target != said:
                        for box in ("words", "arrived"):  # all have ended their epochs: nothing more comes of those
                            self._mailbox.forget(box)
                        said = target
                        self._tell(HEARD, target)
                        continue
                    missing = sorted(absent, key=lambda peer: proposals[peer] < 0) or missing  # it waited for others
                for peer in missing:
                    if peer in left:
                        raise self.has_closed(peer)
                yield Missing(missing, "come to")
            is_agreed = True
        finally:
            if not is_agreed and os.getpid() == process:
                self._tell(PROPOSED, -own)
        return said

    def begin(self, num_ended: int) -> None:
        """Begins the epoch behind so many, which all ranks have agreed on by ``meet``."""
        self._last_met = num_ended
        self._number(num_ended, is_open=True)
        self._restart()

    def _tell(self, index: int, value: int) -> None:
        """Says something of a restart to all others."""
        for peer in self._peers:
            if peer != self.rank:
                self._mailbox.post(peer, "restarts", index, value)

    def propose(self, proposal: Proposal, is_gone: Callable[[int], bool]) -> Steps[dict[int, Proposal]]:
        """Whom the ranks want masked that this one does not, once each of them has heard all that is awaited here.

        A rank that is gone, and that another wants masked, is not awaited.

        Raises:
            PeerFailed: a rank gave up, or has left and nobody wants it masked.
        """
        self._num_proposals += 1
        number = (self.num_ended + 1) << PROPOSAL_SHIFT | self._num_proposals
        heard = {self.rank: proposal}
        listeners = [peer for peer in self._peers if peer != self.rank and not is_gone(peer)]
        awaited = [peer for peer in self._peers if peer != self.rank and peer not in proposal.wanted]
        load = self._mailbox.load
        ahead: set[int] = set()

        def has_gone_on(box: int, peer: int) -> bool:
            """Whether it is at a later proposal of this epoch: it does not wait for one that it wants masked itself."""
            said = load("masks", box, peer)
            return said > number and said >> PROPOSAL_SHIFT == number >> PROPOSAL_SHIFT

        def has_proposed(peer: int) -> bool:
            if peer not in heard and has_gone_on(PROPOSED, peer):
                ahead.add(peer)
                return True
            if load("masks", PROPOSED, peer) == number:
                words = [load("masks", FIRST_WORD + at, peer) for at in range(num_words(self._num_ranks))]
                if load("masks", PROPOSED, peer) == number:  # else it has failed meanwhile, and proposes something else
                    heard[peer] = Proposal.of(words)
            return peer in heard or (is_gone(peer) and any(peer in other.wanted for other in heard.values()))

        for peer in listeners:
            for at, word in enumerate(proposal.words(self._num_ranks)):
                self._mailbox.post(peer, "masks", FIRST_WORD + at, word)
            self._mailbox.post(peer, "masks", PROPOSED, number)
        yield from self._until_agreed(has_proposed, awaited, is_gone)
        for peer in listeners:
            self._mailbox.post(peer, "masks", HEARD, number)
        heeded = [peer for peer in awaited if peer in heard]
        yield from self._until_agreed(
            lambda peer: load("masks", HEARD, peer) == number or has_gone_on(HEARD, peer), heeded, is_gone
        )
        if ahead:
            raise ConfigError(
                f"ranks do not agree on who is masked: rank {min(ahead)} has gone on without having waited for this "
                f"rank; nobody was masked: call mask() with the same ranks on all that are left"
            )
        return heard

    def _until_agreed(
        self, arrived: Callable[[int], bool], senders: Sequence[int], is_gone: Callable[[int], bool]
    ) -> Waiting:
        """Yields the senders still missing until there are none: of those that are gone, not before the others."""
        missing = list(senders)
        while missing := [peer for peer in missing if not arrived(peer)]:
            flags = [flag for peer in senders if (flag := self._void(peer, self.next_sequence)) is not None]
            if flags and not all(map(arrived, missing)):
                raise flags[0]
            living = [peer for peer in missing if not is_gone(peer)]
            if not living and self.has_left(missing[0]) and not arrived(missing[0]):
                raise self.has_closed(missing[0])
            yield Missing(living or missing, "agree to")

    def mask(self, ranks: Sequence[int]) -> None:
        """These take part in nothing any more: no word goes to them, and none of theirs counts.

        To have agreed on it was the first call of an epoch. One on which ranks did not agree has no number, so that
        they are still in step with a rank that was none of them.
        """
        self._last_posted, self.taken = self.take(), None
        self._peers = [peer for peer in self._peers if peer not in ranks]

    def leave(self) -> None:
        """Tells every peer that this rank takes part in nothing any more."""
        for peer in self._peers:
            if peer != self.rank:
                self._mailbox.post(peer, "closed", 0, 1)

    def _until(self, sequence: int, arrived: Callable[[int], bool], senders: Sequence[int], what: str) -> Waiting:
        """Yields the senders still missing until there are none; fails when any rank has given up the call."""
        missing = list(senders)
        while missing := [peer for peer in missing if not arrived(peer)]:
            left = [peer for peer in missing if self.has_left(peer)]  # before flags: who fails and leaves has failed
            flags = [flag for peer in self._peers if (flag := self._void(peer, sequence)) is not None]
            # Looked at again: a rank does its part before it fails or leaves, and what is here is judged by itself.
            if flags and not all(map(arrived, missing)):
                raise flags[0]
            for peer in left:
                if not arrived(peer):
                    raise self.has_closed(peer)
            yield Missing(missing, what)

    def _raise_flag(self, flag: Flag, reason: bytes) -> None:
        """Leaves a flag at every peer, and before it the reason, a header and a text."""
        for peer in self._peers:
            if peer != self.rank:
                self._mailbox.write_reason(peer, reason)
                self._mailbox.post(peer, "aborts", 0, flag.packed())

    def _flag_of(self, peer: int) -> Flag | None:
        """What a peer has raised here last."""
        return Flag.of(self._mailbox.load("aborts", 0, peer), near=self.num_ended)

    def _void(self, peer: int, sequence: int) -> TransportError | None:
        """The error to raise when a peer has given up the call, which is one of this rank's epoch."""
        flag = self._flag_of(peer)
        if flag is None or not flag.makes_void(self.num_ended, sequence & CALL_MASK):
            return None
        reason = self._mailbox.read_reason(peer)
        culprit, how = REASON_HEADER.unpack_from(reason)
        why = reason[REASON_HEADER.size :].rstrip(b"\0").decode(errors="ignore")
        return PeerTimeout(culprit, why, _HOPS[how - 1]) if how else PeerFailed(culprit, why)

    def suspect(self, sequence: int, missing: Sequence[int]) -> int:
        """Whose fault it is that a call waits for these; asked from half of the deadline on, again and again."""
        return missing[0]

    def hop_to(self, peer: int) -> Literal["scale_up", "scale_out"] | None:
        """The axis over which a peer is reached; None where there is but one."""
        return None

    def described(self, peer: int) -> str:
        """A rank in words."""
        return f"rank {peer}"

    def has_closed(self, peer: int) -> PeerFailed:
        """The error of a peer that takes part in nothing any more."""
        return PeerFailed(peer, "it has closed its buffer")

    def has_left(self, peer: int) -> bool:
        """Whether a peer has closed its buffer."""
        return self._mailbox.load("closed", 0, peer) != 0


def mismatch(peer: int, theirs: Word, rank: int, own: Word) -> PeerFailed:
    """The error of a peer that does something else in this call."""
    if theirs.kind != own.kind:
        return PeerFailed(
            peer,
            f"it is in {theirs.kind} while rank {rank} is in {own.kind}; all ranks issue the same calls in the same "
            f"order",
        )
    if (theirs.signature ^ own.signature) >> CALL_SIGNATURE_BITS:
        return PeerFailed(
            peer,
            f"its {theirs.kind} is of another Spec than that of rank {rank}, or its Buffers were made in another "
            f"order; all ranks make the same Buffers in the same order, and the same calls of each",
        )
    return PeerFailed(
        peer,
        f"its {theirs.kind} differs from that of rank {rank}; plan, rows=, the presence of weights and extras, and the "
        f"extras' dtypes and trailing shapes must be the same on all ranks",
    )


def _word_stamp(sequence: int) -> int:
    return (sequence >> EPOCH_SHIFT & 0xFF) << WORD_CALL_BITS | sequence & (1 << WORD_CALL_BITS) - 1


def _is_stamped(value: int, sequence: int) -> bool:
    return value >> PAYLOAD_BITS & SEQUENCE_MASK == sequence
