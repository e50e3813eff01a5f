"""The CUDA backend against the oracle without a GPU: the programs of the CPU tests, kernels in Triton's interpreter.

Tiny shapes; sums in float32, because the interpreter cuts float32 off where it makes bfloat16 of it.
"""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

import torch

from crossdock import (
    CapacityError,
    Compact,
    ConfigError,
    Expanded,
    Fp8,
    Fp32,
    Padded,
    PeerFailed,
    PeerTimeout,
    Spec,
)
from crossdock.backends.cuda import fused, sends, sums
from crossdock.backends.cuda.launch import Launch
from crossdock.backends.cuda.stream import CallStreams
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, loads, make_case, observed, same_bits
from tests.world import meet, open_buffer
from tests.worlds import test_autograd as gradients
from tests.worlds import test_combine as combine
from tests.worlds import test_dispatch as dispatch
from tests.worlds.test_pending import check_near_the_end

LAYOUTS = [Compact(), Expanded(alignment=4), Padded(), STAGED]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
reduces = pytest.mark.parametrize("reduce", ["token", "rank"])
two_ranks = pytest.mark.worlds("interpreted-2")


def spec_of(layout, num_ranks=2, wire=None, **options):
    options = {"num_topk": 3, "hidden": 16, "max_tokens": 4, "extra_bytes": EXTRA_BYTES} | options
    options = {"num_experts": 2 * num_ranks, "wire": wire or Fp32(), "combine_wire": Fp32()} | options
    return Spec(layout=layout, **options)


@two_ranks
@pytest.mark.parametrize("expand", ["sender", "receiver"])
@pytest.mark.parametrize("wire", [Fp32(), Fp8(block=8), Fp8(block=4, scale="ue8m0", packed=True)], ids=repr)
@layouts
def test_brings_every_row_to_its_place(world, layout, wire, expand):
    if layout in LAYOUTS[1:3]:
        world = world.opening(expand=expand)
    elif expand == "receiver":
        pytest.skip("a rank gets a row once here in any case")
    dispatch.check_each(world, loads(spec_of(layout, wire=wire), 2)[1:6])


@two_ranks
@layouts
def test_every_kind_of_call_on_no_rows_leaves_nothing_behind(world, layout):
    """As on a GPU, where that compiles and loads all kernels before the first call."""
    dispatch.check_each(world.opening(warms_up=True), loads(spec_of(layout, wire=Fp8(block=8)), 2)[1:3])


COLUMNS = [
    Fp8(block=8, column_major=True),
    Fp8(block=4, scale="ue8m0", column_major=True),
    Fp8(block=4, scale="ue8m0", packed=True, column_major=True),
]


@two_ranks
@pytest.mark.parametrize(
    ("layout", "wire", "expand"),
    [
        (Compact(), COLUMNS[2], "sender"),
        (Expanded(alignment=4), COLUMNS[0], "receiver"),
        (Expanded(alignment=4), COLUMNS[1], "sender"),
        (Padded(), COLUMNS[0], "sender"),
        (Padded(), COLUMNS[2], "sender"),
        (Padded(), COLUMNS[1], "receiver"),
        (STAGED, COLUMNS[0], None),
        (STAGED, COLUMNS[2], None),
    ],
    ids=repr,
)
def test_scales_arrive_column_major(world, layout, wire, expand):
    """Also of rows of several words of scales, the last of which is padded, and of a capacity that is padded."""
    world = world.opening(expand=expand) if layout.per_pick else world
    cases = loads(spec_of(replace(layout, capacity=19), wire=wire, hidden=24), 2)
    dispatch.check_columns(world, [cases[1], cases[4]])


@two_ranks
@pytest.mark.parametrize("expand", ["sender", "receiver"])
def test_scales_arrive_column_major_by_few_sms(world, expand):
    cases = loads(spec_of(Padded(), wire=COLUMNS[0]), 2)[:1]
    dispatch.check_columns(world.opening(num_sms=1, expand=expand), cases)


@two_ranks
def test_copies_whole_blocks_of_scales_column_major(world):
    dispatch.check_columns(world.opening(mover="copy"), loads(spec_of(Compact(), wire=COLUMNS[2]), 2)[1:2])


