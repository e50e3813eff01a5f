"""Dispatch against the oracle, bit for bit, in every layout and format."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock import (
    Bf16,
    CapacityError,
    Compact,
    ConfigError,
    Expanded,
    Fp8,
    Fp16,
    Fp32,
    Padded,
    PeerFailed,
    Quantized,
    Spec,
)
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, check_received, loads, make_case, observed, raw_rows, same_bits
from tests.world import device, open_buffer

LAYOUTS = [Compact(), Expanded(), Expanded(alignment=8), Padded(), STAGED]
WIRES = [
    Bf16(),
    Fp16(),
    Fp32(),
    Fp8(block=8),
    Fp8(block=8, pow2=True),
    Fp8(block=4, scale="ue8m0"),
    Fp8(block=4, scale="ue8m0", packed=True),
]


def spec_of(layout, wire=None, num_experts=16, **kwargs):
    kwargs = {"num_topk": 4, "hidden": 24, "max_tokens": 9, "extra_bytes": EXTRA_BYTES} | kwargs
    return Spec(num_experts=num_experts, layout=layout, wire=wire or Bf16(), **kwargs)


def dispatch_each(group, cases, rows=None):
    """Several calls in a row: slots come round, and debug fills them with NaN before."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        return [
            observed(
                buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], rows=rows)
            )
            for case in cases
        ]


def check_each(world, cases, rows=None):
    got = world.run(dispatch_each, cases, rows)
    for i, case in enumerate(cases):
        check_received(case, [mine[i] for mine in got])


@pytest.mark.parametrize("wire", WIRES, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_brings_every_row_to_its_place(world, layout, wire):
    check_each(world, loads(spec_of(layout, wire), world.num_ranks))


COLUMNS = [
    Fp8(block=8, column_major=True),
    Fp8(block=4, scale="ue8m0", column_major=True),
    Fp8(block=4, scale="ue8m0", packed=True, column_major=True),
]


def dispatch_columns(group, cases):
    """Each case's rows cast on the way, with a plan and copied, and as the caller has quantised them, column-major too.

    And, of each dispatch, the scales' strides and what is left of their address by 16 bytes.
    """
    spec, seen = cases[0].spec, []
    with open_buffer(group, spec, debug=True) as buffer:
        for case in cases:
            x, topk_idx = case.x[buffer.rank], case.topk[buffer.rank]
            rows = spec.wire.quantize(x)
            turned = rows.scale.t().contiguous().t()
            fresh = buffer.dispatch(x, topk_idx)
            seen.append(_seen(fresh))
            seen.append(_seen(buffer.dispatch(x, fresh.plan, copy=True)))
            seen.append(_seen(buffer.dispatch(rows, topk_idx, rows="capacity")))
            seen.append(_seen(buffer.dispatch(Quantized(rows.data, turned), topk_idx)))
    return seen


def _seen(recv):
    scale = recv.x.scale
    return observed(recv), tuple(scale.shape), scale.stride(), scale.data_ptr() % 16


def check_columns(world, cases):
    """Scales are what they are without ``column_major``; only their strides differ."""
    spec = cases[0].spec
    room = spec.capacity(world.num_ranks)
    plain = [replace(case, spec=replace(spec, wire=replace(spec.wire, column_major=False))) for case in cases]
    got = world.run(dispatch_columns, cases)
    for i, case in enumerate(plain):
        for way in range(4):
            seen = [mine[4 * i + way] for mine in got]
            check_received(case, [rows for rows, *_ in seen], weights=False, extras=False)
            for _, shape, strides, address in seen:
                num_rows = max(1, shape[-2]) if way == 1 or spec.is_staged else room
                step = -(-num_rows * spec.wire.scale_dtype.itemsize // 16) * 16 // spec.wire.scale_dtype.itemsize
                lead = (step * shape[-1],) if isinstance(spec.layout, Padded) else ()
                assert strides == (*lead, 1, step)
                assert shape[-1] == spec.wire.num_scales(spec.hidden)
                assert address == 0 or 0 in shape


@pytest.mark.parametrize("wire", COLUMNS, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_scales_arrive_column_major(world, layout, wire):
    check_columns(world, loads(spec_of(layout, wire, hidden=56), world.num_ranks))


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("wire", COLUMNS, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_scales_of_unquantized_rows_arrive_column_major(world, layout, wire):
    check_columns(world, loads(spec_of(layout, replace(wire, block=32), hidden=7168), 2)[:2])


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_both_row_modes_bring_the_same(world, layout, rows):
    check_each(world, loads(spec_of(layout, Fp8(block=8)), world.num_ranks), rows)


@pytest.mark.worlds("inproc-3", "inproc-8", "processes-4")
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=repr)
def test_brings_every_row_to_its_place_among_many_and_odd_ranks(world, layout):
    num_experts = {3: 6, 4: 160, 8: 384}[world.num_ranks]
    check_each(world, loads(spec_of(layout, num_experts=num_experts), world.num_ranks))


@pytest.mark.worlds("inproc-3")
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=16)], ids=repr)
def test_brings_every_row_to_its_place_among_384_experts(world, layout):
    check_each(world, loads(spec_of(layout, num_experts=384, num_topk=8), 3))


