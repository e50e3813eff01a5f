"""Ranks that are gone, and the others that mask them and go on: on CPUs, and on the CUDA backend in the interpreter."""

import contextlib
import importlib.util
import os
import signal
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch

from crossdock import (
    Buffer,
    Compact,
    ConfigError,
    CrossdockError,
    Expanded,
    Fp32,
    Padded,
    PeerFailed,
    PeerTimeout,
    Spec,
    TransportError,
    autograd,
    run_local,
)
from crossdock.masks import Proposal, drop_picks, find_disagreement, num_words
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, make_case, observed, same_bits
from tests.world import WorkerLost, meet, open_buffer
from tests.worlds.test_combine import row_weights, weights_of_rows

LAYOUTS = [(Compact(), "token"), (Expanded(alignment=4), "rank"), (Padded(), "token"), (STAGED, "token")]
TIMEOUT_S = 40
AT_ONCE_S = 15


def spec_of(layout, reduce, num_ranks):
    return Spec(
        num_experts=2 * num_ranks,
        num_topk=3,
        hidden=16,
        max_tokens=4,
        wire=Fp32(),
        layout=layout,
        reduce=reduce,
        extra_bytes=EXTRA_BYTES,
    )


def cases_without(spec, num_ranks, masked, num_cases=3):
    """Cases to be given to ranks, and what they mean: those masked send nothing and get nothing."""
    num_local = spec.num_experts // num_ranks
    given, meant = [], []
    for seed in range(num_cases):
        tokens = [0 if r in masked else spec.max_tokens - (r + seed) % 2 for r in range(num_ranks)]
        case = make_case(spec, tokens, seed=seed)
        topk = [drop_picks(idx, masked, num_local=num_local) for idx in case.topk]
        g = torch.Generator().manual_seed(seed)
        y = []
        for rows in oracle.rows_of(spec, topk):
            values = torch.randn(len(rows), spec.hidden, generator=g)
            values[[row is None for row in rows]] = float("nan")
            is_padded = isinstance(spec.layout, Padded)
            y.append(values.view(num_local, -1, spec.hidden) if is_padded else values)
        given.append(replace(case, y=y))
        meant.append(replace(case, y=y, topk=topk))
    return given, meant


def caught(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except CrossdockError as error:
        return error
    return None


def rounds(buffer, cases):
    """Dispatches, started apart and at once, and combines, pushed and pulled: what came, and the sums."""
    r, seen = buffer.rank, []
    for number, case in enumerate(cases):
        given = {"weights": case.weights[r], "extras": case.extras[r] if number != 1 else ()}
        if number % 2:
            recv = buffer.dispatch_start(case.x[r], case.topk[r], **given).wait()
        else:
            recv = buffer.dispatch(case.x[r], case.topk[r], **given)
        came = observed(recv)
        weights = case.weights[r] if case.spec.reduce == "token" else row_weights(recv)
        y = case.y[r] if number % 2 == 0 else recv.output_rows().copy_(case.y[r])
        out = buffer.combine(y, recv.plan, weights=weights)
        again = buffer.dispatch(case.x[r], recv.plan, weights=case.weights[r])
        seen.append((came, out, observed(again)))
    buffer.check()
    return seen


def check_rounds(meant, seen):
    """In every round what the oracle says, on the ranks (the keys of ``seen``) of which it is known."""
    for number, case in enumerate(meant):
        has_extras = number != 1
        wants = oracle.received(case.spec, case.topk, case.x, case.weights, case.extras if has_extras else None)
        alone = oracle.received(case.spec, case.topk, case.x, case.weights)
        weights = case.weights if case.spec.reduce == "token" else weights_of_rows(case)
        sums = oracle.combined(case.spec, case.topk, case.flat_y(), weights)
        ranks = range(len(case.x))
        check_received(case, [seen[r][number][0] if r in seen else wants[r] for r in ranks], extras=has_extras)
        check_received(case, [seen[r][number][2] if r in seen else alone[r] for r in ranks], extras=False)
        for rank, rounds_here in seen.items():
            assert same_bits(rounds_here[number][1], sums[rank]), (case.name, rank)


def total(meant, rank):
    """Picks of a rank's experts in all rounds, each of which has two dispatches."""
    return sum(2 * oracle.received(case.spec, case.topk, case.x)[rank]["counts"].long() for case in meant)


def whole_round(buffer, case):
    """As far as it goes: the interpreter runs a dispatch that is only begun to its end."""
    recv = buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank])
    buffer.combine(recv.x.clone(), recv.plan)
    buffer.check()