@pytest.mark.worlds("interpreted-3")
@layouts
def test_brings_every_row_to_its_place_among_three_ranks(world, layout):
    dispatch.check_each(world, loads(spec_of(layout, 3), 3)[:2])


@pytest.mark.worlds("interpreted-2", "interpreted-3")
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_brings_every_row_to_its_place_among_many_experts(world, layout):
    """More than a program compares by prefix sums, and, with three ranks, more than it counts at once."""
    num_experts = {2: 80, 3: 2049}[world.num_ranks]
    spec = spec_of(layout, world.num_ranks, num_experts=num_experts)
    dispatch.check_each(world, loads(spec, world.num_ranks)[:2])


@two_ranks
@layouts
def test_has_room_for_as_many_rows_as_the_slot(world, layout):
    dispatch.check_each(world, loads(spec_of(layout), 2)[:2], "capacity")


@two_ranks
def test_copies_whole_blocks(world):
    dispatch.check_each(world.opening(mover="copy"), loads(spec_of(Compact(), wire=Fp8(block=8)), 2)[:4])


@two_ranks
@layouts
def test_a_plan_sends_other_rows_the_same_way(world, layout):
    cases = [make_case(spec_of(layout, wire=Fp8(block=8)), [4, 2], seed=seed) for seed in range(3)]
    got = world.run(dispatch.dispatch_cached, cases)
    for i, case in enumerate(cases):
        object.__setattr__(case, "topk", cases[0].topk)
        check_received(case, [mine[i] for mine in got])


@two_ranks
@reduces
@layouts
def test_sums_every_row_in_its_order(world, layout, reduce):
    combine.check_each(world, loads(spec_of(layout, reduce=reduce), 2)[1:2])


@two_ranks
@reduces
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=repr)
def test_sums_every_row_in_its_order_by_several_kernels(world, layout, reduce):
    """As calls of more tokens do."""
    combine.check_each(world.opening(is_fused=False), loads(spec_of(layout, reduce=reduce), 2)[1:2])


@two_ranks
@pytest.mark.parametrize("num_sms", [1, 3])
@reduces
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=repr)
def test_ranks_with_gpus_of_their_own_leave_sms_free(world, layout, reduce, num_sms):
    """Programs share out whole rows; where there are three, some store here and the others there."""
    opened = world.opening(is_fused=False, own_sms=4, num_sms=num_sms)
    case = loads(spec_of(layout, reduce=reduce), 2)[1]
    dispatch.check_each(opened, [case])
    combine.check_each(opened, [case])


@pytest.mark.worlds("interpreted-3")
@reduces
@layouts
def test_sums_every_row_in_its_order_among_three_ranks(world, layout, reduce):
    combine.check_each(world, [make_case(spec_of(layout, 3, reduce=reduce), [4, 0, 3])])


@two_ranks
@pytest.mark.parametrize("way", ["weights-travel", "capacity"])
@reduces
@layouts
def test_all_gradients_are_those_of_the_dense_sum(world, layout, reduce, way):
    gradients.check_gradients(world, layout, reduce, way)


@two_ranks
@pytest.mark.parametrize("first", [2**40 - 2, 2**39 - 3, 3 * 2**32 - 5], ids=hex)
def test_sequence_numbers_come_round(world, first):
    check_near_the_end(world, [make_case(spec_of(Expanded()), [4, 2], seed=seed) for seed in range(3)], first)


