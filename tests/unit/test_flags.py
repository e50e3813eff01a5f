"""Flags of ranks that fail: what they void, and what stands, also when a rank fails again and again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.consent import CALL_MASK, Consent, Flag, Kind, Word
from crossdock.errors import PeerFailed

WORD = Word(Kind.DISPATCH, 0)


class Boxes:
    """A Mailbox whose posts arrive at once."""

    def __init__(self, rank, everybody):
        self.rank, self.everybody, self.entries = rank, everybody, {}
        everybody.append(self)

    def post(self, peer, box, index, value):
        self.everybody[peer].entries[box, index, self.rank] = value

    def load(self, box, index, sender):
        return self.entries.get((box, index, sender), 0)

    def write_reason(self, peer, text):
        self.post(peer, "reasons", 0, text)

    def read_reason(self, sender):
        return self.entries["reasons", 0, sender]

    def forget(self, box):
        self.entries = {key: value for key, value in self.entries.items() if key[0] != box}


def two_ranks():
    everybody = []
    return [Consent(Boxes(rank, everybody), rank=rank, num_ranks=2, ring=4) for rank in range(2)]


def begin(consent):
    sequence = consent.take()
    assert consent.may_post(sequence)
    consent.post(sequence, WORD)
    return sequence


def finish(consent, sequence):
    assert len(list(consent.words(sequence, WORD))) == 0, "it waits"
    consent.check(sequence)


@pytest.mark.parametrize("num_failures", [1, 2, 5, 300])
def test_calls_before_a_failure_stand_however_often_the_rank_fails_before_it_is_heard(num_failures):
    quick, slow = two_ranks()
    call = begin(quick)
    assert begin(slow) == call
    finish(quick, call)
    for _ in range(num_failures):
        quick.fail("had enough", first_void=quick.next_sequence)
    finish(slow, call)
    for _ in range(num_failures):
        sequence = slow.take()
        list(slow.opening(sequence))
        slow.post(sequence, WORD)
        with pytest.raises(PeerFailed, match="had enough"):
            list(slow.words(sequence, WORD))
        slow.fail("so has the other", first_void=sequence)
    sequences = [consent.take() for consent in (quick, slow)]
    assert sequences[0] == sequences[1]
    for consent, sequence in zip((quick, slow), sequences, strict=True):
        assert list(consent.opening(sequence)) == []
        consent.post(sequence, WORD)
    finish(quick, sequences[0])
    finish(slow, sequences[1])


@given(
    epoch=st.integers(0, 2**20),
    first_void=st.integers(0, CALL_MASK),
    num_more=st.integers(0, 2**15 - 1),
    distance=st.integers(-(2**15), 2**15 - 1),
)
def test_a_flag_is_read_as_it_was_raised_from_any_epoch_near_it(epoch, first_void, num_more, distance):
    flag = Flag(epoch=epoch, first_void=first_void, num_more=num_more)
    word = flag.packed()
    assert word != 0
    assert -(2**63) <= word < 2**63
    assert Flag.of(word, near=epoch + distance) == flag
    assert Flag.of(0, near=epoch) is None


def test_what_a_flag_voids():
    flag = Flag(epoch=7, first_void=3, num_more=2)
    assert [flag.makes_void(7, call) for call in (2, 3, 4, CALL_MASK)] == [False, True, True, False]
    assert [flag.makes_void(epoch, 0) for epoch in (8, 9, 10)] == [True, True, False]
    assert Flag(epoch=7, first_void=CALL_MASK, num_more=0).makes_void(7, 0), "call numbers come round"
