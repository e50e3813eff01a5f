"""The layer against a mixture of experts written as loops over tokens: outputs and every gradient."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from crossdock import Bf16, Buffer, Compact, Expanded, Fp8, Fp32, Padded, Spec
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, Placement, sum_replica_gradients
from tests.cases import STAGED
from tests.world import open_buffer

E, K, H, F = 8, 3, 16, 12
NUM_TOKENS = [5, 0, 9, 4]
UNPICKED = 6
LAYOUTS = [Compact(), Expanded(), Expanded(alignment=8), Padded(), STAGED]
EXPERTS = ("w1", "w2", "w3")
WORLDS = pytest.mark.worlds("inproc-2", "inproc-4", "processes-2")
REPLICATED = [0, 3, 1, 2, 3, 4, 5, 6, 7, 3, 0, 5]


class HolesGate(Gate):
    """Leaves out the last pick of every other token."""

    def forward(self, x):
        topk_idx, topk_weights = super().forward(x)
        is_hole = torch.zeros_like(topk_idx, dtype=torch.bool)
        is_hole[::2, -1] = True
        return topk_idx.masked_fill(is_hole, -1), topk_weights


def weights_of(seed=0):
    """Of all logical experts, the gate, and the shared expert. Expert UNPICKED never wins where x[:, 0] is 1."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"w1": (E, F, H), "w2": (E, H, F), "w3": (E, F, H), "gate": (E, H), "shared": (H, H)}
    weights = {name: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights["gate"][UNPICKED, 0] = -100
    return weights


def tokens_of(rank, seed=1):
    """A rank's rows, and what its loss multiplies the outputs with."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    x, slope = torch.randn(2, NUM_TOKENS[rank], H, generator=g)
    x[:, 0] = 1
    return x, slope


def looped(weights, x, *, holes=True):
    """The layer's definition, a token at a time."""
    outs = []
    for t, row in enumerate(x):
        scores = (weights["gate"] @ row).softmax(0)
        picks = sorted(range(E), key=lambda e: (-float(scores[e].detach()), e))[:K]
        total = sum(scores[e] for e in picks)
        out = weights["shared"] @ row
        for k, e in enumerate(picks):
            if not (holes and t % 2 == 0 and k == K - 1):
                hidden = silu(weights["w1"][e] @ row) * (weights["w3"][e] @ row)
                out = out + scores[e] / total * (weights["w2"][e] @ hidden)
        outs.append(out)
    return torch.stack(outs) if outs else x.clone()


def reference(num_ranks, *, holes=True):
    """By rank: out, and the gradients of x, gate and shared expert; and, once, those of all ranks' experts."""
    experts = {name: weights_of()[name].requires_grad_() for name in EXPERTS}
    ranks = []
    for rank in range(num_ranks):
        own = {name: weights_of()[name].requires_grad_() for name in ("gate", "shared")}
        x, slope = tokens_of(rank)
        out = looped(experts | own, x.requires_grad_(), holes=holes)
        if len(x):
            (out * slope).sum().backward()
        leaves = {"x": x, **own}
        grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
        ranks.append({"out": out.detach(), **grads})
    return ranks, {name: weight.grad for name, weight in experts.items()}


def layer_of(*, rank=0, num_ranks=1, placement=None, gate=HolesGate, shared=True):
    """A layer with ``weights_of``, and this rank's share of the physical experts."""
    weights = weights_of()
    physical = torch.arange(E) if placement is None else placement.physical_to_logical
    here = physical.view(num_ranks, -1)[rank]
    experts = GroupedExperts(len(here), H, F)
    for name in EXPERTS:
        getattr(experts, name).data = weights[name][here]
    layer = ExpertParallel(
        gate(H, E, K), experts, placement=placement, shared=nn.Linear(H, H, bias=False) if shared else None
    )
    layer.gate.weight.data = weights["gate"]
    if shared:
        layer.shared.weight.data = weights["shared"]
    return layer


def spec_of(**kwargs):
    kwargs = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens": 9, "wire": Fp32()} | kwargs
    return Spec(**kwargs)


def run_layer(group, spec, table=None, *, compiles=False):
    """Two passes over one buffer; the second's results."""
    with open_buffer(group, spec, debug=True) as buffer:
        placement = None if table is None else Placement(table)
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks, placement=placement)
        layer.buffer = buffer
        run = torch.compile(layer, backend="aot_eager") if compiles else layer
        for _ in range(2):
            layer.zero_grad()
            x, slope = tokens_of(buffer.rank)
            out = run(x.requires_grad_())
            (out * slope).sum().backward()
            if placement is not None:
                sum_replica_gradients(layer.experts.parameters(), placement, group)
        return {
            "out": out.detach(),
            "x": x.grad,
            "gate": layer.gate.weight.grad,
            "shared": layer.shared.weight.grad,
            **{name: getattr(layer.experts, name).grad for name in EXPERTS},
        }