def call_behind_events(group, case):
    """All verbs with an event, started ones on another stream; and what is neither event nor stream."""
    with open_buffer(group, case.spec) as buffer:
        r, waited = buffer.rank, []
        wait_for = CallStreams.wait_for

        def noted(streams, event, *, on_side):
            waited.append((event, on_side))
            wait_for(streams, event, on_side=on_side)

        events = [torch.cuda.Event() for _ in range(5)]
        chosen = torch.cuda.Stream()
        chosen.device = buffer.device
        buffer.stream = chosen
        assert buffer.stream is chosen
        with mock.patch.object(CallStreams, "wait_for", noted):
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], after=events[0])
            recv = buffer.dispatch_start(case.x[r], recv.plan, after=events[1]).wait()
            out = buffer.combine(case.y[r], recv.plan, after=events[2])
            same = buffer.combine_start(case.y[r], recv.plan, after=events[3]).wait()
            buffer.return_extras(recv.plan, [case.y_extras[r][1]], after=events[4])
        assert torch.equal(out, same)
        texts = []
        for wrong in (lambda: buffer.dispatch(case.x[r], case.topk[r], after=3), lambda: setattr(buffer, "stream", 3)):
            with pytest.raises(ConfigError) as caught:
                wrong()
            texts.append(str(caught.value))
        buffer.stream = None
        assert buffer.stream is not chosen
        return out, [(events.index(event), on_side) for event, on_side in waited], texts


@pytest.mark.worlds("interpreted-1")
def test_calls_wait_for_events_where_they_run(world):
    spec = spec_of(
        Expanded(), 1, num_experts=4, reduce="rank", max_tokens=2048
    )  # no fused calls, which start elsewhere
    case = make_case(spec, [4])
    ((out, waited, texts),) = world.run(call_behind_events, case)
    assert same_bits(out, oracle.combined(case.spec, case.topk, case.flat_y())[0])
    assert waited == [(0, False), (1, True), (2, False), (3, True), (4, False)]
    assert "after is a int; pass a torch.cuda.Event, such as Pending.event, or None" in texts[0]
    assert "buffer.stream was set to a int; set it to a torch.cuda.Stream of" in texts[1]


def start_and_watch(group, case):
    """Started calls, and kernels on our own stream that did not wait for what torch fills on the caller's."""
    new_empty, enter, enter_side, launch = (
        torch.Tensor.new_empty,
        CallStreams.enter,
        CallStreams.enter_side,
        Launch.__call__,
    )
    filled, early, on_side, num_launched = [], [], [False], [0]

    def gives(tensor, *args, **kwargs):
        given = new_empty(tensor, *args, **kwargs)
        filled.extend([given.shape] if given.numel() else [])
        return given

    def stays(streams):
        on_side[0] = False
        return enter(streams)

    def waits(streams):
        on_side[0] = True
        filled.clear()
        return enter_side(streams)

    def launches(bound, *args):
        num_launched[0] += on_side[0]
        if filled and on_side[0]:
            early.append((bound._kernel.fn.__name__, *filled))
        launch(bound, *args)

    with (
        open_buffer(group, case.spec) as buffer,
        mock.patch.object(torch.Tensor, "new_empty", gives),
        mock.patch.object(CallStreams, "enter", stays),
        mock.patch.object(CallStreams, "enter_side", waits),
        mock.patch.object(Launch, "__call__", launches),
    ):
        r = buffer.rank
        num_launched[0] = 0
        recv = buffer.dispatch_start(case.x[r], case.topk[r], weights=case.weights[r]).wait()
        buffer.dispatch_start(case.x[r], recv.plan).wait()
        extra = torch.ones(recv.src_idx.shape)
        for y in (case.y[r].view_as(recv.output_rows()), recv.output_rows()):
            buffer.combine_start(y, recv.plan, extras=[extra]).wait()
        return early, num_launched[0]


@two_ranks
@reduces
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=4)], ids=repr)
def test_kernels_wait_for_what_torch_fills(world, layout, reduce):
    """With deterministic algorithms torch fills what it gives, on the caller's stream; kernels run on another."""
    assert torch.are_deterministic_algorithms_enabled()
    case = make_case(spec_of(layout, reduce=reduce, max_tokens=2048), [4, 3])
    for early, num_launched in world.run(start_and_watch, case):
        assert early == []
        assert num_launched >= 10


def read_early_and_late(group, cases):
    """What came with the first batch's rows, read at once, and again when its slot has come round."""
    with open_buffer(group, cases[0].spec) as buffer:
        r = buffer.rank
        early, late = (buffer.dispatch(cases[0].x[r], cases[0].topk[r], weights=cases[0].weights[r]) for _ in range(2))
        early = [early.src_idx.clone(), early.weights.clone()]
        for case in cases[1:]:
            buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
        assert late.is_stale != buffer.spec.is_staged
        return early, [late.src_idx, late.weights]


