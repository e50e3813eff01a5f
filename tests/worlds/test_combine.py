"""Combine against the oracle, bit for bit: where sums are made, how rows go home, weights, bias, extras."""

from dataclasses import replace

import pytest
import torch

from crossdock import Bf16, Buffer, Compact, ConfigError, Expanded, Fp8, Fp16, Fp32, Padded, Spec, ThreadGroup, Topology
from tests import oracle
from tests.cases import EXTRA_BYTES, STAGED, loads, make_case, same_bits
from tests.world import device, open_buffer

LAYOUTS = [Compact(), Expanded(), Expanded(alignment=8), Padded(), STAGED]
WIRES = [Bf16(), Fp32(), Fp8(block=8)]
OPTIONS = [(False, 0), (False, 1), (True, 0), (True, 2)]
"""Whether there are weights, and which bias."""


def spec_of(layout, wire, reduce, num_experts=16, **kwargs):
    kwargs = {"num_topk": 4, "hidden": 24, "max_tokens": 9, "extra_bytes": EXTRA_BYTES} | kwargs
    return Spec(num_experts=num_experts, layout=layout, wire=wire, reduce=reduce, **kwargs)


def biases(case, rank):
    """None, one for all tokens, one for each."""
    g = torch.Generator().manual_seed(rank)
    num_tokens = case.x[rank].shape[0]
    drawn = [torch.randn(case.spec.hidden, generator=g), torch.randn(num_tokens, case.spec.hidden, generator=g)]
    return [None, *(bias.to(device()) for bias in drawn)]


def combine_each(group, cases):
    """For each case: pushed and pulled, without and with weights, each kind of bias, some into a tensor; and extras."""
    with open_buffer(group, cases[0].spec, debug=True) as buffer:
        r, outs = buffer.rank, []
        for case in cases:
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
            weights = case.weights[r] if case.spec.reduce == "token" else row_weights(recv)
            here = {}
            for way in ("pushed", "pulled"):
                y = case.y[r] if way == "pushed" else recv.output_rows().copy_(case.y[r])
                for is_weighted, i in OPTIONS:
                    given, bias = weights if is_weighted else None, biases(case, r)[i]
                    if (is_weighted, i) == (True, 2):
                        out = unwritten(case, r)
                        assert buffer.combine(y, recv.plan, weights=given, bias=bias, out=out) is out
                    else:
                        out = buffer.combine(y, recv.plan, weights=given, bias=bias)
                    here[way, is_weighted, i] = out
                here[way, "extras"] = buffer.combine(y, recv.plan, extras=case.y_extras[r])
            here["extras alone"] = buffer.return_extras(recv.plan, case.y_extras[r])
            outs.append(here)
        return outs


def unwritten(case, rank):
    """Room for a rank's sums, at no multiple of 16 bytes."""
    num_values = case.topk[rank].shape[0] * case.spec.hidden
    room = torch.full((1 + num_values,), float("nan"), dtype=case.spec.combine_dtype, device=device())
    return room[1:].view(-1, case.spec.hidden)


def row_weights(recv):
    """One weight per row that came; of a row that serves several picks (Compact), their sum."""
    return recv.weights if recv.topk_idx is None else summed(recv.weights)


def summed(weights):
    """Over picks, from left to right on any device, as torch's own sum is not."""
    total = weights[:, 0]
    for k in range(1, weights.shape[1]):
        total = total + weights[:, k]
    return total


def weights_of_rows(case):
    weights = [want["weights"] for want in oracle.received(case.spec, case.topk, case.x, case.weights)]
    return [summed(w) for w in weights] if isinstance(case.spec.layout, Compact) else weights


def check_each(world, cases, node_size=None):
    got = world.run(combine_each, cases)
    for case, here in zip(cases, zip(*got, strict=True), strict=True):
        y = case.flat_y()
        weights = case.weights if case.spec.reduce == "token" else weights_of_rows(case)
        plain = oracle.combined(case.spec, case.topk, y, node_size=node_size)
        home = [[extra[i].flatten(0, -2) for extra in case.y_extras] for i in range(2)]
        extras = [oracle.returned_extras(case.spec, case.topk, extra, node_size) for extra in home]
        for way in ("pushed", "pulled"):
            for is_weighted, i in OPTIONS:
                bias = None if i == 0 else [biases(case, r)[i] for r in range(world.num_ranks)]
                wants = oracle.combined(case.spec, case.topk, y, weights if is_weighted else None, bias, node_size)
                for rank, want in enumerate(wants):
                    label = (case.name, rank, way, is_weighted, f"bias {i}")
                    assert same_bits(here[rank][way, is_weighted, i], want), label
            for rank, want in enumerate(plain):
                out, home = here[rank][way, "extras"]
                assert same_bits(out, want), (case.name, rank, way)
                for some in (home, here[rank]["extras alone"]):
                    assert all(same_bits(a, b[rank]) for a, b in zip(some, extras, strict=True)), (case.name, rank, way)