@contextlib.contextmanager
def in_a_hurry(buffer):
    """In the interpreter no host looks for the gone while a kernel waits, and polls take long."""
    if (launcher := getattr(buffer._backend, "_on", None)) is None:
        yield
        return
    most, launcher.max_polls = launcher.max_polls, 500
    yield
    launcher.max_polls = most


def lose(group, victims, specs, losses):
    """One rank after the other is killed in the middle of a call; the others mask it and go on, with every layout.

    Args:
        losses: by victim, the cases of each spec.
    """
    buffers = [open_buffer(group, spec, timeout_s=TIMEOUT_S) for spec in specs]
    rank, seen = buffers[0].rank, []
    for victim, cases in zip(victims, losses, strict=True):
        olds, outputs, saved = [], [], []
        for buffer, (case, *_) in zip(buffers, cases, strict=True):
            olds.append(buffer.dispatch(case.x[rank], case.topk[rank]))
            outputs.append(olds[-1].x.clone())
            saved.append(autograd.dispatch(buffer, case.x[rank], case.topk[rank]))
        case = cases[0][0]
        if rank == victim:
            buffers[0].dispatch_start(case.x[rank], case.topk[rank])
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with in_a_hurry(buffers[0]):
            lost = caught(whole_round, buffers[0], case)
        assert isinstance(lost, PeerTimeout), repr(lost)
        assert lost.rank == victim
        assert time.monotonic() - began < AT_ONCE_S
        here = []
        for buffer, old, y, kept, each in zip(buffers, olds, outputs, saved, cases, strict=True):
            masked = (*buffer.masked, victim)
            buffer.mask(victim)
            assert buffer.masked == tuple(sorted(masked))
            case = each[0]
            refused = [
                caught(buffer.dispatch, case.x[rank], old.plan),
                caught(buffer.combine, y, old.plan),
                caught(autograd.dispatch, buffer, case.x[rank], kept.plan),
                caught(buffer.gather_stats),
            ]
            before = buffer.stats.num_tokens_per_expert
            got = rounds(buffer, each)
            counted = buffer.stats.num_tokens_per_expert - before
            here.append((refused, got, counted.cpu()))
        seen.append(here)
    return seen


def check_losses(world, victims, layouts=LAYOUTS):
    num_ranks = world.num_ranks
    specs = [spec_of(layout, reduce, num_ranks) for layout, reduce in layouts]
    pairs = [[cases_without(spec, num_ranks, victims[: n + 1]) for spec in specs] for n in range(len(victims))]
    outcomes = world.outcomes(lose, victims, specs, [[given for given, _ in each] for each in pairs])
    survivors = [rank for rank in range(num_ranks) if rank not in victims]
    for rank, outcome in enumerate(outcomes):
        if rank in victims:
            assert isinstance(outcome, WorkerLost)
        elif isinstance(outcome, BaseException):
            raise outcome
    for n, victim in enumerate(victims):
        for i, (_, meant) in enumerate(pairs[n]):
            check_rounds(meant, {rank: outcomes[rank][n][i][1] for rank in survivors})
            for rank in survivors:
                refused, _, counted = outcomes[rank][n][i]
                assert torch.equal(counted, total(meant, rank))
                for error in refused:
                    assert type(error) is ConfigError
                    assert str(victim) in str(error)
                assert all(f"older than the mask of rank {victim}," in str(error) for error in refused[:2])
                assert "older than the mask of" in str(refused[2])
                assert "gather buffer.stats" in str(refused[-1])


@pytest.mark.worlds("processes-4")
def test_ranks_that_are_killed_one_after_the_other_are_masked_and_the_others_go_on(world):
    check_losses(world, (2, 0))


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the kernels are written in Triton")
@pytest.mark.worlds("interpreted-3")
def test_on_cuda_a_killed_rank_is_masked_and_the_others_go_on(world):
    check_losses(world, (1,), LAYOUTS[2:])


SPEC = Spec(num_experts=8, num_topk=2, hidden=8, max_tokens=4, wire=Fp32(), layout=Expanded())
TOPK = torch.tensor([[0, 7], [3, -1], [5, 2], [6, 1]])


def x_of(rank):
    return torch.arange(32, dtype=torch.float32).view(4, 8) + 100 * rank