@two_ranks
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=repr)
def test_what_came_with_rows_stays_when_their_slot_comes_round(world, layout):
    for early, late in world.run(read_early_and_late, [make_case(spec_of(layout), [4, 3], seed=i) for i in range(3)]):
        assert (early[0] >= 0).any()
        assert all(same_bits(mine, theirs) for mine, theirs in zip(early, late, strict=True))


def overflow_unasked(group):
    """What an overflow raises that nobody asks for, 32 dispatches later."""
    spec = Spec(num_experts=2, num_topk=1, hidden=4, max_tokens=2, layout=Compact(capacity=1), wire=Fp32())
    with open_buffer(group, spec) as buffer:
        x, picks = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64)
        buffer.dispatch(x, picks, rows="capacity")
        for _ in range(32):
            buffer.dispatch(x, picks - buffer.rank, rows="capacity")
        with pytest.raises(CapacityError) as caught:
            buffer.dispatch(x, picks - buffer.rank, rows="capacity")
        return str(caught.value)


@two_ranks
def test_an_overflow_that_nobody_asks_for_is_told_on_all_ranks_in_one_call(world):
    error, other = world.run(overflow_unasked)
    assert "2 rows were routed to rank 0" in error
    assert other == error


def misbehave(group, trouble):
    """What each rank raises of a call that goes wrong, and whether the next one works."""
    spec = spec_of(Expanded(capacity=8))
    case = make_case(spec, [4, 4], seed=3)
    with open_buffer(group, spec, timeout_s=3e-4 if trouble == "absent" else 20) as buffer:
        r = buffer.rank
        x, topk_idx = case.x[r], case.topk[r].clone()
        rows, error = None, None
        if trouble == "bad picks" and r == 1:
            topk_idx[2, 1] = 4
        if trouble == "twice" and r == 0:
            topk_idx[3, :2] = 1
        if trouble == "mismatch" and r == 0:
            rows = "capacity"
        if trouble == "overflow":
            topk_idx = torch.tensor([[0, 1, -1]] * 4)
        try:
            if trouble == "abort" and r == 1:
                buffer.abort("had enough")
            elif trouble == "abort in flight" and r == 1:
                with mock.patch.object(fused, "_PATIENCE", 0):  # its word is given, and its rows are still to be sent
                    buffer.dispatch_start(x, topk_idx)
                buffer.abort("had enough")
            elif trouble == "bad input" and r == 1:
                buffer.dispatch(x[:, :3], topk_idx)
            elif trouble != "absent" or r == 0:
                buffer.dispatch(x, topk_idx, rows=rows)
                buffer.check()
        except (ConfigError, PeerFailed, PeerTimeout) as raised:
            error = raised
        meet(group)
        if trouble == "absent":
            buffer.reset()
            meet(group)
            return error, True
        recv = buffer.dispatch(x[:2], torch.tensor([[3, 0, -1], [1, -1, 2]]))
        return error, int(recv.num_tokens_per_expert.sum()) == 4


@two_ranks
@pytest.mark.parametrize(
    ("trouble", "kinds", "words"),
    [
        ("bad picks", (PeerFailed, ConfigError), ("topk_idx[2, 1] = 4", "topk_idx[2, 1] = 4")),
        ("twice", (ConfigError, PeerFailed), ("expert 1 more than once", "expert 1 more than once")),
        ("mismatch", (PeerFailed, PeerFailed), ("the same on all ranks", "the same on all ranks")),
        ("overflow", (CapacityError, CapacityError), ("16 rows were routed to rank 0",) * 2),
        ("abort", (PeerFailed, None), ("had enough", "")),
        ("abort in flight", (PeerFailed, None), ("had enough", "")),
        ("bad input", (PeerFailed, ConfigError), ("hidden=16", "hidden=16")),
        ("absent", (PeerTimeout, None), ("rank 1 did not begin", "")),
    ],
)
def test_trouble_is_told_to_all_and_the_next_call_works(world, trouble, kinds, words):
    outcomes = world.run(misbehave, trouble)
    for (error, is_well), kind, text in zip(outcomes, kinds, words, strict=True):
        assert type(error) is (kind or type(None)), error
        assert text in str(error)
        assert is_well


