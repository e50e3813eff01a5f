"""The layer on CUDA against a mixture of experts that the CPU computes in loops: outputs and every gradient."""

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Padded
from crossdock.nn import Placement, sum_replica_gradients
from tests.world import device, open_buffer
from tests.worlds.test_nn_layer import EXPERTS, REPLICATED, check, check_roughly, layer_of, spec_of, tokens_of

ALIGNED = Expanded(alignment=4)  # as in test_autograd.py, with whose Specs these share their kernels
TOLERANCE = 5e-5
"""float32: values of order 1 go through three products of 16 terms, each summed in another order (16 * 2**-24 = 1e-6 of
the largest term), and another library's exp; a gradient sums 27 of them at most. The CPU's own tests allow 1e-5."""


def run_layer(group, spec, table=None):
    """Two passes over one buffer; the second's results."""
    with open_buffer(group, spec, debug=True) as buffer:
        placement = None if table is None else Placement(table)
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks, placement=placement).to(device())
        layer.buffer = buffer
        for _ in range(2):
            layer.zero_grad()
            x, slope = (tensor.to(device()) for tensor in tokens_of(buffer.rank))
            out = layer(x.requires_grad_())
            (out * slope).sum().backward()
            if placement is not None:
                sum_replica_gradients(layer.experts.parameters(), placement, group)
        buffer.check()
        return {
            "out": out.detach(),
            "x": x.grad,
            "gate": layer.gate.weight.grad,
            "shared": layer.shared.weight.grad,
            **{name: getattr(layer.experts, name).grad for name in EXPERTS},
        }


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("layout", "reduce"),
    [(Compact(), "token"), (Expanded(), "rank"), (ALIGNED, "token"), (Padded(), "rank")],
    ids=str,
)
def test_layer_is_the_loops(world, layout, reduce):
    check(world.run(run_layer, spec_of(layout=layout, reduce=reduce)), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.worlds("cuda-2")
def test_replicas_share_tokens_and_gradients(world):
    got = world.run(run_layer, spec_of(layout=ALIGNED, num_experts=len(REPLICATED)), REPLICATED)
    check(got, physical=REPLICATED, rtol=TOLERANCE, atol=TOLERANCE)


def run_narrow(group, spec):
    """bfloat16 experts under a float32 gate."""
    with open_buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks).to(device())
        layer.experts.to(torch.bfloat16)
        layer.buffer = buffer
        x, slope = (tensor.to(device()) for tensor in tokens_of(buffer.rank))
        out = layer(x.requires_grad_())
        (out * slope).sum().backward()
        buffer.check()
        return {"out": out.detach(), "x": x.grad} | {
            name: getattr(layer.experts, name).grad.float() for name in EXPERTS
        }


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(("layout", "reduce"), [(Compact(), "token"), (Expanded(), "rank")], ids=str)
def test_bf16_experts_under_a_float32_model(world, layout, reduce):
    """The gate's choice is that of float32, so what is left is rounding: a few 2**-8 of the largest value."""
    check_roughly(world.run(run_narrow, spec_of(layout=layout, reduce=reduce, wire=Bf16())), 0.03)


@pytest.mark.worlds("cuda-2")
def test_fp8_wire(world):
    """Three bits of mantissa: 2**-4 of each value."""
    check_roughly(world.run(run_narrow, spec_of(layout=Expanded(), wire=Fp8(block=8))), 0.1)