def check_round(buffer):
    x = x_of(buffer.rank)
    recv = buffer.dispatch(x, TOPK)
    out = buffer.combine(recv.x * 2, recv.plan)
    kept = drop_picks(TOPK, buffer.masked, num_local=8 // buffer.topology.num_ranks)
    assert torch.equal(out, x * 2 * (kept >= 0).sum(1, keepdim=True))
    return recv


def disagree(group):
    """Rank 3 leaves; the others do not say the same of it at first."""
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        if buffer.rank == 3:
            return None
        errors = [caught(buffer.mask, *((1, 3) if buffer.rank == 2 else (3,)))]
        errors.append(caught(buffer.mask, *((1,) if buffer.rank == 0 else (3,))))
        assert not buffer.masked
        buffer.mask(3)
        buffer.mask(3)  # again: nothing changes
        for _ in range(3):
            check_round(buffer)
        return errors, buffer.masked


@pytest.mark.worlds("inproc-4", "processes-4")
def test_nobody_is_masked_by_ranks_that_disagree(world):
    *left, gone = world.run(disagree)
    assert gone is None
    for errors, masked in left:
        assert masked == (3,)
        for error in errors:
            assert type(error) is ConfigError
            assert "do not agree" in str(error)
            assert "nobody was masked" in str(error)


def come_when_they_have_gone_on(group):
    """The others want rank 1 masked, which lives, and do not wait for it; it comes when they have tried twice."""
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        errors = [caught(buffer.mask, 1) for _ in range(2) if buffer.rank != 1]
        meet(group)
        if buffer.rank == 1:
            errors = [caught(buffer.mask, 3)]
        meet(group)
        return errors


@pytest.mark.worlds("inproc-4", "processes-4")
def test_a_rank_that_others_did_not_wait_for_is_told_that_they_have_gone_on(world):
    for rank, errors in enumerate(world.run(come_when_they_have_gone_on)):
        for error in errors:
            assert type(error) is ConfigError
            assert ("has gone on" if rank == 1 else "cannot be masked") in str(error)
            assert "nobody was masked" in str(error)


def mask_the_living(group, comes):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        is_mistaken = buffer.rank != 1 or comes
        error = caught(buffer.mask, 1) if is_mistaken else caught(check_round, buffer)
        assert not buffer.masked
        for _ in range(3):
            check_round(buffer)
        return (error,)


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-4")
@pytest.mark.parametrize("comes", [True, False], ids=["it too", "not itself"])
def test_a_rank_that_lives_is_not_masked_and_all_go_on(world, comes):
    for rank, (error,) in enumerate(world.run(mask_the_living, comes)):
        if rank == 1 and not comes:
            assert type(error) is PeerFailed
        else:
            assert type(error) is ConfigError
            assert "rank 1 cannot be masked" in str(error)
            assert "neither a process that has ended" in str(error)


def mask_while_another_leaves(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        check_round(buffer)
        if buffer.rank == 1:
            return None
        if buffer.rank == 2:
            time.sleep(1)  # the others wait for it
            return None
        error = caught(buffer.mask, 1)
        assert not buffer.masked
        buffer.mask(1, 2)
        check_round(buffer)
        return error, buffer.masked


@pytest.mark.worlds("inproc-4", "processes-4")
def test_a_rank_that_goes_while_the_others_wait_for_its_word_is_named(world):
    for rank, outcome in enumerate(world.run(mask_while_another_leaves)):
        if rank in (0, 3):
            error, masked = outcome
            assert isinstance(error, (PeerFailed, PeerTimeout))
            assert error.rank == 2
            assert masked == (1, 2)


def come_late(group):
    """Rank 0 calls mask() when the other has given up waiting for it; then both do.

    It goes where the other is, and so may meet the other's second try with its first.
    """
    with Buffer(group, replace(SPEC, num_experts=9), timeout_s=1) as buffer:
        if buffer.rank == 1:
            return None
        if buffer.rank == 0:
            time.sleep(2.5)
            buffer._queue._timeout_s = TIMEOUT_S  # the machine may be slow
        error = caught(buffer.mask, 1)
        assert bool(buffer.masked) == (error is None)
        buffer._queue._timeout_s = TIMEOUT_S
        if not buffer.masked:
            buffer.mask(1)
        buffer.dispatch(x_of(buffer.rank), TOPK)
        return (error,)


@pytest.mark.worlds("inproc-3")
def test_a_rank_that_does_not_come_to_mask_is_timed_out_and_all_try_again(world):
    (late,), _, (waited,) = world.run(come_late)
    assert type(waited) is PeerTimeout
    assert waited.rank == 0
    assert "rank 0 did not agree to this mask within timeout_s=1" in str(waited)
    assert late is None or isinstance(late, (PeerFailed, PeerTimeout))


def ask_for_nonsense(group, ranks):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        if buffer.rank == 2:
            return None
        error = caught(buffer.mask, *(ranks if buffer.rank == 0 else (2,)))
        buffer.mask(2)
        check_round(buffer)
        return (error,)


@pytest.mark.worlds("inproc-4")
@pytest.mark.parametrize(
    ("ranks", "text"),
    [((), "was given no rank"), ((4,), "rank 4; ranks are 0 to 3"), ((-1,), "rank -1"), ((2, "2"), "'2', a str")],
    ids=str,
)
def test_arguments_that_make_no_sense_are_told_to_all(world, ranks, text):
    (guilty,), (other,), _, (another,) = world.run(ask_for_nonsense, ranks)
    assert type(guilty) is ConfigError
    assert text in str(guilty)
    for error in (other, another):
        assert type(error) is PeerFailed
        assert error.rank == 0
        assert text in error.reason


def mask_with_calls_in_flight(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        is_left = buffer.rank != 2
        pending = [buffer.dispatch_start(x_of(buffer.rank), TOPK) for _ in range(2)] if is_left else []
        group.all_gather(None)  # else one may be told before its second call
        if not is_left:
            return True
        buffer.mask(2)
        assert all(isinstance(caught(call.wait), TransportError) for call in pending)
        check_round(buffer)
    assert "the buffer is closed" in str(caught(buffer.mask, 3))
    return True


@pytest.mark.worlds("inproc-4")
def test_what_is_in_flight_is_void(world):
    assert all(world.run(mask_with_calls_in_flight))


def test_the_last_rank_goes_on_alone():
    def program(group):
        with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
            if buffer.rank:
                return None
            buffer.mask(1, 2, 3)
            recv = check_round(buffer)
            return buffer.masked, recv.src_idx.tolist()

    assert run_local(program, 4)[0] == ((1, 2, 3), [0, 3])


@pytest.mark.parametrize("num_ranks", [1, 4, 31, 32, 64, 100])
def test_a_proposal_of_any_number_of_ranks_fits_its_words(num_ranks):
    for wanted, gone in [((), ()), ((0,), (0,)), (range(0, num_ranks, 3), range(0, num_ranks, 6))]:
        proposal = Proposal(wanted=frozenset(wanted), gone=frozenset(gone))
        words = proposal.words(num_ranks)
        assert len(words) == num_words(num_ranks)
        assert all(0 <= word < 2**62 for word in words)
        assert Proposal.of(words) == proposal


def test_a_verdict_says_what_is_in_the_way():
    both, one = (Proposal(wanted=frozenset(ranks), gone=frozenset({1})) for ranks in ((1, 2), (1,)))
    assert find_disagreement({0: one, 3: one}) is None
    assert "rank 0 wants rank 1, rank 3 wants ranks 1, 2" in str(find_disagreement({3: both, 0: one}))
    assert "rank 2 cannot be masked: rank 0 sees" in str(find_disagreement({0: both, 3: both}))


def do_as_old_graphs(group, spec, cases):
    """What graphs do that were captured before a rank was masked: picks of its experts, and plans of theirs."""
    with open_buffer(group, spec, timeout_s=TIMEOUT_S) as buffer:
        r = buffer.rank
        x, topk = cases[0].x[r], cases[0].topk[r]
        old = buffer.dispatch(x, topk).plan
        if r == 1:
            return None
        buffer.mask(1)
        picks = torch.tensor([[0, 2, 4]] * x.shape[0])
        with mock.patch.object(
            buffer, "drop_masked", lambda idx: idx if r == 0 else drop_picks(idx, (1,), num_local=2)
        ):
            refused = caught(lambda: (buffer.dispatch(x, picks, rows="capacity"), buffer.check()))
        region = buffer.arena.view(buffer._transport.segment, "data").view(torch.uint8)
        before = region.clone()
        old = old.changed(masked=buffer.masked)
        buffer.dispatch(x, old, rows="capacity")
        out = buffer.combine(torch.ones(*old_rows(spec), spec.hidden), old)
        buffer.check()
        assert torch.equal(region, before), "rows were written"
        assert not out.any()
        return refused, rounds(buffer, cases)


def old_rows(spec):
    num_rows = spec.num_slot_rows(3)
    return (2, num_rows // 2) if isinstance(spec.layout, Padded) else (num_rows,)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the kernels are written in Triton")
@pytest.mark.worlds("interpreted-3")
@pytest.mark.parametrize(("layout", "reduce"), LAYOUTS[1:], ids=repr)
def test_graphs_from_before_a_mask_write_no_rows(world, layout, reduce):
    spec = spec_of(layout, reduce, 3)
    given, meant = cases_without(spec, 3, (1,), num_cases=2)
    first, _, last = world.run(do_as_old_graphs, spec, given)
    assert type(first[0]) is ConfigError
    assert "experts of rank 1" in str(first[0])
    assert "buffer.drop_masked(topk_idx)" in str(first[0])
    assert type(last[0]) is PeerFailed
    assert last[0].rank == 0
    check_rounds(meant, {0: first[1], 2: last[1]})
