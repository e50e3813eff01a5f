"""Plans that ops are given as tensors are made once, and made again where the tensors are new, on all ranks alike."""

import contextlib
import threading
from unittest import mock

import pytest
import torch

from crossdock import Compact, ConfigError, Expanded, Padded
from crossdock import autograd as ag
from crossdock.backends.base import PlanTensors
from tests.cases import STAGED, same_bits
from tests.world import meet, open_buffer
from tests.worlds.test_autograd import E, make_experts, make_inputs, make_spec, run_layer

LAYOUTS = [Compact(), Expanded(), Padded(), STAGED]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["compact", "expanded", "padded", "staged"])
reduces = pytest.mark.parametrize("reduce", ["token", "rank"])


@contextlib.contextmanager
def counting(buffer):
    """How often the buffer's plans are made again, in a list of one number."""
    made, remake = [0], buffer._backend.remake_plan

    def counted(tensors):
        made[0] += 1
        return remake(tensors)

    with mock.patch.object(buffer._backend, "remake_plan", counted):
        yield made


def step(buffer, seed_rank, *, weights_travel=False):
    """Forward and backward of a layer; gradients of x and of weights."""
    x, topk_idx, weights, direction = make_inputs(seed_rank)
    num_local = E // buffer.topology.num_ranks
    matrices = make_experts()[buffer.rank * num_local :][:num_local]
    out = run_layer(buffer, (x, topk_idx, weights), matrices, weights_travel=weights_travel)
    (out * direction).sum().backward()
    return x.grad, weights.grad


def forget(buffer):
    """As it was without a memo."""
    return mock.patch.object(buffer._memo, "find", return_value=None)