def check(got, *, physical=None, rtol=1e-5, atol=1e-5):
    ranks, experts = reference(len(got))
    for mine, want in zip(got, ranks, strict=True):
        for name, tensor in want.items():
            torch.testing.assert_close(mine[name], tensor, rtol=rtol, atol=atol, msg=lambda m, name=name: name + m)
    for name, grad in experts.items():
        stacked = torch.cat([mine[name] for mine in got])
        want = grad if physical is None else grad[physical]
        torch.testing.assert_close(stacked, want, rtol=rtol, atol=atol, msg=lambda m, name=name: name + m)


@WORLDS
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layer_is_the_loops(world, layout, reduce):
    got = world.run(run_layer, spec_of(layout=layout, reduce=reduce))
    check(got)
    unpicked = torch.cat([mine["w1"] for mine in got])[UNPICKED]
    assert (unpicked == 0).all()


@pytest.mark.worlds("grid-2x2", "grid-4x1", "dist-2x2")
@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=str)
def test_layer_over_nodes_is_the_loops(world, layout):
    check(world.run(run_layer, spec_of(layout=layout, reduce="node")))


@pytest.mark.worlds("dist-2x2")
@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=str)
def test_compiled_layer_over_nodes_is_the_loops(world, layout):
    check(world.run(run_compiled, spec_of(layout=layout, reduce="node")))


def run_compiled(group, spec):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # torch's own look, where a graph breaks
        return run_layer(group, spec, compiles=True)


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compiled_layer_is_the_loops(world, layout):
    check(world.run(run_compiled, spec_of(layout=layout)))


@WORLDS
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replicas_share_tokens_and_gradients(world, layout, reduce):
    got = world.run(run_layer, spec_of(layout=layout, reduce=reduce, num_experts=len(REPLICATED)), REPLICATED)
    check(got, physical=REPLICATED)
    for name in EXPERTS:
        stacked = torch.cat([mine[name] for mine in got])
        copies = [i for i, logical in enumerate(REPLICATED) if logical == 3]
        for copy_of in copies[1:]:
            assert torch.equal(stacked[copy_of], stacked[copies[0]])


def run_dense(placement=None):
    layer = layer_of(placement=placement)
    x, slope = tokens_of(2)
    out = layer(x.requires_grad_())
    (out * slope).sum().backward()
    grads = {name: getattr(layer.experts, name).grad for name in EXPERTS}
    return {
        "out": out.detach(),
        "x": x.grad,
        "gate": layer.gate.weight.grad,
        "shared": layer.shared.weight.grad,
    }, grads


@pytest.mark.parametrize("table", [None, REPLICATED])
def test_without_a_buffer_it_is_the_loops(table):
    mine, grads = run_dense(None if table is None else Placement(table))
    x, slope = tokens_of(2)
    weights = {name: weight.requires_grad_() for name, weight in weights_of().items()}
    out = looped(weights, x.requires_grad_())
    (out * slope).sum().backward()
    want = {"out": out.detach(), "x": x.grad, "gate": weights["gate"].grad, "shared": weights["shared"].grad}
    for name, tensor in want.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5)
    for name in EXPERTS:
        grad = grads[name]
        if table is not None:
            grad = torch.zeros_like(weights[name]).index_add(0, torch.tensor(table), grad)
        torch.testing.assert_close(grad, weights[name].grad, rtol=1e-5, atol=1e-5)