def dispatch_plainly(group, case):
    with open_buffer(group, case.spec, debug=True) as buffer:
        return observed(buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank]))


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_needs_no_weights_and_no_extras(world, layout):
    case = make_case(spec_of(layout, extra_bytes=0), [9, 4])
    check_received(case, world.run(dispatch_plainly, case), weights=False, extras=False)


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_extras_of_several_bytes_may_come_with_no_row(world, layout):
    check_each(world, [make_case(spec_of(layout), [0, 0])])


@pytest.mark.worlds("inproc-4")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_gives_the_same_bits_on_every_run(world, layout):
    cases = loads(spec_of(layout, Fp8(block=8)), 4)
    first, second = world.run(dispatch_each, cases), world.run(dispatch_each, cases)
    for mine, again in zip(first, second, strict=True):
        for call, call_again in zip(mine, again, strict=True):
            is_row = call["src_idx"] >= 0
            pairs = [(raw_rows(call[k])[is_row], raw_rows(call_again[k])[is_row]) for k in call if k != "counts"]
            assert all(torch.equal(a, b) for a, b in pairs)


def dispatch_by_ranks(group, goes, x, y):
    """Rows to the ranks of a mask, and the sum of what comes home."""
    spec = spec_of(Compact(), Fp32(), num_experts=6, num_topk=2, hidden=4, extra_bytes=0)
    with open_buffer(group, spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(x[r], goes[r])
        rows = recv.x.clone(), recv.src_idx, recv.topk_idx, recv.num_tokens_per_expert
        out = buffer.combine(y[r], recv.plan, weights=torch.tensor([1.0, 10.0]).repeat(x[r].shape[0], 1))
        again = buffer.dispatch(x[r], goes[r]).x.clone()
        none = buffer.dispatch(x[r][:0], goes[r][:0]).num_rows
        return *rows, out, again, none


@pytest.mark.worlds("inproc-3", "interpreted-3")
def test_rows_may_go_to_ranks_instead_of_experts(world):
    g = torch.Generator().manual_seed(3)
    goes = [torch.rand(t, 3, generator=g) < 0.6 for t in (5, 0, 9)]
    for mask in goes:
        mask[mask.all(1), 1] = False  # two ranks at most
    x = [torch.randn(mask.shape[0], 4, generator=g) for mask in goes]
    rows = [[(s, t) for s, mask in enumerate(goes) for t in range(mask.shape[0]) if mask[t, r]] for r in range(3)]
    y = [torch.randn(len(mine), 4, generator=g) for mine in rows]
    for rank, (came, src_idx, topk_idx, counts, out, again, none) in enumerate(
        world.run(dispatch_by_ranks, goes, x, y)
    ):
        want = torch.stack([x[s][t] for s, t in rows[rank]])
        assert same_bits(came, want)
        assert same_bits(again, want)
        assert src_idx.tolist() == [9 * s + t for s, t in rows[rank]]
        assert counts.tolist() == [len(rows[rank]), 0]
        assert (topk_idx >= 0).sum(1).tolist() == [1] * len(rows[rank])
        for t in range(x[rank].shape[0]):
            total = torch.zeros(4)
            for weight, place in zip((1.0, 10.0), goes[rank][t].nonzero().flatten().tolist(), strict=False):
                total = total + weight * y[place][rows[place].index((rank, t))]
            assert same_bits(out[t], total)
        assert none == 0


def dispatch_cached(group, cases):
    """The first case's plan carries the others' rows; T is the same."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r = buffer.rank
        plan = buffer.dispatch(cases[0].x[r], cases[0].topk[r]).plan
        return [
            observed(buffer.dispatch(case.x[r], plan, weights=case.weights[r], extras=case.extras[r])) for case in cases
        ]


@pytest.mark.worlds("inproc-1", "inproc-4", "processes-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_plan_sends_other_rows_the_same_way(world, layout):
    spec = spec_of(layout, Fp8(block=8))
    num_tokens = [(2 * r + 5) % 10 for r in range(world.num_ranks)]
    cases = [make_case(spec, num_tokens, seed=seed) for seed in range(5)]
    got = world.run(dispatch_cached, cases)
    for i, case in enumerate(cases):
        object.__setattr__(case, "topk", cases[0].topk)
        check_received(case, [mine[i] for mine in got])


def dispatch_unquantized(group, cases):
    """Calls by turns narrow and wide, on picks and on plans; outputs of the call before are pulled meanwhile."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r, got, outs, before = buffer.rank, [], [], None
        for case in cases:
            narrow = buffer.dispatch(case.x[r], case.topk[r])
            pulled = buffer.combine_start(narrow.output_rows().fill_(1), narrow.plan)
            wide = buffer.dispatch(
                case.y[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], unquantized=True
            )
            got.append(observed(wide))
            assert buffer.spec.is_staged or wide.x.data_ptr() == wide.output_rows().data_ptr()
            outs.append((pulled.wait(), buffer.combine(wide.x, wide.plan)))
            got.append(
                observed(buffer.dispatch(case.y[r], narrow.plan, weights=case.weights[r], unquantized=True, copy=True))
            )
            before = narrow
        assert before.is_stale != buffer.spec.is_staged
        return got, outs, int(buffer.stats.num_tokens_per_expert.sum())


@pytest.mark.worlds("inproc-1", "inproc-4", "processes-2")
@pytest.mark.parametrize("combine_wire", [Bf16(), Fp32()], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_unquantized_rows_travel_in_the_combine_format(world, layout, combine_wire):
    spec = spec_of(layout, Fp8(block=8), combine_wire=combine_wire)
    cases = loads(spec, world.num_ranks)
    for case in cases:
        case.y[:] = [x * 1.0078125 for x in case.x]  # wide tokens [T, H] here: bits that FP8 has not
    got = world.run(dispatch_unquantized, cases)
    for i, case in enumerate(cases):
        wide = replace(case, spec=replace(spec, wire=combine_wire))
        check_received(wide, [mine[2 * i] for mine, _, _ in got], x=case.y)
        check_received(wide, [mine[2 * i + 1] for mine, _, _ in got], x=case.y, extras=False)
        ones = [torch.ones(len(rows), spec.hidden) for rows in oracle.rows_of(spec, case.topk)]
        sums = oracle.combined(spec, case.topk, ones)
        copies = [torch.nan_to_num(want["data"]) for want in oracle.received(wide.spec, case.topk, case.y)]
        for rank, want in enumerate(oracle.combined(spec, case.topk, copies)):
            pulled, combined = got[rank][1][i]
            assert same_bits(pulled, sums[rank])
            assert same_bits(combined, want)
    num_picks = sum(int((topk >= 0).sum()) for case in cases for topk in case.topk)
    assert sum(num_tokens for _, _, num_tokens in got) == num_picks  # unquantized rows are not counted


def disagree_about_width(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x = torch.ones(2, 24, dtype=torch.bfloat16, device=device())
        plan = buffer.dispatch(x, torch.full((2, 4), -1, device=device())).plan
        buffer.dispatch(x, plan, unquantized=buffer.rank == 0)
        buffer.check()


@pytest.mark.worlds("inproc-2", "processes-2")
def test_ranks_that_disagree_about_width_are_told(world):
    outcomes = world.outcomes(disagree_about_width, spec_of(Expanded(), Fp8(block=8)))
    assert all(isinstance(outcome, PeerFailed) for outcome in outcomes)


def dispatch_unquantized_in_another_format(group, spec):
    with open_buffer(group, spec) as buffer:
        buffer.dispatch(torch.ones(2, 24), torch.zeros(2, 4, dtype=torch.int64) - 1, unquantized=True)


@pytest.mark.worlds("inproc-1")
def test_unquantized_rows_of_another_format_are_refused(world):
    with pytest.raises(ConfigError, match=r"x is float32; with unquantized=True .* x\.to\(torch\.bfloat16\)"):
        world.run(dispatch_unquantized_in_another_format, spec_of(Expanded(), Fp8(block=8)))


def dispatch_quantized(group, case):
    with open_buffer(group, case.spec) as buffer:
        wire, x = case.spec.wire, case.x[buffer.rank]
        data, scale = wire.quantize(x)
        # Bits that no cast would give: what a caller hands in travels as it is.
        data.view(torch.uint8).bitwise_xor_(0x55)
        recv = buffer.dispatch(Quantized(data, scale), case.topk[buffer.rank])
        return observed(recv), Quantized(data, scale)


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("wire", WIRES[3:], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_rows_a_caller_has_quantised_travel_as_they_are(world, layout, wire):
    case = make_case(spec_of(layout, wire), [9, 5])
    got = world.run(dispatch_quantized, case)
    check_received(case, [mine for mine, _ in got], x=[sent for _, sent in got], weights=False, extras=False)


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("wire", [Bf16(), Fp32(), Fp8(block=8)], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_nan_and_infinity_travel(world, layout, wire):
    case = make_case(spec_of(layout, wire), [9, 9])
    for x in case.x:
        x[::2, 3], x[1::3, 5], x[2::3, 6], x[4, 7] = float("nan"), float("inf"), -float("inf"), -0.0
    check_received(case, world.run(dispatch_plainly, case), weights=False, extras=False)


def overflow(group, full, small, mode):
    """A call that is too large, as it is seen; the next one; and whether the buffer works afterwards."""
    with open_buffer(group, full.spec, debug=True) as buffer:
        r = buffer.rank
        seen = []

        def dispatch(case):
            return buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r], rows=mode)

        for how in ("next call", "check"):
            try:
                recv = dispatch(full)
                seen.append(observed(recv))
                out = buffer.combine(torch.full_like(recv.output_rows(), 3), recv.plan) if how == "check" else None
                if how == "next call":
                    dispatch(small)
                buffer.check()  # on CUDA the next call need not know yet
            except CapacityError as error:
                seen.append(str(error))
            if how == "check" and mode == "capacity":
                assert out is None or not out.any()
        buffer.check()
        return seen, observed(dispatch(small))


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-2")
@pytest.mark.parametrize("layout", [Compact(capacity=7), Expanded(capacity=12), Padded(capacity=3)], ids=repr)
def test_an_overflow_raises_the_same_on_every_rank_before_a_row_moves(world, layout):
    spec = spec_of(layout)
    full = make_case(spec_of(type(layout)()), [9] * world.num_ranks, picks="one")
    small = make_case(spec, [1] + [0] * (world.num_ranks - 1))
    object.__setattr__(full, "spec", spec)
    needed = 9 * world.num_ranks
    got = world.run(overflow, full, small, "exact")
    assert len({str(seen) for seen, _ in got}) == 1
    assert got[0][0][0].startswith(f"{needed} rows were routed to rank 0")
    assert f"{type(layout).__name__}(capacity={needed})" in got[0][0][0]
    check_received(small, [mine for _, mine in got])


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("layout", [Compact(capacity=7), Expanded(capacity=12), Padded(capacity=3)], ids=repr)
def test_an_overflow_without_a_host_sync_gives_nothing_and_is_told_later(world, layout):
    spec = spec_of(layout)
    full = make_case(spec_of(type(layout)()), [9] * world.num_ranks, picks="one")
    small = make_case(spec, [1] + [0] * (world.num_ranks - 1))
    object.__setattr__(full, "spec", spec)
    got = world.run(overflow, full, small, "capacity")
    for seen, _ in got:
        for nothing, error in (seen[:2], seen[2:]):
            assert not nothing["counts"].any()
            assert (nothing["src_idx"] == -1).all()
            assert error == got[0][0][1]
            assert "rows were routed to rank 0" in error
    check_received(small, [mine for _, mine in got])


def count_returns(group, topk, layout):
    """Combines what came, with unit weights: each token times its picks."""
    spec = Spec(num_experts=8, num_topk=3, hidden=4, max_tokens=6, wire=Fp32(), layout=layout)
    with open_buffer(group, spec, debug=True) as buffer:
        mine = topk[buffer.rank]
        x = torch.arange(1.0, 1 + mine.shape[0] * 4, device=device()).view(-1, 4)
        recv = buffer.dispatch(x, mine)
        counts = None if recv.topk_idx is None else (recv.topk_idx >= 0).sum(1, keepdim=True)
        out = buffer.combine(recv.x if counts is None else recv.x * counts, recv.plan)
        assert torch.equal(out, x * (mine >= 0).sum(1, keepdim=True))
        is_row = recv.src_idx >= 0
        return recv.src_idx[is_row], recv.num_tokens_per_expert


@st.composite
def routings(draw, num_ranks):
    token = st.lists(st.integers(0, 7), min_size=3, max_size=3, unique=True)
    masks = st.lists(st.booleans(), min_size=3, max_size=3)
    tokens = st.lists(st.tuples(token, masks), max_size=6)
    picked = [[[e if m else -1 for e, m in zip(*t, strict=True)] for t in draw(tokens)] for _ in range(num_ranks)]
    return [torch.tensor(p, dtype=torch.int64).view(-1, 3) for p in picked]


@pytest.mark.worlds("inproc-1", "inproc-2", "inproc-4")
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=4), Padded()], ids=repr)
@given(data=st.data())
def test_rows_are_conserved_and_come_home_once_per_pick(world, layout, data):
    topk = data.draw(routings(world.num_ranks))
    got = world.run(count_returns, topk, layout)
    assert sum(int(counts.sum()) for _, counts in got) == sum(int((idx >= 0).sum()) for idx in topk)
    rows = torch.cat([src_idx for src_idx, _ in got])
    num_local = 8 // world.num_ranks
    for source, idx in enumerate(topk):
        for token, experts in enumerate(idx.tolist()):
            places = [e // num_local if isinstance(layout, Compact) else e for e in experts if e >= 0]
            assert int((rows == source * 6 + token).sum()) == len(set(places))