def train_twice(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        travels = spec.reduce == "rank"
        with counting(buffer) as made:
            grads = step(buffer, buffer.rank, weights_travel=travels)
        with forget(buffer), counting(buffer) as made_each_time:
            wants = step(buffer, buffer.rank, weights_travel=travels)
    return grads, wants, made[0], made_each_time[0]


@layouts
@reduces
@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
def test_a_step_makes_no_plan_again_and_gives_the_same_bits(world, layout, reduce):
    for grads, wants, made, made_each_time in world.run(train_twice, make_spec(layout, reduce=reduce)):
        assert (made, made_each_time) == (0, 3 + (reduce == "token"))
        assert all(same_bits(got, want) for got, want in zip(grads, wants, strict=True))


@pytest.mark.worlds("interpreted-2")
@pytest.mark.parametrize("layout", [Expanded(alignment=4), Padded()], ids=repr)
def test_a_step_whose_receivers_make_copies_makes_no_plan_again_either(world, layout):
    for grads, wants, made, _ in world.opening(expand="receiver").run(train_twice, make_spec(layout)):
        assert made == 0
        assert all(same_bits(got, want) for got, want in zip(grads, wants, strict=True))


def hit_on_one_rank(group, spec):
    """Rank 0 has forgotten what its peers remember."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        wants = step(buffer, buffer.rank)
        with counting(buffer) as made, forget(buffer) if buffer.rank == 0 else contextlib.nullcontext():
            grads = step(buffer, buffer.rank)
    return grads, wants, made[0]


@layouts
@pytest.mark.worlds("inproc-4", "processes-2", "interpreted-2")
def test_ranks_that_remember_and_ranks_that_do_not_mean_the_same_plan(world, layout):
    for rank, (grads, wants, made) in enumerate(world.run(hit_on_one_rank, make_spec(layout))):
        assert made == (0 if rank else 4)
        assert all(same_bits(got, want) for got, want in zip(grads, wants, strict=True))


def live_and_die(group, spec):
    """Plans kept: of many layers, once their gradients are there, and of rows that nobody asks gradients of."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank)
        matrices = make_experts()[: E // buffer.topology.num_ranks]
        hidden = x
        for _ in range(5):
            hidden = run_layer(buffer, (hidden, topk_idx, weights), matrices, weights_travel=False)
        kept = [len(buffer._memo)]
        with counting(buffer) as made:
            (hidden * direction).sum().backward()
        del hidden
        for _ in range(3):
            with torch.no_grad():
                recv = ag.dispatch(buffer, x, topk_idx)
            kept.append(len(buffer._memo))
        del recv
    return kept, made[0]


@layouts
@pytest.mark.worlds("inproc-2")
def test_a_plan_is_kept_as_long_as_its_tensors(world, layout):
    """What has died is forgotten when the next one is kept."""
    for kept, made in world.run(live_and_die, make_spec(layout)):
        assert kept == [5, 1, 2, 2]
        assert made == 0


def moved_on(topk_idx, num_experts):
    """Picks of experts further on."""
    return torch.where(topk_idx < 0, -1, (topk_idx + num_experts) % E)


def change_in_place(group, spec):
    """A plan's picks are moved on by an expert, on all ranks, and its counts with them."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, _, _ = make_inputs(buffer.rank, num_tokens=4)
        x = x.detach()
        old, new = (ag.dispatch(buffer, x, picks).plan for picks in (topk_idx, moved_on(topk_idx, 1)))
        wants = ag.dispatch(buffer, x, new).x
        with counting(buffer) as made:
            ag.dispatch(buffer, x, old)
            made_before = made[0]
            old.topk_idx.copy_(new.topk_idx)
            old.counts.copy_(new.counts)
            moved = old._replace(src_idx=new.src_idx, local_idx=new.local_idx, partial_rows=new.partial_rows)
            rows = [ag.dispatch(buffer, x, moved).x for _ in range(2)]
    return wants, rows, made_before, made[0]


@layouts
@pytest.mark.worlds("inproc-2", "processes-2")
def test_tensors_that_were_changed_in_place_make_a_new_plan(world, layout):
    for wants, rows, made_before, made in world.run(change_in_place, make_spec(layout)):
        assert (made_before, made) == (0, 1)
        assert all(same_bits(got, wants) for got in rows)


def copy_tensors(group, spec):
    """Saved tensors that come back as copies, as from memory that they were moved to."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        wants = step(buffer, buffer.rank)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone), counting(buffer) as made:
            grads = step(buffer, buffer.rank)
    return grads, wants, made[0]


@pytest.mark.worlds("inproc-2")
@layouts
def test_copies_make_a_plan_once_for_each_backward_pass_of_a_verb(world, layout):
    for grads, wants, made in world.run(copy_tensors, make_spec(layout)):
        assert made == 2
        assert all(same_bits(got, want) for got, want in zip(grads, wants, strict=True))


def mask_and_go_on(group, spec, shares_rows):
    """What a plan from before a mask comes to, on the ranks that are left, and one that has no rows of masked ranks."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x = torch.ones(2, spec.hidden, requires_grad=True)
        here = torch.tensor([[0, 1, -1], [1, 5 if shares_rows else 0, -1]])  # rank 2 has experts 4 and 5
        recv = ag.dispatch(buffer, x if buffer.rank != 2 else x[:0], here if buffer.rank != 2 else here[:0])
        out = ag.combine(buffer, recv.x, recv.plan)
        meet(group)
        if buffer.rank == 2:
            return None
        buffer.mask(2)
        assert len(buffer._memo) == 0
        with counting(buffer) as made:
            try:
                out.sum().backward()
            except ConfigError as error:
                return str(error), made[0]
            return x.grad.tolist(), made[0]


@pytest.mark.worlds("inproc-3", "processes-3")
@pytest.mark.parametrize("shares_rows", [True, False])
def test_a_plan_from_before_a_mask_is_looked_at_again(world, shares_rows):
    spec = make_spec(Expanded())
    spec = spec.__class__(**{**vars(spec), "num_experts": 6})
    *left, gone = world.run(mask_and_go_on, spec, shares_rows)
    assert gone is None
    for outcome, made in left:
        assert made == 1
        assert ("older than the mask of rank 2" in outcome) if shares_rows else (outcome == [[2.0] * 16] * 2)


def remember_without_versions(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer, torch.inference_mode():
        x, topk_idx, _, _ = (tensor.detach() for tensor in make_inputs(buffer.rank))
        recv = ag.dispatch(buffer, x, topk_idx)
        with counting(buffer) as made:
            out = ag.combine(buffer, recv.x, recv.plan)
        return out, made[0], len(buffer._memo)


@pytest.mark.worlds("inproc-2")
def test_tensors_of_inference_mode_have_no_version_and_make_a_plan_each_time(world):
    for _, made, kept in world.run(remember_without_versions, make_spec(Expanded())):
        assert (made, kept) == (1, 0)


def keep_what_captures_make(group, spec):
    """Which plans are found where, in a capture and outside of one."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, _, _ = (tensor.detach() for tensor in make_inputs(buffer.rank))
        found = []
        is_capturing = mock.patch.object(type(buffer), "_is_capturing", True)
        eager = ag.dispatch(buffer, x, topk_idx).plan
        with is_capturing:
            captured = ag.dispatch(buffer, x, topk_idx).plan
        for plan in (eager, captured):
            for place in (is_capturing, contextlib.nullcontext()):
                for _ in range(2):
                    with place, counting(buffer) as made:
                        buffer.remake_plan(PlanTensors(*plan.tensors()))
                    found.append(not made[0])
        with counting(buffer) as made:  # a replay changes what lies there, and no version
            captured.counts.add_(0)
            for _ in range(2):
                buffer.remake_plan(PlanTensors(*captured.tensors()))
        return found, made[0]


@pytest.mark.worlds("inproc-1")
def test_in_a_capture_only_plans_are_found_that_it_has_made_with_their_tensors(world):
    ((found, made),) = world.run(keep_what_captures_make, make_spec(Expanded()))
    assert found == [False, False, True, True, True, True, True, True]
    assert made == 2


def share_between_threads(group, spec):
    """Many threads that ask for plans and keep others."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, _, _ = (tensor.detach() for tensor in make_inputs(buffer.rank))
        plans = [ag.dispatch(buffer, x, moved_on(topk_idx, i)).plan for i in range(4)]
        errors = []

        def work():
            try:
                for i in range(200):
                    tensors = PlanTensors(*plans[i % 4].tensors())
                    if i % 3 == 0:
                        tensors = PlanTensors(*(tensor.clone() for tensor in tensors))
                    plan = buffer.remake_plan(tensors)
                    assert torch.equal(plan.counts, tensors.counts)
            except AssertionError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors, len(buffer._memo)


@pytest.mark.worlds("inproc-1")
def test_threads_may_share_it(world):
    ((errors, kept),) = world.run(share_between_threads, make_spec(Expanded()))
    assert errors == []
    assert 4 <= kept <= 8


def step_with_another_default(group, spec):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with open_buffer(group, spec, timeout_s=20) as buffer:
            x, topk_idx, weights, direction = make_inputs(buffer.rank)
            x, weights = x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
            recv = ag.dispatch(buffer, x, topk_idx)
            out = ag.combine(buffer, 2 * recv.x, recv.plan, weights=weights)
            out.backward(direction.to(out.dtype))
            return recv.plan.link.dtype, x.grad.dtype, weights.grad.dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.worlds("inproc-1")
def test_the_default_dtype_changes_nothing(world):
    assert world.run(step_with_another_default, make_spec(Expanded())) == [(torch.float32,) * 3]
