"""How long what a dispatch gave may be used."""

import pytest
import torch

from crossdock import Bf16, Buffer, Compact, ConfigError, Expanded, Fp8, Fp32, Padded, PeerFailed, Quantized, Spec
from tests import oracle
from tests.cases import EXTRA_BYTES, check_received, make_case, observed, same_bits
from tests.world import open_buffer

LAYOUTS = [Compact(), Expanded(alignment=4), Padded()]


def cases_of(world, layout, count, wire=None):
    spec = Spec(
        num_experts=8, num_topk=3, hidden=16, max_tokens=7, layout=layout, wire=wire or Bf16(), extra_bytes=EXTRA_BYTES
    )
    return [make_case(spec, [7] * world.num_ranks, seed=i) for i in range(count)]


def dispatch(buffer, case, **kwargs):
    r = buffer.rank
    return buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], **kwargs)


def outlive_the_slot(group, cases):
    """The first dispatch's rows after one more, and after two more, which takes its slot of two."""
    with Buffer(group, cases[0].spec, debug=True) as buffer:
        first = dispatch(buffer, cases[0])
        rows, outputs = first.x, first.output_rows()
        dispatch(buffer, cases[1])
        assert first.x is rows
        assert not first.is_stale
        still = observed(first)
        dispatch(buffer, cases[2])
        assert first.is_stale
        for use in (lambda: first.x, first.output_rows):
            with pytest.raises(ConfigError, match="these rows are stale: receive slot 0 has been taken"):
                use()
        for y in (outputs, outputs[: rows.shape[0]]):
            with pytest.raises((ConfigError, PeerFailed), match="which a later dispatch has taken"):
                buffer.combine(y, first.plan)
        out = buffer.combine(cases[0].y[buffer.rank], first.plan)
        again = observed(buffer.dispatch(cases[3].x[buffer.rank], first.plan))
        return still, out, again


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_rows_go_stale_when_their_slot_comes_round_and_the_plan_does_not(world, layout):
    cases = cases_of(world, layout, 4)
    got = world.run(outlive_the_slot, cases)
    check_received(cases[0], [still for still, _, _ in got])
    wants = oracle.combined(cases[0].spec, cases[0].topk, cases[0].flat_y())
    assert all(same_bits(out, want) for (_, out, _), want in zip(got, wants, strict=True))
    object.__setattr__(cases[3], "topk", cases[0].topk)
    check_received(cases[3], [again for _, _, again in got], weights=False, extras=False)


def strides_of_no_rows(group, case):
    """Of all that a rank is handed to which no rows came, and those that torch makes."""
    with open_buffer(group, case.spec) as buffer:
        recv = dispatch(buffer, case)
        _, home = buffer.combine(recv.output_rows(), recv.plan, extras=[torch.zeros(*recv.src_idx.shape, 2)])
        data, scale = recv.x
        given = (data, scale, recv.output_rows(), recv.src_idx, recv.topk_idx, recv.weights, *recv.extras, *home)
        return [(part.stride(), part.new_empty(part.shape).stride()) for part in given if part is not None]


@pytest.mark.parametrize("layout", [Compact(), Expanded(), Expanded(staged=True)], ids=repr)
def test_no_rows_have_the_strides_of_any(world, layout):
    spec = Spec(
        num_experts=8, num_topk=3, hidden=16, max_tokens=7, layout=layout, wire=Fp8(block=8), extra_bytes=EXTRA_BYTES
    )
    for strides in world.run(strides_of_no_rows, make_case(spec, [0] * world.num_ranks)):
        assert all(got == want for got, want in strides), strides


def list_counts(group, cases):
    """The lists of a fresh dispatch, of one on its plan, of one in two halves; of one whose rows nobody counts, or why
    there is none; and what the tensors say."""
    with open_buffer(group, cases[0].spec) as buffer:
        first = dispatch(buffer, cases[0], rows="exact")
        r = buffer.rank
        again = buffer.dispatch(cases[0].x[r], first.plan)
        other = buffer.dispatch_start(cases[1].x[r], cases[1].topk[r], rows="exact").wait()
        pairs = [
            (recv.num_tokens_per_expert_list, recv.num_tokens_per_expert.tolist()) for recv in (first, again, other)
        ]
        uncounted = dispatch(buffer, cases[1], rows="capacity")
        try:
            return pairs, uncounted.num_tokens_per_expert_list, uncounted.num_tokens_per_expert.tolist()
        except ConfigError as error:
            return pairs, str(error), None


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_counts_are_there_as_integers_where_the_host_has_waited_for_them(world, layout):
    for pairs, listed, wanted in world.run(list_counts, cases_of(world, layout, 2, Fp32())):
        assert all(isinstance(count, int) for mine, _ in pairs for count in mine)
        for mine, theirs in pairs:
            assert mine == theirs
            assert sum(mine) > 0
        if world.kind == "interpreted":
            assert "the host was not told" in listed
            assert "rows='exact'" in listed
            assert "num_tokens_per_expert.tolist()" in listed
        else:
            assert listed == wanted