def run_narrow(group, spec, dtype):
    with Buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        layer.experts.to(torch.bfloat16)
        layer.buffer = buffer
        x, slope = tokens_of(buffer.rank)
        x = x.to(dtype).requires_grad_()
        out = layer(x.view(1, *x.shape)) if spec.layout == Compact() else layer(x)
        (out.reshape(x.shape).float() * slope).sum().backward()
        assert out.dtype == dtype
        return {"out": out.detach().reshape(x.shape).float(), "x": x.grad.float()} | {
            name: getattr(layer.experts, name).grad.float() for name in EXPERTS
        }


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reduce", ["token", "rank"])
def test_bf16_experts_under_a_float32_model(world, layout, reduce):
    """The gate's choice is that of float32, so what is left is rounding: a few 2**-8 of the largest value."""
    check_roughly(world.run(run_narrow, spec_of(layout=layout, reduce=reduce, wire=Bf16()), torch.float32), 0.03)


@pytest.mark.worlds("inproc-2")
def test_fp8_wire(world):
    """Three bits of mantissa: 2**-4 of each value."""
    spec = spec_of(layout=Expanded(), wire=Fp8(block=8))
    check_roughly(world.run(run_narrow, spec, torch.float32), 0.1)


def check_roughly(got, tolerance):
    ranks, experts = reference(len(got))
    pairs = [(mine[name], want[name]) for mine, want in zip(got, ranks, strict=True) for name in ("out", "x")]
    pairs += [(torch.cat([mine[name] for mine in got]), grad) for name, grad in experts.items()]
    for mine, want in pairs:
        if want.numel():
            assert (mine - want).norm() < tolerance * want.norm()


class LoopedExperts(nn.Module):
    """Somebody else's: it takes [R, H] and counts without gaps, and knows nothing of layouts."""

    def __init__(self, w1, w2, w3):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Parameter(w1), nn.Parameter(w2), nn.Parameter(w3)

    def forward(self, x, num_tokens_per_expert):
        counts = num_tokens_per_expert.tolist()
        assert sum(counts) == len(x)
        return torch.cat(
            [
                (silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T
                for rows, w1, w2, w3 in zip(x.split(counts), self.w1, self.w2, self.w3, strict=True)
            ]
        )


def run_others(group, spec):
    with Buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        layer.experts = LoopedExperts(*(getattr(layer.experts, name).data for name in EXPERTS))
        layer.buffer = buffer
        with torch.no_grad():
            return layer(tokens_of(buffer.rank)[0])


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_of_others(world, layout):
    got = world.run(run_others, spec_of(layout=layout))
    for mine, want in zip(got, reference(2)[0], strict=True):
        torch.testing.assert_close(mine, want["out"], rtol=1e-5, atol=1e-5)


def run_two(group, spec, recomputes):
    """Two layers over one buffer."""
    with Buffer(group, spec) as buffer:
        layers = [layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks) for _ in range(2)]
        for layer in layers:
            layer.buffer = buffer
        return [t.detach() for t in stacked(layers, *tokens_of(buffer.rank), recomputes=recomputes)]


def stacked(layers, x, slope, *, recomputes=False):
    y = x.requires_grad_()
    for layer in layers:
        y = y + (checkpoint(layer, y, use_reentrant=False) if recomputes else layer(y)).tanh()
    (y * slope).sum().backward()
    return [y, x.grad] + [getattr(layer.experts, name).grad for layer in layers for name in EXPERTS]


@pytest.mark.worlds("inproc-4", "processes-2")
@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_share_a_buffer(world, recomputes):
    got = world.run(run_two, spec_of(layout=Expanded(), reduce="rank"), recomputes)
    layers = [layer_of() for _ in range(2)]
    for rank, (y, grad, *_) in enumerate(got):
        want_y, want_grad, *sums = stacked(layers, *tokens_of(rank))  # of all ranks so far
        torch.testing.assert_close(y, want_y.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5)
    for i, want in enumerate(sums):
        torch.testing.assert_close(torch.cat([mine[2 + i] for mine in got]), want, rtol=1e-4, atol=1e-5)
