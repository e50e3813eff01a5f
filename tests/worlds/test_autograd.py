"""Gradients of a mixture of experts that is spread over ranks are those of the same sums written down in one place."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from crossdock import (
    Bf16,
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
from crossdock import autograd as ag
from tests.cases import STAGED, same_bits
from tests.world import device, meet, open_buffer

E, K, H, M = 8, 3, 16, 7
LAYOUTS = [Compact(), Expanded(), Expanded(alignment=4), Padded(), STAGED]
NAMES = ["compact", "expanded", "aligned", "padded", "staged"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
reduces = pytest.mark.parametrize("reduce", ["token", "rank"])


def make_spec(layout, *, reduce="token", wire=None, **more):
    wire = wire or Fp32()
    return Spec(num_experts=E, num_topk=K, hidden=H, max_tokens=M, layout=layout, reduce=reduce, wire=wire, **more)


def make_inputs(rank, *, num_tokens=None, dtype=torch.float32):
    """Of one rank: x [T, H], picks [T, K], weights [T, K], and what its outputs are multiplied with, [T, H]."""
    g = torch.Generator().manual_seed(rank)
    t = (5 * rank + 4) % (M + 1) if num_tokens is None else num_tokens
    topk_idx = torch.rand(t, E, generator=g).topk(K).indices
    topk_idx[torch.rand(t, K, generator=g) < 0.2] = -1
    x = torch.randn(t, H, generator=g).to(dtype)
    weights = torch.rand(t, K, generator=g) + 0.1
    direction = torch.randn(t, H, generator=g).to(dtype)
    x, topk_idx, weights, direction = (tensor.to(device()) for tensor in (x, topk_idx, weights, direction))
    return x.requires_grad_(), topk_idx, weights.requires_grad_(), direction


def make_experts(dtype=torch.float32):
    """[E, H, H]."""
    g = torch.Generator().manual_seed(99)
    return (torch.randn(E, H, H, generator=g) / 4).to(dtype).to(device())


def expert_rows(x, matrices, counts, *, alignment=1):
    """tanh(x @ matrix) of each local expert's rows: [R, H] expert-major, or [L, C, H]."""
    if x.dim() == 3:
        return torch.tanh(torch.bmm(x, matrices))
    sizes = [-(-n // alignment) * alignment for n in counts.tolist()]
    parts = torch.split(x[: sum(sizes)], sizes)
    rows = torch.cat([torch.tanh(part @ matrix) for part, matrix in zip(parts, matrices, strict=True)])
    return torch.cat([rows, x.new_zeros(x.shape[0] - rows.shape[0], H)])


def run_layer(buffer, tokens, matrices, *, weights_travel, bias=None, rows=None):
    """One mixture of experts by the library, in one of the ways that weights may go; tokens: x, topk_idx, weights."""
    spec, (x, topk_idx, weights) = buffer.spec, tokens
    recv = ag.dispatch(buffer, x, topk_idx, weights=weights if weights_travel else None, rows=rows)
    if recv.topk_idx is not None:
        # A row serves all picks of its rank: the rank's experts are summed here, weighted when weights travel.
        row_weights = (recv.topk_idx >= 0).float() if recv.weights is None else recv.weights
        outputs = torch.tanh(torch.einsum("rh,lho->rlo", recv.x, matrices))
        picked = outputs[torch.arange(outputs.shape[0], device=device())[:, None], recv.topk_idx.clamp_min(0).long()]
        y = (picked * row_weights.unsqueeze(-1)).sum(1)
        return ag.combine(buffer, y, recv.plan, weights=None if weights_travel else weights, bias=bias)
    alignment = spec.layout.alignment if isinstance(spec.layout, Expanded) else 1
    y = expert_rows(recv.x, matrices, recv.num_tokens_per_expert, alignment=alignment)
    if not weights_travel:
        return ag.combine(buffer, y, recv.plan, weights=weights, bias=bias)
    if spec.reduce == "rank":
        return ag.combine(buffer, y, recv.plan, weights=recv.weights, bias=bias)
    return ag.combine(buffer, y * recv.weights.unsqueeze(-1), recv.plan, bias=bias)


def dense(num_ranks, *, num_tokens=None, sums_weights_of_rank=False):
    """The same in one place, in float64: outputs, and gradients of x, weights, bias and matrices, by rank."""
    matrices = make_experts().double().requires_grad_()
    outs, leaves = [], []
    loss = torch.zeros((), dtype=torch.float64)
    for rank in range(num_ranks):
        x, topk_idx, weights, direction = make_inputs(rank, num_tokens=num_tokens)
        x, weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
        bias = torch.full((H,), 0.5, dtype=torch.float64, requires_grad=True)
        rows = []
        for t in range(x.shape[0]):
            total = bias
            picks = [(k, e) for k, e in enumerate(topk_idx[t].tolist()) if e >= 0]
            for k, e in picks:
                here = [j for j, other in picks if other // (E // num_ranks) == e // (E // num_ranks)]
                weight = weights[t, here].sum() if sums_weights_of_rank else weights[t, k]
                total = total + weight * torch.tanh(x[t] @ matrices[e])
            rows.append(total)
        out = torch.stack(rows) if rows else x + bias
        outs.append(out)
        leaves.append((x, weights, bias))
        loss = loss + (out * direction).sum()
    loss.backward()
    return [
        (out.detach(), *(leaf.grad for leaf in mine)) for out, mine in zip(outs, leaves, strict=True)
    ], matrices.grad


def train_once(group, spec, weights_travel, rows):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank)
        bias = torch.full((H,), 0.5, device=device(), requires_grad=True)
        num_local = E // buffer.topology.num_ranks
        matrices = make_experts()[buffer.rank * num_local :][:num_local].clone().requires_grad_()
        out = run_layer(buffer, (x, topk_idx, weights), matrices, bias=bias, weights_travel=weights_travel, rows=rows)
        (out * direction).sum().backward()
        num_tokens = int(buffer.stats.num_tokens_per_expert.sum())
    return (out.detach(), x.grad, weights.grad, bias.grad), matrices.grad, num_tokens


@layouts
@reduces
@pytest.mark.parametrize("way", ["weights-home", "weights-travel", "capacity"])
@pytest.mark.worlds("inproc-1", "inproc-4", "processes-2")
def test_all_gradients_are_those_of_the_dense_sum(world, layout, reduce, way):
    check_gradients(world, layout, reduce, way)


def check_gradients(world, layout, reduce, way):
    weights_travel = way != "weights-home"
    if reduce == "rank" and not weights_travel:
        pytest.skip("with reduce='rank' weights are given per row")
    got = world.run(
        train_once, make_spec(layout, reduce=reduce), weights_travel, "capacity" if way == "capacity" else None
    )
    want, matrices_grad = dense(
        world.num_ranks, sums_weights_of_rank=isinstance(layout, Compact) and not weights_travel
    )
    for (mine, _, _), theirs in zip(got, want, strict=True):
        for tensor, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in got]).double(), matrices_grad, rtol=2e-5, atol=2e-5)
    num_picks = sum(int((make_inputs(rank)[1] >= 0).sum()) for rank in range(world.num_ranks))
    assert sum(num_tokens for _, _, num_tokens in got) == num_picks  # gradients are not counted as tokens