def copy_what_came(group, case):
    """A slot that nobody has filled is 0 behind the rows that came; memory that nobody has written is NaN in tests."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], rows="capacity", copy=True)
        again = buffer.dispatch(case.x[r], recv.plan, rows="capacity", copy=True)
        wide = buffer.dispatch(case.x[r], recv.plan, rows="capacity", copy=True, unquantized=True)
        view = buffer.dispatch(case.x[r], recv.plan, rows="capacity")
        out = torch.full_like(view.x, torch.nan)
        buffer.copy_rows(view, out)
        for wrong in (out[..., 1:], out.half(), out.mT.contiguous().mT, Quantized(out, out)):
            with pytest.raises(ConfigError, match=r"out is .*; pass a .*, as recv\.x is"):
                buffer.copy_rows(view, wrong)
        return [(each.x.clone(), each.src_idx) for each in (recv, again, wide)] + [(out, view.src_idx)]


@pytest.mark.worlds("inproc-2", "interpreted-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_copy_has_the_rows_that_came_and_touches_no_others(world, layout):
    check_copies(world, layout)


def check_copies(world, layout):
    (case,) = cases_of(world, layout, 1, Fp32())
    wants = oracle.received(case.spec, case.topk, case.x)
    for copies, want in zip(world.run(copy_what_came, case), wants, strict=True):
        for rows, src_idx in copies:
            flat, sources = rows.flatten(0, -2), src_idx.flatten()
            num_rows = want["data"].shape[0]
            is_row = want["src_idx"] >= 0
            assert torch.equal(sources[:num_rows], want["src_idx"])
            assert same_bits(flat[:num_rows][is_row], want["data"][is_row])
            if isinstance(layout, Padded):
                assert flat[sources < 0].isnan().all()
            else:  # the gaps of an alignment are zero
                assert same_bits(flat[:num_rows], want["data"])
                assert flat[num_rows:].isnan().all()
            assert num_rows < flat.shape[0] or isinstance(layout, Padded)


def give_the_copy_back(group, case):
    with Buffer(group, case.spec) as buffer:
        recv = dispatch(buffer, case, copy=True)
        view = recv.without_copy()
        rows = (recv.x.data, view.x.data) if isinstance(recv.x, Quantized) else (recv.x, view.x)
        assert same_bits(rows[0], rows[1])
        assert rows[0].data_ptr() != rows[1].data_ptr() or not rows[0].numel()
        assert view.plan is recv.plan
        assert view.src_idx is recv.src_idx
        for _ in range(case.spec.num_slots):
            dispatch(buffer, case)
        assert recv.x is rows[0] or isinstance(recv.x, Quantized)
        with pytest.raises(ConfigError, match="these rows are stale"):
            view.x  # noqa: B018 - looked at


@pytest.mark.worlds("inproc-2")
def test_a_copy_can_be_given_back_for_the_view(world):
    (case,) = cases_of(world, Compact(), 1, Fp32())
    world.run(give_the_copy_back, case)


def keep_a_copy(group, cases):
    with Buffer(group, cases[0].spec, debug=True) as buffer:
        kept = dispatch(buffer, cases[0], copy=True)
        small = [kept.topk_idx, kept.weights, kept.src_idx, *kept.extras]
        for case in cases[1:] * 2:
            dispatch(buffer, case)
        assert all(
            a is b for a, b in zip(small, [kept.topk_idx, kept.weights, kept.src_idx, *kept.extras], strict=True)
        )
        with pytest.raises(ConfigError, match="stale"):
            kept.output_rows()
        return observed(kept)


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("wire", [Bf16(), Fp8(block=8), Fp8(block=8, column_major=True)], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_copy_outlives_its_slot(world, layout, wire):
    cases = cases_of(world, layout, 4, wire)
    check_received(cases[0], world.run(keep_a_copy, cases))


def read_after_close(group, case):
    with Buffer(group, case.spec) as buffer:
        recv = dispatch(buffer, case)
    del buffer
    return observed(recv)


@pytest.mark.worlds("inproc-2", "processes-2")
def test_rows_stay_readable_after_the_buffer_is_closed(world):
    case = cases_of(world, Expanded(), 1, Fp8(block=8))[0]
    check_received(case, world.run(read_after_close, case))


def look_at_poison(group, cases):
    """A view that outlives its rows, with debug: NaN, not the next call's rows."""
    with Buffer(group, cases[0].spec, debug=True) as buffer:
        x = dispatch(buffer, cases[0]).x
        view = x.scale if isinstance(x, Quantized) else x
        dispatch(buffer, cases[1])
        nothing = torch.full_like(cases[2].topk[0], -1)
        buffer.dispatch(cases[2].x[buffer.rank], nothing)
        return view.clone()


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("wire", [Bf16(), Fp8(block=8, column_major=True)], ids=["Bf16", "scales column-major"])
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_debug_makes_a_stale_view_show(world, layout, wire):
    assert all(view.isnan().all() for view in world.run(look_at_poison, cases_of(world, layout, 3, wire)))


def combine_rows_in_place(group, case):
    """The received rows themselves as outputs: they lie in the arena, but not where outputs are pulled from."""
    with Buffer(group, case.spec, debug=True) as buffer:
        recv = dispatch(buffer, case)
        return buffer.combine(recv.x, recv.plan), recv.x.clone()


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=repr)
def test_received_rows_can_go_straight_back(world, layout):
    case = cases_of(world, layout, 1)[0]
    got = world.run(combine_rows_in_place, case)
    wants = oracle.combined(case.spec, case.topk, [rows for _, rows in got])
    assert all(same_bits(out, want) for (out, _), want in zip(got, wants, strict=True))
