"""Calls of a kind that has succeeded before are checked no further than by their numbers of tokens and rows.

Prepared calls and others follow each other, ranks differ in which they take, and nothing that could refuse a call is
overlooked because its kind is known.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crossdock import CapacityError, Compact, ConfigError, Expanded, Fp8, Fp32, Padded, PeerFailed, Spec
from crossdock.kinds import NUM_CALL_KINDS, CallKind, Kinds, key_of
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, make_case, observed, row_weights, same_bits
from tests.world import open_buffer

LAYOUTS = [Compact(), Expanded(alignment=4), Padded(), STAGED]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["compact", "expanded", "padded", "staged"])


def spec_of(layout, **options):
    given = {"num_experts": 8, "num_topk": 3, "hidden": 16, "max_tokens": 7, "extra_bytes": EXTRA_BYTES, "wire": Fp32()}
    return Spec(layout=layout, **given | options)


def cases_of(world, spec, count):
    """Other numbers of tokens in each, also none."""
    return [make_case(spec, [(3 * i + 2 * r) % 8 for r in range(world.num_ranks)], seed=i) for i in range(count)]


def play(group, cases, weights, forgets):
    """Each case in turn, the weights' and extras' kinds alternating; some ranks forget all kinds before some steps."""
    seen, num_known = [], 0
    with open_buffer(group, cases[0].spec) as buffer:
        r, sums_here = buffer.rank, cases[0].spec.reduce == "rank"
        for i, case in enumerate(cases):
            if forgets[r] and i % forgets[r] == 0:
                buffer._kinds.clear()
            before = len(buffer._kinds)
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
            rows = observed(recv)
            start = buffer.dispatch_start(case.x[r], recv.plan)
            again = observed(start.wait())
            given = weights[i][r].view(case.y[r].shape[:-1]) if sums_here else case.weights[r]
            pushed = buffer.combine(case.y[r], recv.plan, weights=given)
            num_known += len(buffer._kinds) == before
            outputs = buffer.dispatch(case.x[r], recv.plan).output_rows().copy_(case.y[r])
            pulled = buffer.combine_start(outputs, recv.plan).wait()
            seen.append((rows, again, pushed, pulled))
    return seen, num_known


def check_alternating(world, layout, reduce):
    cases = cases_of(world, spec_of(layout, reduce=reduce), 4 if world.kind == "interpreted" else 8)
    weights = [row_weights(case) if reduce == "rank" else case.weights for case in cases]
    got = world.run(play, cases, weights, [0, 1, 3, 2][: world.num_ranks])
    assert got[0][1] > 0  # rank 0 forgets nothing
    for i, case in enumerate(cases):
        mine = [seen[i] for seen, _ in got]
        check_received(case, [rows for rows, *_ in mine])
        check_received(case, [again for _, again, *_ in mine], weights=False, extras=False)
        wants = oracle.combined(case.spec, case.topk, case.flat_y(), weights[i])
        assert all(same_bits(pushed, want) for (*_, pushed, _), want in zip(mine, wants, strict=True))
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(pulled, want) for (*_, pulled), want in zip(mine, wants, strict=True))


@pytest.mark.worlds("inproc-4", "processes-2", "interpreted-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@layouts
def test_ranks_differ_in_which_calls_are_prepared(world, layout, reduce):
    check_alternating(world, layout, reduce)


def be_refused(group, case):
    """What is wrong with calls whose kind is known: the culprit's sentence, and that the buffer goes on."""
    said = []
    with open_buffer(group, case.spec) as buffer, open_buffer(group, case.spec) as other:
        r = buffer.rank
        foreign, bias = other.dispatch(case.x[r], case.topk[r]).plan, torch.zeros(case.spec.hidden)

        def good():
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
            rows = buffer.dispatch(case.x[r], recv.plan)
            buffer.combine(case.y[r], recv.plan, bias=bias)
            return recv, rows, buffer.combine(case.y[r], recv.plan)

        for _ in range(2):
            recv, *_ = good()
        x, topk, weights, y = case.x[r], case.topk[r], case.weights[r], case.y[r]
        wrong = [
            lambda: buffer.dispatch(x, topk[:-1], weights=weights),
            lambda: buffer.dispatch(x, topk, weights=weights[:-1]),
            lambda: buffer.dispatch(x[:-1], recv.plan),
            lambda: buffer.dispatch(x, foreign),
            lambda: buffer.dispatch(x.clone().requires_grad_(), topk, weights=weights),
            lambda: buffer.dispatch(x, topk + 100, weights=weights),
            lambda: buffer.combine(y[:-1], recv.plan),
            lambda: buffer.combine(y, foreign),
            lambda: buffer.combine(y.clone().requires_grad_(), recv.plan),
            lambda: buffer.combine(y, recv.plan, bias=bias[:-1]),
        ]
        for call in wrong:
            try:
                if r == 0:
                    call()
                else:
                    good()
            except (ConfigError, PeerFailed) as error:
                said.append((type(error).__name__, str(error).partition(";")[0]))
            good()
    return said


@pytest.mark.worlds("inproc-2", "processes-2")
def test_nothing_is_overlooked_because_a_kind_is_known(world):
    case = make_case(spec_of(Compact()), [6, 5])
    ours, theirs = world.run(be_refused, case)
    assert [kind for kind, _ in ours] == ["ConfigError"] * len(ours)
    assert [kind for kind, _ in theirs] == ["PeerFailed"] * len(theirs)
    about = ("topk_idx has", "weights has", "x has", "the plan", "an input", "topk_idx[0", "y has", "the plan")
    for (_, sentence), begins in zip(ours, (*about, "an input", "bias is"), strict=True):
        assert sentence.startswith(begins)