def rows_and_gradients(group, spec):
    """With outputs that are leaves: what their gradients are, and the rows."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, _, direction = make_inputs(buffer.rank, dtype=torch.bfloat16)
        recv = ag.dispatch(buffer, x, topk_idx)
        y = torch.ones_like(recv.x, dtype=spec.combine_dtype, requires_grad=True)
        ag.combine(buffer, y, recv.plan).backward(direction.to(spec.combine_dtype))
        row_grad = torch.randn(recv.x.shape, generator=torch.Generator().manual_seed(5)).to(recv.x)
        again = ag.dispatch(buffer, x, recv.plan)
        again.x.backward(row_grad)
    return recv.x.detach(), again.x.detach(), y.grad, recv.src_idx


@layouts
@pytest.mark.parametrize("wire", [Bf16(), Fp8(block=8), Fp8(block=8, scale="ue8m0")], ids=["bf16", "fp8", "ue8m0"])
@pytest.mark.parametrize("combine_wire", [None, Fp32()], ids=["combine-bf16", "combine-fp32"])
def test_gradients_of_outputs_travel_bit_for_bit_whatever_the_wire(world, layout, wire, combine_wire):
    spec = make_spec(layout, wire=wire, combine_wire=combine_wire)
    tokens = [make_inputs(rank, dtype=torch.bfloat16) for rank in range(world.num_ranks)]
    for rows, again, grad_y, src_idx in world.run(rows_and_gradients, spec):
        assert same_bits(rows, again)
        is_real = src_idx >= 0
        assert not rows[~is_real].any()
        assert not grad_y[~is_real].any()
        for row, grad, source in zip(rows[is_real], grad_y[is_real], src_idx[is_real].tolist(), strict=True):
            x, _, _, direction = tokens[source // M]
            token = x[source % M].detach()
            if isinstance(wire, Fp8):
                token = wire.dequantize(wire.quantize(token.unsqueeze(0)), spec.combine_dtype)[0]
            assert same_bits(row, token)
            assert same_bits(grad, direction[source % M].to(spec.combine_dtype))


def train_without_tokens(group, spec, empty_rank):
    """One rank has no tokens, in a tensor that wants no gradient; its outputs come from rows of others."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        is_empty = buffer.rank == empty_rank
        x, topk_idx, weights, direction = make_inputs(buffer.rank, num_tokens=0 if is_empty else 4)
        num_local = E // buffer.topology.num_ranks
        matrices = make_experts()[buffer.rank * num_local :][:num_local].clone().requires_grad_()
        if is_empty:
            x, weights = x.detach(), weights.detach()
        out = run_layer(buffer, (x, topk_idx, weights), matrices, weights_travel=False)
        (out * direction).sum().backward()
    return x.grad, matrices.grad


