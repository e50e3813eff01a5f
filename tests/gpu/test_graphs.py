"""Calls that are captured once and replayed, with other inputs in the same places, and other calls in between."""

from dataclasses import replace

import pytest
import torch

from crossdock import Bf16, CapacityError, Compact, ConfigError, Expanded, Fp8, Padded
from tests import oracle
from tests.cases import check_received, make_case, observed, raw_rows, same_bits
from tests.gpu.specs import ALIGNED, STAGED, spec_of
from tests.world import open_buffer
from tests.worlds.test_dispatch import spec_of as spec_of_two

NUM_REPLAYS = 100


class Step:
    """One layer's calls on inputs that stay where they are: captured once, replayed with what ``give`` puts there."""

    def __init__(self, buffer, case, *, is_cached, pulls):
        r, self.buffer = buffer.rank, buffer
        self.inputs = [case.x[r].clone(), case.topk[r].clone(), case.weights[r].clone()]
        self._routing = buffer.dispatch(self.inputs[0], self.inputs[1]).plan if is_cached else self.inputs[1]
        self._rows = None if is_cached else "capacity"
        self._pulls = pulls
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = self.run()

    def run(self):
        """Rows as they came, where from, picks of each expert, and the sums of twice the rows."""
        x, _, weights = self.inputs
        recv = self.buffer.dispatch(x, self._routing, rows=self._rows)
        rows = recv.x if isinstance(recv.x, torch.Tensor) else recv.x.data
        y = 2 * rows.to(self.buffer.spec.combine_dtype)
        if self._pulls:
            y = recv.output_rows().copy_(y)
        weights = weights if self.buffer.spec.reduce == "token" else None
        out = self.buffer.combine(y, recv.plan, weights=weights)
        return rows.clone(), recv.src_idx.clone(), recv.num_tokens_per_expert.clone(), out

    def give(self, case):
        r = self.buffer.rank
        for here, there in zip(self.inputs, (case.x[r], case.topk[r], case.weights[r]), strict=True):
            here.copy_(there)

    def replay(self):
        """Copies of what ``run`` gave."""
        self._graph.replay()
        return [tensor.clone() for tensor in self._results]


def same_results(a, b):
    """In all rows that came."""
    is_row = (a[1] >= 0).flatten()
    rows = [raw_rows(results[0].reshape(is_row.numel(), -1))[is_row] for results in (a, b)]
    return torch.equal(*rows) and all(same_bits(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def replay_many(group, cases, is_cached, pulls, first=None):
    """What each case gives, in replays that all agree, and whether calls in between always gave the same.

    ``first``: the number of the first call.
    """
    with open_buffer(group, cases[0].spec) as buffer:
        r = buffer.rank
        if first is not None:
            buffer._consent.start_from(first)
        step = Step(buffer, cases[0], is_cached=is_cached, pulls=pulls)
        seen, eager = [], []
        for number in range(NUM_REPLAYS):
            case = cases[number % len(cases)]
            step.give(case)
            results = step.replay()
            if number < len(cases):
                seen.append(results)
            assert same_results(results, seen[number % len(cases)]), number
            if number % 7 == 3:
                recv = buffer.dispatch(cases[1].x[r], cases[1].topk[r])
                eager.append(buffer.combine(cases[1].y[r], recv.plan))
        buffer.check()
        assert all(same_bits(out, eager[0]) for out in eager)
        return seen, eager[0]


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("layout", "reduce", "way", "pulls"),
    [
        (Compact(), "token", "cached", False),
        (Compact(), "rank", "capacity", True),
        (ALIGNED, "rank", "cached", True),
        (ALIGNED, "token", "capacity", False),
        (Padded(), "token", "cached", True),
        (Padded(), "rank", "capacity", False),
    ],
    ids=repr,
)
def test_replays_give_what_their_inputs_mean_now(world, layout, reduce, way, pulls):
    cases = [make_case(spec_of(layout, reduce), [9] * world.num_ranks, seed=seed) for seed in range(3)]
    got = world.run(replay_many, cases, way == "cached", pulls)
    check_replays(cases, got, is_cached=way == "cached")


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("launch", "layout", "wire", "reduce"),
    [
        ({"expand": "receiver"}, ALIGNED, Fp8(block=8), "rank"),
        ({"expand": "receiver"}, Padded(), Bf16(), "token"),
        ({}, STAGED, Fp8(block=8), "rank"),
        ({"num_sms": 1}, ALIGNED, Fp8(block=8), "token"),
    ],
    ids=repr,
)
def test_replays_give_what_their_inputs_mean_now_however_rows_are_moved(world, launch, layout, wire, reduce):
    cases = [make_case(spec_of(layout, reduce, wire), [9] * world.num_ranks, seed=seed) for seed in range(3)]
    got = world.opening(**launch).run(replay_many, cases, False, False)
    check_replays(cases, got, is_cached=False)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("first", [2**40 - 101, 3 * 2**32 - 77], ids=hex)