# Of three choices, all pairs.
@pytest.mark.parametrize(
    ("layout", "wire", "reduce"),
    [
        (layout, wire, ("token", "rank")[(i + j) % 2])
        for i, layout in enumerate([Compact(), Expanded(alignment=8), Padded()])
        for j, wire in enumerate(WIRES)
    ],
    ids=repr,
)
def test_sums_every_row_in_its_order(world, layout, wire, reduce):
    check_each(world, loads(spec_of(layout, wire, reduce), world.num_ranks))


@pytest.mark.worlds("inproc-3", "inproc-8", "processes-4")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=8)], ids=repr)
def test_sums_every_row_in_its_order_among_many_and_odd_ranks(world, layout, reduce):
    num_experts = {3: 6, 4: 160, 8: 384}[world.num_ranks]
    check_each(world, loads(spec_of(layout, Bf16(), reduce, num_experts=num_experts), world.num_ranks)[:3])


GRIDS = [(2, 2), (4, 1), (1, 4)]


@pytest.mark.worlds("inproc-4", "processes-4")
@pytest.mark.parametrize(
    ("layout", "wire", "grid"),
    [
        (layout, wire, GRIDS[(i + j) % 3])
        for i, layout in enumerate([Compact(), Expanded(alignment=8), Padded()])
        for j, wire in enumerate(WIRES)
    ],
    ids=repr,
)
def test_sums_each_node_first(world, layout, wire, grid):
    nodes, local = grid
    world = world.opening(topology=Topology.grid(nodes=nodes, local=local))
    check_each(world, loads(spec_of(layout, wire, "node"), world.num_ranks), node_size=local)


def test_sums_of_nodes_are_not_those_of_ranks_or_of_tokens():
    """Or the test above would hold whatever ``reduce`` did."""
    case = make_case(spec_of(Expanded(), Bf16(), "node"), [9] * 4)
    outs = [
        torch.cat(oracle.combined(replace(case.spec, reduce=reduce), case.topk, case.flat_y(), node_size=2))
        for reduce in ("node", "rank", "token")
    ]
    assert not same_bits(outs[0], outs[1])
    assert not same_bits(outs[0], outs[2])


def combine_with_weights_on_one(group, case):
    with open_buffer(group, case.spec, topology=Topology.grid(nodes=2, local=1)) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
        return buffer.combine(case.y[r], recv.plan, weights=row_weights(recv) if r else None)


@pytest.mark.worlds("inproc-2")
def test_ranks_agree_on_whether_weights_go_home(world):
    case = make_case(spec_of(Compact(), Fp32(), "node"), [3, 3])
    for outcome in world.outcomes(combine_with_weights_on_one, case):
        assert "presence of weights" in str(outcome)


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("combine_wire", [Fp16(), Fp32()], ids=repr)
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_rows_go_home_in_a_format_of_their_own(world, layout, reduce, combine_wire):
    spec = spec_of(layout, Fp8(block=8), reduce, combine_wire=combine_wire)
    check_each(world, loads(spec, world.num_ranks)[:2])


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_extras_of_several_values_come_home_to_a_rank_that_sent_nothing(world, layout):
    check_each(world, [make_case(spec_of(layout, Bf16(), "token"), [3, 3], picks="none")])


def combine_in_mixed_ways(group, case):
    """Even ranks leave their outputs to be pulled, odd ones push them."""
    with open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r])
        y = recv.output_rows().copy_(case.y[r]) if r % 2 == 0 else case.y[r]
        return buffer.combine(y, recv.plan, weights=case.weights[r] if case.spec.reduce == "token" else None)