def capture_behind_a_failure(group):
    """What rank 0 hears of rank 1's abort in a capture, in which device memory cannot be read, and after it."""
    spec, errors = spec_of(Padded(), max_tokens=4), []
    case = make_case(spec, [4, 4], seed=3)
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx = case.x[buffer.rank], case.topk[buffer.rank]
        if buffer.rank == 1:
            buffer.abort("had enough")
        else:
            buffer.dispatch(x, topk_idx)
            capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
            unread = mock.patch.object(type(buffer.connection.consent), "_state", side_effect=AssertionError("read"))
            for around in (capturing, contextlib.nullcontext()):
                with (
                    around,
                    unread if around is capturing else contextlib.nullcontext(),
                    pytest.raises(PeerFailed) as e,
                ):
                    buffer.dispatch(x, topk_idx)
                errors.append(str(e.value))
        meet(group)
        recv = buffer.dispatch(x, topk_idx, rows="exact")
        return errors, recv.num_rows is not None


@two_ranks
def test_in_a_capture_a_failure_before_it_has_a_name_and_is_told_in_full_afterwards(world):
    (errors, is_well), (_, other_is_well) = world.run(capture_behind_a_failure)
    assert "rank 1" in errors[0]
    assert "before this capture" in errors[0]
    assert "had enough" in errors[1]
    assert is_well
    assert other_is_well


def pick_badly(group, layout, starts, patience, at, expert):
    """What each rank hears of picks of rank 1 that only the device looks at, and whether a call before and one behind
    are as they should be."""
    case = make_case(spec_of(layout), [4, 4], seed=3)
    with (
        open_buffer(group, case.spec, timeout_s=20) as buffer,
        mock.patch.object(fused, "_PATIENCE", patience),
        mock.patch("crossdock.buffer.check_picks"),
    ):
        r = buffer.rank
        x, topk_idx = case.x[r], case.topk[r].clone()
        before = buffer.dispatch(x, topk_idx, weights=case.weights[r], rows="capacity")
        if r == 1:
            topk_idx[at] = expert
        error = None
        try:
            if starts:
                buffer.dispatch_start(x, topk_idx, rows="capacity").wait()
            else:
                buffer.dispatch(x, topk_idx, rows="capacity")
            buffer.check()
        except (ConfigError, PeerFailed) as raised:
            error = raised
        counted = int(buffer.stats.num_tokens_per_expert.sum())
        rows = observed(before)
        meet(group)
        again = buffer.dispatch(x, case.topk[r], weights=case.weights[r], rows="capacity")
        return error, rows, observed(again), counted


@two_ranks
@pytest.mark.parametrize(("at", "expert"), [((3, 0), 4), ((0, 1), -2), ((2, slice(2)), 1), ((1, 2), 2**40)])
@pytest.mark.parametrize(("starts", "patience"), [(False, 32), (True, 32), (True, 0)])
@layouts
def test_picks_that_are_not_allowed_are_told_to_all_by_the_device(world, layout, starts, patience, at, expert):
    """Whole calls tell it with the rows, others before; what came with earlier rows stays."""
    case = make_case(spec_of(layout), [4, 4], seed=3)
    got = world.run(pick_badly, layout, starts, patience, at, expert)
    for (error, *_), kind in zip(got, (PeerFailed, ConfigError), strict=True):
        assert type(error) is kind, error
        assert f"topk_idx[{at[0]}" in str(error)
    for i in (1, 2):
        check_received(case, [mine[i] for mine in got], extras=False)
    assert sum(mine[3] for mine in got) == sum(int((topk >= 0).sum()) for topk in case.topk)