@layouts
def test_a_rank_without_tokens_takes_part(world, layout):
    got = world.run(train_without_tokens, make_spec(layout), 0)
    assert got[0][0] is None
    for x_grad, matrices_grad in got[1:]:
        assert x_grad.abs().sum() > 0
        assert torch.isfinite(matrices_grad).all()
    if world.num_ranks > 1:
        assert got[0][1].abs().sum() > 0  # of rows that peers sent


def train_with_outputs_of_nothing(group, spec):
    """An expert that ignores its rows, on one rank: a constant."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank, num_tokens=4)
        recv = ag.dispatch(buffer, x, topk_idx)
        y = torch.ones_like(recv.x).detach() if buffer.rank == 0 else 2 * recv.x
        out = ag.combine(buffer, y, recv.plan, weights=weights)
        (out * direction).sum().backward()
        meet(group)
    return x.grad


def test_outputs_that_do_not_depend_on_rows_hang_nobody(world):
    for rank, grad in enumerate(world.run(train_with_outputs_of_nothing, make_spec(Expanded()))):
        _, topk_idx, weights, direction = make_inputs(rank, num_tokens=4)
        is_far = (topk_idx >= E // world.num_ranks).float()  # rank 0 gives no gradient back
        want = 2 * (weights.detach() * is_far).sum(1, keepdim=True) * direction
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def leave_the_layer_out(group, spec, touches):
    with open_buffer(group, spec, timeout_s=3) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank, num_tokens=4)
        own = torch.ones((), device=device(), requires_grad=True)
        out = run_layer(
            buffer, (x, topk_idx, weights), make_experts()[: E // buffer.topology.num_ranks], weights_travel=False
        )
        loss = 3 * own if buffer.rank == 0 else (out * direction).sum()
        if touches:
            loss = ag.touch(loss, out)
        loss.backward()
        recv = ag.dispatch(buffer, x, topk_idx)  # the next step begins
    return x.grad, own.grad, recv.src_idx


@pytest.mark.worlds("inproc-2", "processes-2")
def test_a_loss_that_leaves_the_layer_out_can_touch_it(world):
    first, second = world.run(leave_the_layer_out, make_spec(Expanded()), True)
    assert first[1] == 3
    assert not first[0].any()
    assert second[0].any()


@pytest.mark.worlds("inproc-2", "processes-2")
def test_a_loss_that_leaves_the_layer_out_is_an_error_that_says_what_to_do(world):
    outcomes = world.outcomes(leave_the_layer_out, make_spec(Expanded()), False)
    assert all(isinstance(outcome, (PeerFailed, PeerTimeout)) for outcome in outcomes)
    assert "crossdock.autograd.touch" in str(outcomes[1])


def fail_in_backward(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, _, direction = make_inputs(buffer.rank, num_tokens=4)
        recv = ag.dispatch(buffer, x, topk_idx)
        out = ag.combine(buffer, 2 * recv.x, recv.plan)
        out.backward(direction if buffer.rank else direction.fill_(float("nan"))[:, :3])


def test_an_error_in_one_ranks_backward_reaches_all(world):
    outcomes = world.outcomes(fail_in_backward, make_spec(Expanded()))
    assert isinstance(outcomes[0], RuntimeError)
    assert all(isinstance(outcome, PeerFailed) for outcome in outcomes[1:])


def count_calls(buffer):
    """The names of the verbs, as they are called."""
    calls = []
    for name in ("dispatch", "combine"):
        verb = getattr(buffer, name)

        def noted(*args, _name=name, _verb=verb, **kwargs):
            calls.append(_name)
            return _verb(*args, **kwargs)

        setattr(buffer, name, noted)
    return calls


def keep_what_travelled(_ctx, op, *_args, **_kwargs):
    kept = (torch.ops.crossdock.dispatch.default, torch.ops.crossdock.combine.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def train_checkpointed(group, spec, kind):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank)
        num_local = E // buffer.topology.num_ranks
        matrices = make_experts()[buffer.rank * num_local :][:num_local].clone().requires_grad_()
        calls = count_calls(buffer)

        def layer(*tensors):
            return run_layer(buffer, tensors[:3], tensors[3], weights_travel=True)

        if kind == "none":
            out = layer(x, topk_idx, weights, matrices)
        elif kind == "full":
            out = checkpoint(layer, x, topk_idx, weights, matrices, use_reentrant=False)
        else:
            out = checkpoint(
                layer,
                x,
                topk_idx,
                weights,
                matrices,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(keep_what_travelled),
            )
        forward = list(calls)
        (out * direction).sum().backward()
    return (out.detach(), x.grad, weights.grad, matrices.grad), forward, calls[len(forward) :]


@layouts
@reduces
@pytest.mark.worlds("inproc-2")
def test_checkpoints_give_the_same_bits_and_a_selective_one_repeats_no_call(world, layout, reduce):
    spec = make_spec(layout, reduce=reduce)
    plain, full, selective = (world.run(train_checkpointed, spec, kind) for kind in ("none", "full", "selective"))
    for (want, forward, backward), (all_again, _, twice), (none_again, _, once) in zip(
        plain, full, selective, strict=True
    ):
        assert forward == ["dispatch", "combine"]
        assert backward == once == ["dispatch", "combine"]
        assert twice == ["dispatch", "combine", "dispatch", "combine"]
        for got in (all_again, none_again):
            assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))


def train_compiled(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        num_local = E // buffer.topology.num_ranks
        matrices = make_experts()[buffer.rank * num_local :][:num_local].clone().requires_grad_()

        def layer(x, topk_idx, weights):
            recv = ag.dispatch(buffer, x, topk_idx, weights=weights)
            y = torch.tanh(recv.x @ matrices[0])
            if spec.reduce == "rank":
                return ag.combine(buffer, y, recv.plan, weights=recv.weights)
            return ag.combine(buffer, y, recv.plan, weights=weights)

        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # the default of newer versions
        results = []
        for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            tensors = []
            for num_tokens in (4, 6):
                x, topk_idx, weights, direction = make_inputs(buffer.rank, num_tokens=num_tokens)
                out = run(x, topk_idx, weights)
                out.backward(direction)
                tensors += [out.detach(), x.grad, weights.grad]
            results.append((*tensors, matrices.grad))
            matrices.grad = None
    return results


@pytest.mark.parametrize("layout", [Expanded(), Padded()], ids=["expanded", "padded"])
@reduces
@pytest.mark.worlds("inproc-1", "processes-2")
def test_a_compiled_layer_gives_the_same_bits(world, layout, reduce):
    for eager, compiled in world.run(train_compiled, make_spec(layout, reduce=reduce)):
        assert all(same_bits(a, b) for a, b in zip(eager, compiled, strict=True))
        assert eager[1].any()


def check_ops(group, spec):
    """torch's own checks of every op: schema, fake kernel, gradient, compiled with dynamic shapes."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, _ = make_inputs(buffer.rank, num_tokens=5)
        mode = "capacity" if isinstance(spec.layout, Padded) else "exact"
        ops, anchor = torch.ops.crossdock, torch.zeros(0, device=device(), requires_grad=True)
        rows, row_weights, link, *plan, order = (
            t.detach() for t in ops.dispatch(x, topk_idx, weights, anchor, buffer.handle, mode, None)
        )
        y = rows.to(spec.combine_dtype).requires_grad_()
        by_row = torch.rand(y.shape[:-1], device=device(), requires_grad=True)
        bias = torch.rand(H, device=device(), requires_grad=True)
        calls = [
            (ops.dispatch, (x, topk_idx, weights, anchor, buffer.handle, mode, order)),
            (ops.dispatch, (x, topk_idx.int(), None, anchor, buffer.handle, "capacity", order)),
            (ops.send, (x, weights, anchor, plan, buffer.handle, mode, False, order)),
            (ops.send, (x.detach().to(spec.combine_dtype), None, None, plan, buffer.handle, mode, True, order)),
            (
                ops.combine,
                (y, weights if spec.reduce == "token" else by_row, bias, link, plan, buffer.handle, mode, order),
            ),
            (ops.bring, (y.detach(), row_weights, plan, buffer.handle, order)),
            (ops.return_weights, (row_weights, plan, buffer.handle, order)),
        ]
        return [set(torch.library.opcheck(op.default, args).values()) for op, args in calls]