@pytest.mark.worlds("inproc-4", "processes-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_some_ranks_push_while_others_are_pulled_from(world, layout, reduce):
    case = make_case(spec_of(layout, Bf16(), reduce), [9] * world.num_ranks)
    weights = case.weights if reduce == "token" else None
    got = world.run(combine_in_mixed_ways, case)
    assert all(map(same_bits, got, oracle.combined(case.spec, case.topk, case.flat_y(), weights)))


def combine_into(group, case):
    """Started, with extras, twice into the same tensor."""
    with open_buffer(group, case.spec) as buffer:
        r, outs = buffer.rank, []
        recv = buffer.dispatch(case.x[r], case.topk[r])
        out = unwritten(case, r)
        for y in (case.y[r], recv.output_rows().copy_(case.y[r])):
            pending = buffer.combine_start(y, recv.plan, out=out)
            assert pending.wait() is out
            outs.append(out.clone())
            got, _ = buffer.combine_start(y, recv.plan, extras=case.y_extras[r], out=out.zero_()).wait()
            assert got is out
            outs.append(out.clone())
        return outs


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_started_sums_are_written_where_the_caller_wants_them(world, layout):
    check_into(world, layout)


def check_into(world, layout):
    case = make_case(spec_of(layout, Fp32(), "token", num_experts=4, num_topk=3, max_tokens=4), [4, 3])
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    for outs, want in zip(world.run(combine_into, case), wants, strict=True):
        assert all(same_bits(out, want) for out in outs)


def combine_other_rows(group, case, numbers, y, weights):
    """The rows that a caller has in other places, in other numbers: without weights and with."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], rows="exact")
        old = recv.plan.partial_rows
        mine = numbers[r]
        moved = torch.where(old >= 0, mine[old.clamp(min=0).long()], -1).int()
        more = torch.cat([moved, moved.new_zeros(3, moved.shape[1])])  # of no pair
        wide = torch.cat([more[:, :1], more], dim=1)[:, 1:]  # no two rows next to each other
        outs = [buffer.combine(y[r], recv.plan, partial_rows=moved)]
        outs.append(buffer.combine_start(y[r], recv.plan, partial_rows=wide, weights=weights[r]).wait())
        outs.append(buffer.combine(y[r], recv.plan, partial_rows=more if r == 0 else moved, weights=weights[r]))
        return outs


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("layout", [Expanded(alignment=4), Padded()], ids=repr)
def test_sums_are_of_the_rows_that_the_caller_names(world, layout):
    check_other_rows(world, layout)


def check_other_rows(world, layout):
    """Rows behind and between others, which are NaN."""
    spec = spec_of(layout, Fp32(), "rank", num_experts=4, num_topk=3, max_tokens=4)
    case = make_case(spec, [4, 3])
    numbers, ys, weights = [], [], []
    for rank, y in enumerate(case.flat_y()):
        order = torch.randperm(2 * y.shape[0], generator=torch.Generator().manual_seed(rank))[: y.shape[0]]
        dense = torch.full((2 * y.shape[0] + 5, spec.hidden), float("nan"))
        dense[order] = y
        of_rows = torch.full((dense.shape[0],), float("nan"))
        of_rows[order] = weights_of_rows(case)[rank]
        numbers.append(order)
        ys.append(dense)
        weights.append(of_rows)
    plain = oracle.combined(spec, case.topk, case.flat_y())
    weighted = oracle.combined(spec, case.topk, case.flat_y(), weights_of_rows(case))
    for rank, outs in enumerate(world.run(combine_other_rows, case, numbers, ys, weights)):
        for out, want in zip(outs, (plain, weighted, weighted), strict=True):
            assert same_bits(out, want[rank])


BAD_ROWS = {
    "rows that y does not have": (lambda rows: rows + 99, "partial_rows.* = 1.*; y has rows 0 to .*-1 is none"),
    "pairs": (lambda rows: rows[:-1], "partial_rows is int32 .*or more, num_topk=2"),
    "picks": (lambda rows: rows[:, :1], r"partial_rows is int32 \[.*, 1\]; pass int32 \[pairs="),
    "dtype": (lambda rows: rows.long(), "partial_rows is int64"),
    "a list": (lambda rows: rows.tolist(), "partial_rows is a list; pass a tensor"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_summed_are_refused(name):
    make, says = BAD_ROWS[name]
    spec = Spec(num_experts=4, num_topk=2, hidden=4, max_tokens=3, wire=Fp32(), layout=Expanded(), reduce="rank")
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        recv = buffer.dispatch(torch.ones(3, 4), torch.tensor([[0, 1], [2, -1], [3, 0]]))
        rows = recv.plan.partial_rows
        with pytest.raises(ConfigError, match=says):
            buffer.combine(recv.x, recv.plan, partial_rows=make(rows))
        with pytest.raises(ConfigError, match="extras go home with the rows that came"):
            buffer.combine(recv.x, recv.plan, partial_rows=rows, extras=[recv.x[:, 0].clone()])
        with pytest.raises(ConfigError, match=r"y has shape .*; with partial_rows= pass \[rows, hidden=4\]"):
            buffer.combine(recv.x[:, :2], recv.plan, partial_rows=rows)
        assert buffer.combine(recv.x, recv.plan, partial_rows=rows)[:, 0].tolist() == [2.0, 1.0, 2.0]


def combine_at_capacity(group, case):
    """The rows of the whole slot go back, those that nothing came in are NaN."""
    with open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], rows="capacity")
        y = torch.full_like(recv.output_rows(), float("nan"))
        y[: len(case.y[r])] = case.y[r]
        weights = case.weights[r]
        if case.spec.reduce == "rank":
            weights = row_weights(recv)
        outs = [buffer.combine(y, recv.plan, weights=weights)]
        recv.output_rows().copy_(y)
        return [*outs, buffer.combine(recv.output_rows(), recv.plan, weights=weights)]


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=repr)
def test_rows_behind_the_last_count_for_nothing(world, layout, reduce):
    case = make_case(spec_of(layout, Bf16(), reduce), [9] * world.num_ranks)
    weights = case.weights if reduce == "token" else weights_of_rows(case)
    wants = oracle.combined(case.spec, case.topk, case.flat_y(), weights)
    for outs, want in zip(world.run(combine_at_capacity, case), wants, strict=True):
        assert all(same_bits(out, want) for out in outs)


def combine_literal(group, layout, reduce):
    """2**24 + 1 is no float32: which sum comes first shows. Token 0 picks experts on ranks 1, 0, 1, in that order."""
    spec = Spec(num_experts=4, num_topk=3, hidden=1, max_tokens=1, wire=Fp32(), layout=layout, reduce=reduce)
    with open_buffer(group, spec) as buffer:
        mine = [[2, 0, 3]] if buffer.rank == 0 else [[-1, -1, -1]]
        recv = buffer.dispatch(torch.zeros(1, 1, device=device()), torch.tensor(mine, device=device()))
        values = {0: 1.0, 2: 2.0**24, 3: -(2.0**24)}
        starts = recv.expert_offsets.tolist()
        y = torch.zeros(recv.num_rows, 1, device=device())
        for local in range(2):
            y[starts[local] : starts[local + 1]] = values.get(2 * buffer.rank + local, 0.0)
        return buffer.combine(y, recv.plan, bias=torch.tensor([0.5], device=device())).item()


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize(("reduce", "want"), [("token", 0.5), ("rank", 1.5)])
def test_the_order_of_a_sum_is_that_of_picks_or_of_ranks(world, reduce, want):
    # token: (2**24 + 1 -> 2**24) - 2**24 = 0; rank: 1 + (2**24 - 2**24) = 1; then the bias of 0.5.
    assert world.run(combine_literal, Expanded(), reduce) == [want, 0.5]


def combine_not_finite(group, case):
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r])
        return buffer.combine(case.y[r], recv.plan)


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_nan_infinity_and_signed_zeros_stay_where_they_are(world, layout, reduce):
    case = make_case(spec_of(layout, Bf16(), reduce), [9, 9], seed=3)
    for y in case.flat_y():
        y[::5, 3], y[1::4, 5], y[:, 7] = float("nan"), float("inf"), -0.0
    wants = oracle.combined(case.spec, case.topk, case.flat_y())
    for out, want in zip(world.run(combine_not_finite, case), wants, strict=True):
        assert torch.equal(out.isnan(), want.isnan())
        assert same_bits(out.nan_to_num(nan=7.0, posinf=float("inf")), want.nan_to_num(nan=7.0, posinf=float("inf")))
        assert not out[:, 7].signbit().any()  # a sum begins with 0, and 0 + -0.0 is 0.0