def memory_asked_for(group, case):
    """How often each call asks for memory: a fresh dispatch, one on its plan, combines that are pulled and pushed."""
    counts, asked, new_empty = [], [], torch.Tensor.new_empty

    def gives(tensor, *args, **kwargs):
        asked.extend([] if "device" in kwargs else [args])  # the interpreter's own have one
        return new_empty(tensor, *args, **kwargs)

    with open_buffer(group, case.spec) as buffer, mock.patch.object(torch.Tensor, "new_empty", gives):
        r = buffer.rank

        def count(call, *args, **kwargs):
            del asked[:]
            result = call(*args, **kwargs)
            counts.append(len(asked))
            return result

        recv = count(buffer.dispatch, case.x[r], case.topk[r], weights=case.weights[r], rows="capacity")
        count(buffer.dispatch, case.x[r], recv.plan)
        weights = None if case.spec.reduce == "rank" else case.weights[r]
        recv = buffer.dispatch(case.x[r], recv.plan)
        count(buffer.combine, recv.output_rows(), recv.plan, weights=weights)
        count(buffer.combine, torch.zeros_like(recv.output_rows()), recv.plan, weights=weights)
    return counts


@two_ranks
@pytest.mark.parametrize(
    ("layout", "options"),
    [(Padded(), {}), (Compact(), {}), (Expanded(alignment=4), {"reduce": "rank"})],
    ids=repr,
)
def test_a_call_asks_for_memory_once_or_never(world, layout, options):
    """A fresh dispatch for its plan, a combine for its result."""
    case = make_case(spec_of(layout, wire=Fp8(block=8), **options), [4, 3])
    assert world.run(memory_asked_for, case) == [[1, 0, 1, 1]] * 2


@two_ranks
@reduces
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=4)], ids=repr)
def test_wide_calls_are_ended_by_a_kernel_of_their_own(world, layout, reduce):
    """Where there are too many programs for tickets: here, more than none."""
    case = make_case(spec_of(layout, reduce=reduce, num_topk=2), [3, 4])
    for rows, home in (("exact", "pulled"), ("capacity", "pushed")):
        got = world.run(play_widely, case, rows, home)
        check_received(case, [mine[0] for mine in got])
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(out, want) for (_, out), want in zip(got, wants, strict=True))


def play_widely(group, case, rows, home):
    few = [mock.patch.object(module, "MOST_TICKETS", 0) for module in (sends, sums)]
    with few[0], few[1], open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], rows=rows)
        seen = observed(recv)
        buffer.dispatch_start(case.x[r], recv.plan).wait()
        recv = buffer.dispatch(case.x[r], recv.plan)
        y = case.y[r] if home == "pushed" else recv.output_rows()
        if home == "pulled":
            y.copy_(case.y[r].view_as(y))
        return seen, buffer.combine(y, recv.plan)


def overflow_by_refused_picks(group, spec):
    """Rank 1 picks an expert twice, which is one row too many for rank 0; what is raised then, and behind it."""
    with open_buffer(group, spec) as buffer:
        x, said, buffer._looks_at_picks = torch.ones(4, spec.hidden), [], False  # as on a GPU, where kernels do
        good = torch.tensor([[0, 1, -1]] * 2 + [[2, 3, -1]] * 2)
        for started in (False, True):
            picks = good.clone()
            if buffer.rank == 1:
                picks[0] = torch.tensor([0, 1, 1])
            try:
                if started:
                    buffer.dispatch_start(x, picks, rows="capacity").wait()
                else:
                    buffer.dispatch(x, picks, rows="capacity")
                buffer.check()
            except (ConfigError, PeerFailed) as error:
                said.append(type(error).__name__)
            buffer.check()
            said.append(int(buffer.dispatch(x, good, rows="capacity").num_tokens_per_expert.sum()))
            buffer.check()
        return said


@two_ranks
def test_an_overflow_of_picks_that_are_refused_is_not_raised_behind_that(world):
    ours, theirs = world.run(overflow_by_refused_picks, spec_of(Expanded(capacity=8)))
    assert ours == ["PeerFailed", 8, "PeerFailed", 8]
    assert theirs == ["ConfigError", 8, "ConfigError", 8]
