"""Rows that are staged, and expanded into a tensor of the caller's: what that changes for the caller."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch

from crossdock import ConfigError, Expanded, Fp8, Fp32, PeerFailed, Quantized, Spec, TransportError, autograd
from tests import oracle
from tests.cases import EXTRA_BYTES, check_received, make_case, observed, same_bits
from tests.world import device, open_buffer

WORLDS = pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
STAGED = Expanded(alignment=4, staged=True)


def spec_of(wire=None, layout=STAGED, **kwargs):
    kwargs = {"num_experts": 8, "num_topk": 3, "hidden": 16, "max_tokens": 7, "extra_bytes": EXTRA_BYTES} | kwargs
    return Spec(wire=wire or Fp32(), layout=layout, **kwargs)


def dispatch(buffer, case, **kwargs):
    r = buffer.rank
    return buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], **kwargs)


def outlive_the_slots(group, cases):
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        first = dispatch(buffer, cases[0])
        outputs = first.output_rows()
        assert outputs is first.output_rows()
        for case in cases[1:]:
            dispatch(buffer, case)
        assert not first.is_stale
        assert dispatch(buffer, cases[0], copy=True).without_copy().x is not None
        out = buffer.combine(outputs.copy_(cases[0].y[r]), first.plan)
        rows = first.x.data if isinstance(first.x, Quantized) else first.x
        return observed(first), out, rows.untyped_storage().nbytes() - rows.nbytes


@WORLDS
@pytest.mark.parametrize("wire", [Fp32(), Fp8(block=8)], ids=repr)
def test_rows_and_outputs_are_their_callers_for_good(world, wire):
    cases = [make_case(spec_of(wire, combine_wire=Fp32()), [7] * world.num_ranks, seed=i) for i in range(4)]
    got = world.run(outlive_the_slots, cases)
    check_received(cases[0], [rows for rows, _, _ in got])
    wants = oracle.combined(cases[0].spec, cases[0].topk, cases[0].flat_y())
    for (_, out, more_bytes), want in zip(got, wants, strict=True):
        assert same_bits(out, want)
        assert more_bytes == 0  # as many rows as came, and no more


def dispatch_more_than_capacity(group, case):
    with open_buffer(group, case.spec, debug=True) as buffer:
        recv = dispatch(buffer, case)
        again = buffer.dispatch(case.x[buffer.rank], recv.plan)
        home = buffer.combine(recv.x, recv.plan)
        to_two = torch.tensor([[0, 4, -1]], device=device())
        room = buffer.dispatch(case.x[buffer.rank][:1], to_two, rows="capacity")
        try:
            buffer.dispatch(case.x[buffer.rank], recv.plan, rows="capacity")
        except (ConfigError, PeerFailed) as error:
            return observed(recv), observed(again), home, room.x.cpu(), room.src_idx.cpu(), str(error)


@WORLDS
def test_an_exact_call_has_room_for_any_routing(world):
    """Also on a plan; and where rows are not counted, ``capacity`` rows, of which those that hold none are 0."""
    spec = spec_of(layout=replace(STAGED, capacity=6))
    case = make_case(spec, [7] * world.num_ranks)
    got = world.run(dispatch_more_than_capacity, case)
    check_received(case, [mine for mine, *_ in got])
    check_received(case, [again for _, again, *_ in got], weights=False, extras=False)
    data = [want["data"] for want in oracle.received(spec, case.topk, case.x)]
    for (_, _, home, *_), want in zip(got, oracle.combined(spec, case.topk, data), strict=True):
        assert same_bits(home, want)
    for _, _, _, room, src_idx, error in got:
        assert room.shape[0] == 6
        assert (src_idx >= 0).sum() == world.num_ranks
        assert not room[src_idx < 0].any()
        assert (room[src_idx >= 0] != 0).all()
        assert "rows='capacity' is room for 6 rows, and the plan has" in error


def refuse(group, spec):
    with open_buffer(group, spec) as buffer:
        x, topk_idx = torch.ones(2, 16, device=device()), torch.zeros(2, 3, dtype=torch.int64, device=device())
        topk_idx += torch.arange(3, device=device())
        before = buffer._consent.next_sequence
        with pytest.raises(ConfigError, match=r"Expanded\(capacity=\.\.\., staged=True\), or pass rows='exact'"):
            buffer.dispatch(x, topk_idx, rows="capacity")
        plan = buffer.dispatch(x, topk_idx).plan
        with pytest.raises(ConfigError, match="says for how many rows to make a tensor"):
            buffer.dispatch(x, plan, rows="capacity")
        return before, buffer.combine(buffer.dispatch(x, topk_idx).x, plan)[0, 0].item()


@WORLDS
def test_rows_that_nobody_counts_need_a_capacity(world):
    assert {out for _, out in world.run(refuse, spec_of())} == {3.0}


def lack_memory(group, case):
    """Rank 1 has no memory for the rows of one call, of a fresh one and of one on a plan."""
    errors = []
    with open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        plan = dispatch(buffer, case).plan
        full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        for routing in (case.topk[r], plan):
            maker = getattr(buffer._backend, "_rows", buffer._backend)._row_maker
            with mock.patch.object(maker, "_empty", side_effect=full) if r else nullcontext():
                try:
                    buffer.dispatch(case.x[r], routing)
                    buffer.check()
                except (TransportError, PeerFailed) as error:
                    errors.append(error)
        return errors, observed(dispatch(buffer, case))


@pytest.mark.worlds("processes-2", "interpreted-2")
def test_rows_without_memory_are_the_failure_of_all_ranks(world):
    case = make_case(spec_of(), [7] * world.num_ranks)
    got = world.run(lack_memory, case)
    for errors, _ in got:
        assert [type(error) for error in errors] in ([PeerFailed] * 2, [TransportError] * 2)
    assert all("no memory for the" in str(error) for error in got[1][0])
    assert all(error.rank == 1 and "can't allocate memory" in error.reason for error in got[0][0])
    check_received(case, [rows for _, rows in got])


def train(group, case):
    with open_buffer(group, case.spec) as buffer:
        r, given = buffer.rank, []
        lend = buffer._slots.lend

        def note(*args, **kwargs):
            given.append(lend(*args, **kwargs).x)
            return lend(*args, **kwargs)

        with mock.patch.object(buffer._slots, "lend", note):
            recv = autograd.dispatch(buffer, case.x[r].requires_grad_(), case.topk[r])
            autograd.combine(buffer, recv.x * 2, recv.plan).sum().backward()
        is_same = recv.x.data_ptr() == given[0].data_ptr()
        return is_same, case.x[r].grad


@WORLDS
def test_training_takes_the_rows_as_they_are(world):
    case = make_case(spec_of(), [7] * world.num_ranks)
    for (is_same, grad), topk in zip(world.run(train, case), case.topk, strict=True):
        assert is_same
        assert same_bits(grad, (2.0 * (topk >= 0).sum(1)).view(-1, 1).expand(-1, 16).contiguous())
