"""Compiled programs make the calls of eager ones, in one order on all ranks, whatever shapes each rank has."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from crossdock import Expanded, Fp32, Padded, Spec, autograd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts
from tests.world import open_buffer

H, WIDE, NARROW = 64, 512, 8
TIMEOUT_S = 200
"""A rank may still compile."""


def record(buffer):
    """The verbs of all calls from now on."""
    calls = []
    for name in ("dispatch", "combine", "return_extras"):
        verb = getattr(buffer, name)

        def recorded(*args, _verb=verb, _name=name, **kwargs):
            calls.append(_name)
            return _verb(*args, **kwargs)

        setattr(buffer, name, recorded)
    return calls


def quietly(program):
    """torch warns of what it does itself while it compiles."""

    @functools.wraps(program)
    def run(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._dynamo.reset()
            return program(*args)

    return run


@quietly
def two_branches(group, spec, backend, sizes):
    """Two layers side by side in one graph; how the order of their backward passes saves memory depends on T."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, H, WIDE), (2, WIDE, H), (2, H, NARROW), (2, NARROW, H)]
    with (
        open_buffer(group, spec, timeout_s=TIMEOUT_S) as buffer,
        open_buffer(group, spec, timeout_s=TIMEOUT_S) as other,
    ):
        weights = [(0.1 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
        num_tokens = sizes[buffer.rank]
        x = torch.randn(num_tokens, H, generator=generator).requires_grad_()
        large = torch.randn(num_tokens, 200, H, generator=generator).requires_grad_()
        gates = torch.rand(num_tokens, 2, generator=generator).requires_grad_()
        first = torch.tensor([[0, 1]]).expand(num_tokens, 2).contiguous()
        calls = record(buffer), record(other)

        def branch(to, x, topk_idx, inner, outer):
            recv = autograd.dispatch(to, x, topk_idx)
            y = torch.bmm(torch.relu(torch.bmm(recv.x, inner)), outer)
            return autograd.combine(to, y, recv.plan, weights=gates)

        def model():
            text = branch(buffer, torch.sin(x), first, weights[0], weights[1])
            image = branch(other if sizes[0] == 16 else buffer, large.mean(1), first + 2, weights[2], weights[3])
            return (text * image).sum() + (large.mean(1) * text).sum()

        results = []
        for run in (model, torch.compile(model, backend=backend, dynamic=False)):
            leaves = (x, large, gates, *weights)
            run().backward()
            results.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
    eager, compiled = results
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(eager, compiled, strict=True)), calls


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sizes", [(64, 1), (16, 1)], ids=["one buffer", "two buffers"])
def test_branches_of_a_graph_have_one_order_on_all_ranks(world, backend, sizes):
    spec = Spec(num_experts=4, num_topk=2, hidden=H, max_tokens=64, wire=Fp32(), layout=Padded(capacity=128))
    (right, calls), (other_right, other_calls) = world.run(two_branches, spec, backend, sizes)
    assert right
    assert other_right
    assert calls == other_calls
    assert sum(map(len, calls)) == 2 * (2 * 2 + 2 * 3)


@quietly
def steps_with_few_tokens(group, spec, backend, training):
    """Other numbers of tokens in each step, none at all too; outputs and gradients against the definition."""
    matrices = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    with open_buffer(group, spec, timeout_s=TIMEOUT_S) as buffer:
        mine = matrices[2 * buffer.rank : 2 * buffer.rank + 2]
        calls = record(buffer)

        @torch.compile(backend=backend)
        def step(x, topk_idx, weights):
            recv = autograd.dispatch(buffer, x, topk_idx)
            return x + autograd.combine(buffer, torch.bmm(recv.x, mine), recv.plan, weights=weights)

        for sizes in ([3, 4], [2, 0], [0, 0], [1, 2]):
            num_tokens = sizes[buffer.rank]
            generator = torch.Generator().manual_seed(10 * num_tokens + buffer.rank)
            x = torch.randn(num_tokens, 4, generator=generator).requires_grad_(training)
            topk_idx = torch.rand(num_tokens, 4, generator=generator).argsort(1)[:, :2]
            weights = torch.rand(num_tokens, 2, generator=generator)
            with torch.set_grad_enabled(training):
                out = step(x, topk_idx, weights)
                if training:
                    out.sum().backward()
            mixed = (weights[:, :, None, None] * matrices[topk_idx]).sum(1)  # [T, H, H]
            right = x.detach() + torch.einsum("th,thj->tj", x.detach(), mixed)
            errors.append(torch.allclose(out, right, atol=1e-5))
            if training:
                errors.append(torch.allclose(x.grad, 1 + mixed.sum(2), atol=1e-5))
    return errors, calls


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_rank_without_tokens_makes_the_same_calls(world, backend, training):
    spec = Spec(num_experts=4, num_topk=2, hidden=4, max_tokens=4, wire=Fp32(), layout=Padded(capacity=8))
    outcomes = world.run(steps_with_few_tokens, spec, backend, training)
    for errors, calls in outcomes:
        assert all(errors)
        backward = ["dispatch", "return_extras", "combine"] if training else []
        assert calls == ["dispatch", "combine", *backward] * 4


class Block(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        experts = GroupedExperts(4 // buffer.topology.num_ranks, 16, 32)
        self.moe = ExpertParallel(Gate(16, 4, 2), experts, shared=nn.Linear(16, 16), buffer=buffer)

    def forward(self, x):
        return x + self.moe(self.norm(x))


@quietly
def whole_blocks(group, spec, backend, dtype):
    """Blocks that are compiled by themselves, in full graphs, with other numbers of tokens in each step."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True  # the default of newer versions
    with open_buffer(group, spec, timeout_s=TIMEOUT_S) as buffer:
        torch.manual_seed(0)
        eager = nn.ModuleList(Block(buffer) for _ in range(2 if backend == "aot_eager" else 1)).to(dtype)
        blocks = copy.deepcopy(eager)
        compiled = [torch.compile(block, backend=backend, fullgraph=True) for block in blocks]
        gaps = []
        for sizes in ([5, 3], [2, 7], [8, 8]):
            tokens = torch.randn(sizes[buffer.rank], 16, generator=torch.Generator().manual_seed(buffer.rank)).to(dtype)
            results = []
            for chain in (eager, compiled):
                x = tokens.clone().requires_grad_()
                h = x
                for block in chain:
                    h = block(h)
                h.float().square().sum().backward()
                results.append((h.detach(), x.grad))
            gaps += [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
        for p, q in zip(eager.parameters(), blocks.parameters(), strict=True):
            gaps.append(float((p.grad - q.grad).abs().max() / p.grad.abs().max().clamp_min(1e-9)))
    return max(gaps)


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize(("backend", "dtype"), [("aot_eager", torch.float32), ("inductor", torch.bfloat16)])
def test_blocks_in_full_graphs_give_what_they_give_eagerly(world, backend, dtype):
    wire = Fp32() if dtype == torch.float32 else None
    spec = Spec(
        num_experts=4, num_topk=2, hidden=16, max_tokens=8, layout=Expanded(), **({"wire": wire} if wire else {})
    )
    for gap in world.run(whole_blocks, spec, backend, dtype):
        assert gap < (1e-4 if dtype == torch.float32 else 4e-2)