@pytest.mark.parametrize(
    ("wire", "reduce", "layout"),
    [
        (Fp32(), "token", LAYOUTS[0]),
        (Fp8(block=8), "rank", LAYOUTS[0]),
        (Fp8(block=8), "token", LAYOUTS[1]),
        (Fp32(), "rank", LAYOUTS[2]),
        (Fp32(), "token", LAYOUTS[3]),
        (Fp8(block=8), "rank", LAYOUTS[3]),
    ],
    ids=repr,
)
@pytest.mark.worlds("inproc-1")
def test_torch_finds_nothing_wrong_with_the_ops(world, layout, reduce, wire):
    for outcomes in world.run(check_ops, make_spec(layout, reduce=reduce, wire=wire)):
        assert outcomes == [{"SUCCESS"}] * 7


@pytest.mark.parametrize(
    "spec", [make_spec(Compact()), make_spec(Expanded(), reduce="rank", wire=Fp8(block=8))], ids=str
)
@pytest.mark.worlds("interpreted-1")
def test_torch_finds_nothing_wrong_with_the_ops_on_cuda(world, spec):
    """Its plans lie in one allocation, and an op's results may not."""
    for outcomes in world.run(check_ops, spec):
        assert outcomes == [{"SUCCESS"}] * 7


@pytest.mark.worlds("processes-2")
def test_torch_finds_nothing_wrong_with_the_ops_among_processes(world):
    for outcomes in world.run(check_ops, make_spec(Expanded(), reduce="rank")):
        assert outcomes == [{"SUCCESS"}] * 7