def overflow(group, case, full):
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        for _ in range(2):
            buffer.dispatch(case.x[r], case.topk[r], rows="capacity")
        empty = buffer.dispatch(full.x[r], full.topk[r], rows="capacity")
        assert int(empty.num_tokens_per_expert.sum()) == 0
        caught = None
        try:
            for _ in range(40):  # kernels tell the host later
                buffer.dispatch(case.x[r], case.topk[r], rows="capacity")
        except CapacityError as error:
            caught = str(error)
        return caught, buffer.dispatch(case.x[r], case.topk[r]).num_rows


def check_overflow(world):
    spec = spec_of(Compact(capacity=4), num_topk=1)
    case = make_case(spec, [1, 1])
    full = make_case(spec, [7, 7])
    full.topk[0].fill_(0)
    full.topk[1].fill_(0)
    got = world.run(overflow, case, full)
    assert got[0][0] == got[1][0]
    assert "14 rows were routed to rank 0, whose capacity is 4" in got[0][0]


@pytest.mark.worlds("inproc-2", "processes-2")
def test_an_overflow_is_raised_by_a_prepared_call(world):
    check_overflow(world)


def mask_one(group, case):
    with open_buffer(group, case.spec, timeout_s=5) as buffer:
        r = buffer.rank
        for _ in range(2):
            recv = buffer.dispatch(case.x[r], case.topk[r])
            buffer.combine(case.y[r], recv.plan)
        if r == 1:
            return None
        with contextlib.suppress(PeerFailed):
            buffer.dispatch(case.x[r], case.topk[r])
        assert buffer._kinds
        buffer.mask(1)
        assert not buffer._kinds
        with pytest.raises(ConfigError, match="older than the mask"):
            buffer.dispatch(case.x[r], recv.plan)
        again = [buffer.dispatch(case.x[r], case.topk[r]).num_rows for _ in range(2)]
        try:
            buffer.combine(case.y[r], recv.plan)
        except ConfigError as error:
            return again, str(error).partition(",")[0]


@pytest.mark.worlds("inproc-3")
def test_a_mask_forgets_all_kinds(world):
    spec = Spec(num_experts=6, num_topk=2, hidden=16, max_tokens=7)
    case = make_case(spec, [6, 5, 4])
    first, _, last = world.run(mask_one, case)
    for again, why in (first, last):
        assert again[0] == again[1]
        assert why == "the plan is older than the mask of rank 1"


def go_the_long_way(group, case):
    """Calls that are never prepared, between some that are: what each adds to the kinds that are known."""
    added = {}
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        x, topk = case.x[r], case.topk[r]
        want = buffer.dispatch(x, topk, copy=True).x

        def note(name, x, topk=topk):
            before = set(buffer._kinds)
            got = buffer.dispatch(x, topk)
            added[name] = len(set(buffer._kinds) - before), same_bits(got.x, want)

        note("the same again", x)
        note("a parameter", torch.nn.Parameter(x, requires_grad=False))
        with torch.no_grad():
            note("no gradient is wanted here", x.clone().requires_grad_())
        note("other strides", torch.stack([x, x], dim=1)[:, 0])
        note("int32", x, topk.to(torch.int32))
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(not deterministic)
        note("deterministic", x)
        torch.use_deterministic_algorithms(deterministic)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert key_of(("dispatch",), (x, topk)) is None
        buffer.close()
        with pytest.raises(ConfigError, match="the buffer is closed"):
            buffer.dispatch(x, topk)
    return added


@pytest.mark.worlds("processes-2")
def test_what_is_more_than_a_plain_tensor_goes_the_long_way(world):
    case = make_case(spec_of(Compact(), num_slots=1), [6, 5])
    for added in world.run(go_the_long_way, case):
        assert added == {
            "the same again": (0, True),
            "a parameter": (0, True),
            "no gradient is wanted here": (0, True),
            "other strides": (1, True),
            "int32": (1, True),
            "deterministic": (0, True),
        }


def send_strided_picks(group, case):
    """Picks that are columns of a wider tensor, of one token and then of several: what a row's stride is, one hides."""
    with open_buffer(group, case.spec) as buffer:
        r, num_topk = buffer.rank, case.spec.num_topk
        buffer._looks_at_picks = buffer.launch is None  # as on GPUs, where kernels look at them
        rows = []
        for num_tokens in (1, case.x[r].shape[0]):
            x, topk = case.x[r][:num_tokens], case.topk[r][:num_tokens]
            wider = torch.cat([topk, topk.flip(0)], dim=1)[:, :num_topk]
            given = observed(buffer.dispatch(x, wider))["data"]
            rows.append(same_bits(given, observed(buffer.dispatch(x, topk.contiguous()))["data"]))
        return rows


@pytest.mark.worlds("processes-2", "interpreted-2")
def test_picks_with_gaps_are_picks_with_gaps_though_one_token_shows_none(world):
    case = make_case(spec_of(Compact()), [4, 3])
    assert world.run(send_strided_picks, case) == [[True, True]] * 2


def test_numbers_of_tokens_and_rows_are_no_part_of_a_kind():
    wire = Fp8(block=8)
    keys = set()
    for num_tokens in (1, 2, 5):
        x = wire.quantize(torch.ones(num_tokens, 16))
        keys.add(key_of(("dispatch",), (x, torch.zeros(num_tokens, 2, dtype=torch.int64), None)))
    assert len(keys) == 1


def test_as_many_kinds_are_kept_as_there_is_room_for():
    kinds, last = Kinds(NUM_CALL_KINDS), CallKind()
    for i in range(300):
        kinds.keep((i,), CallKind())
    kinds.keep((300,), last)
    assert len(kinds) == 256
    assert kinds.get((300,)) is last
    assert (0,) not in kinds