def test_replays_go_on_when_the_numbers_of_calls_come_round(world, first):
    cases = [make_case(spec_of_two(Compact()), [9] * world.num_ranks, seed=seed) for seed in range(3)]
    check_replays(cases, world.run(replay_many, cases, False, False, first), is_cached=False)


def replay_here_and_run_there(group, cases, first):
    """Several graphs of one buffer, of other numbers of tokens; every other rank replays, while the others run."""
    with open_buffer(group, cases[0].spec) as buffer:
        buffer._consent.start_from(first)
        steps = [Step(buffer, case, is_cached=False, pulls=True) for case in cases]
        seen = [step.replay() for step in steps]
        for number in range(NUM_REPLAYS):
            step, want = steps[number % len(steps)], seen[number % len(steps)]
            replays = (number // len(steps) + buffer.rank) % 2
            results = step.replay() if replays else [tensor.clone() for tensor in step.run()]
            assert same_results(results, want), number
        buffer.check()
        recv = buffer.dispatch(cases[1].x[buffer.rank], cases[1].topk[buffer.rank])
        return seen, buffer.combine(cases[1].y[buffer.rank], recv.plan)


@pytest.mark.worlds("cuda-2", "cuda-4")
@pytest.mark.parametrize("layout", [Padded(), Expanded()], ids=repr)
def test_one_rank_may_replay_what_another_runs_of_whole_calls_whose_numbers_come_round(world, layout):
    spec = spec_of(layout, "token", Fp8(block=8))
    cases = [make_case(spec, [tokens] * world.num_ranks, seed=tokens) for tokens in (9, 4, 1)]
    got = world.run(replay_here_and_run_there, cases, 2**40 - 131)
    check_replays(cases, got, is_cached=False)


def check_replays(cases, got, *, is_cached):
    for i, given in enumerate(cases):
        case = replace(given, topk=cases[0].topk) if is_cached else given
        spec, results = case.spec, [seen[i] for seen, _ in got]
        came = [
            {"data": rows.reshape(-1, spec.hidden), "src_idx": src_idx.flatten(), "counts": counts}
            for rows, src_idx, counts, _ in results
        ]
        wants = oracle.received(spec, case.topk, case.x)
        for mine, want in zip(came, wants, strict=True):
            mine |= {name: want[name] for name in want.keys() - mine.keys()}  # scales and picks are test_dispatch's
        check_received(case, came, weights=False, extras=False)
        ys = [2 * want["data"].to(spec.combine_dtype) for want in wants]
        sums = oracle.combined(spec, case.topk, ys, case.weights if spec.reduce == "token" else None)
        assert all(same_bits(mine[3], want) for mine, want in zip(results, sums, strict=True))
    for (_, eager), want in zip(got, oracle.combined(cases[1].spec, cases[1].topk, cases[1].flat_y()), strict=True):
        assert same_bits(eager, want)


def err_in_a_capture(group, case):
    """A call with rows that are too short, while a graph is captured; and one that is right, afterwards."""
    with open_buffer(group, case.spec) as buffer:
        x, topk = case.x[buffer.rank], case.topk[buffer.rank]
        plan = buffer.dispatch(x, topk).plan
        with pytest.raises(ConfigError, match="hidden="), torch.cuda.graph(torch.cuda.CUDAGraph()):
            buffer.dispatch(x.clone()[:, :-1], plan)
        return observed(buffer.dispatch(x, topk, weights=case.weights[buffer.rank], extras=case.extras[buffer.rank]))


@pytest.mark.worlds("cuda-2")
def test_bad_input_in_a_capture_is_an_error_and_the_next_call_works(world):
    case = make_case(spec_of_two(Compact()), [9] * world.num_ranks)
    check_received(case, world.run(err_in_a_capture, case))


def overflow_in_a_replay(group, fits, overflows):
    """A replay that fits, one that does not, what ``check`` says, and one that fits."""
    with open_buffer(group, fits.spec) as buffer:
        step = Step(buffer, fits, is_cached=False, pulls=False)
        first = step.replay()
        buffer.check()
        step.give(overflows)
        nothing = step.replay()
        with pytest.raises(CapacityError) as caught:
            buffer.check()
        buffer.check()
        step.give(fits)
        return same_results(first, step.replay()), nothing[1:], str(caught.value)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("layout", [Compact(capacity=11), Expanded(capacity=12), Padded(capacity=5)], ids=repr)
def test_an_overflow_in_a_replay_gives_nothing_and_is_told_by_check(world, layout):
    spec = spec_of_two(layout)
    roomy = spec_of_two(type(layout)())
    num_tokens = [9] + [8] * (world.num_ranks - 1)
    overflows = replace(make_case(roomy, num_tokens, picks="one"), spec=spec)
    fits = replace(make_case(roomy, num_tokens, picks="none"), spec=spec)
    for source, topk in enumerate(fits.topk):
        topk[0, 0] = source
    got = world.run(overflow_in_a_replay, fits, overflows)
    for is_same, (src_idx, counts, out), message in got:
        assert is_same
        assert (src_idx == -1).all()
        assert not counts.any()
        assert not out.any()
        assert message == got[0][2]
        assert message.startswith(f"{sum(num_tokens)} rows were routed to rank 0")