def combine_and_check(buffer, recv):
    ag.combine(buffer, 2 * recv.x, recv.plan)
    buffer.check()  # on CUDA the next call need not know yet


def overflow(group, spec):
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x = torch.ones(4, H, device=device(), requires_grad=True)
        picks = torch.zeros(4, K, dtype=torch.int64, device=device()) - 1
        picks[:, 0] = 0  # all to one expert
        recv = ag.dispatch(buffer, x, picks, rows="capacity")
        with pytest.raises(CapacityError):
            combine_and_check(buffer, recv)
        return int(recv.num_tokens_per_expert.sum()), int((recv.src_idx >= 0).sum()), bool(recv.x.any())


def test_an_overflow_without_host_sync_gives_no_rows_and_the_next_call_raises(world):
    for outcome in world.run(overflow, make_spec(Expanded(capacity=3))):
        assert outcome == (0, 0, False)


def test_touch_is_the_loss_and_gives_zeros():
    loss, out = torch.tensor(2.0, requires_grad=True), torch.tensor([float("inf"), float("nan")], requires_grad=True)
    touched = ag.touch(loss, out)
    touched.backward()
    assert touched == 2
    assert loss.grad == 1
    assert out.grad.tolist() == [0, 0]


def mix_plans(group, spec):
    with open_buffer(group, spec) as buffer:
        x, topk_idx = torch.ones(2, H), torch.zeros(2, K, dtype=torch.int64) - 1
        plain = buffer.dispatch(x, topk_idx)
        with pytest.raises(ConfigError, match=r"pass recv or recv\.plan of an autograd\.dispatch"):
            ag.combine(buffer, plain.x, plain.plan)
        with pytest.raises(ConfigError, match="routing is the plan of a plain dispatch"):
            ag.dispatch(buffer, x, plain.plan)
        with pytest.raises(ConfigError, match="plan is a SavedPlan"):
            buffer.combine(plain.x, ag.dispatch(buffer, x, topk_idx).plan)
    return True


@pytest.mark.worlds("inproc-1")
def test_plans_of_plain_verbs_are_not_those_of_differentiable_ones(world):
    assert world.run(mix_plans, make_spec(Expanded())) == [True]


def train_on_one_plan(group, spec):
    """Steps whose rows travel along the plan of the first; each gives the same gradient."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, topk_idx, weights, direction = make_inputs(buffer.rank)
        plan, grads = None, []
        for _ in range(3):
            recv = ag.dispatch(buffer, x, topk_idx if plan is None else plan)
            plan = plan or recv.plan
            out = ag.combine(buffer, torch.tanh(recv.x), plan, weights=weights)
            (out * direction).sum().backward()
            grads.append(x.grad)
            x.grad = None
    return grads


@pytest.mark.worlds("inproc-2", "processes-2")
@layouts
def test_one_plan_serves_many_steps(world, layout):
    for first, *others in world.run(train_on_one_plan, make_spec(layout)):
        assert first.abs().sum() > 0
        assert all(same_bits(first, other) for other in others)
