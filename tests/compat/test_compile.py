"""Layers of clients in which torch.compile meets these calls: it ends its graphs there, and says nothing."""

import warnings

import pytest
import torch

from crossdock.compat import deep_ep
from tests.compat.batches import make_batch
from tests.compat.dense import dense, local_output
from tests.compat.test_clients import HIDDEN, M, grad_of, near, of_dense
from tests.compat.test_normal import dispatched, group_size


def served(group):
    """All calls in one function, more than once, with and without gradients around it."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    elastic = [
        kind(group, num_max_tokens_per_rank=M, hidden=HIDDEN) for kind in (deep_ep.ElasticBuffer, deep_ep.EPBuffer)
    ]
    r = buffer.rank
    idx, weights = batch.topk_idx[r], batch.topk_weights[r]

    def layer(x):
        x = 2 * x
        recv_x, recv_idx, recv_weights, _, handle, _ = dispatched(buffer, batch, x=x)
        outs = [buffer.combine(local_output(recv_x, recv_idx, recv_weights, r), handle)[0]]
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, M, batch.num_experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        outs.append(buffer.low_latency_combine(1 * recv_x, idx, weights, handle)[0])
        for each in elastic:
            recv_x, _, _, handle, _ = each.dispatch(x, idx, weights, num_experts=batch.num_experts, do_expand=True)
            outs.append(each.combine(1 * recv_x, handle)[0])
        return [out + 1 for out in outs]

    want = layer(batch.x[r])
    near(want[0], dense(2 * batch.x[r], idx, weights) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(layer, backend="eager")
        for mode in (torch.enable_grad, torch.no_grad, torch.no_grad):
            with mode():
                for got, expected in zip(compiled(batch.x[r]), want, strict=True):
                    assert torch.equal(got, expected)


@pytest.mark.worlds("processes-2")
def test_a_compiled_function_may_make_these_calls(world):
    world.run(served)


def trained(group):
    """Functions of autograd around the calls, with the handle between them."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    buffer = deep_ep.Buffer(group)
    r = buffer.rank
    idx, num_experts = batch.topk_idx[r], batch.num_experts

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weights):
            per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(idx, num_experts)
            recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
                x, None, per_rank, None, is_in, per_expert, idx, weights
            )
            ctx.handle = handle
            ctx.mark_non_differentiable(recv_idx)
            return recv_x, recv_idx, recv_weights, handle

        @staticmethod
        def backward(ctx, grad_x, _idx, grad_weights, _handle):
            return buffer.combine(grad_x.contiguous(), ctx.handle, topk_weights=grad_weights)[:2]

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, handle):
            ctx.handle = handle
            return buffer.combine(y, handle)[0]

        @staticmethod
        def backward(ctx, grad):
            return buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None

    @torch.compile(backend="aot_eager")
    def layer(x, weights):
        recv_x, recv_idx, recv_weights, handle = Dispatch.apply(1 * x, weights)
        return Combine.apply(local_output(recv_x, recv_idx, recv_weights, r), handle)

    warnings.simplefilter("ignore")  # the compiler makes and reads functions of autograd in ways that torch warns of
    for _ in range(2):
        x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
        out = layer(x, weights)
        out.backward(grad_of(batch, r))
        want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
        near(out, want)
        near(x.grad, grad_x)
        near(weights.grad, grad_weights)


@pytest.mark.worlds("processes-2")
def test_a_compiled_layer_may_be_trained(world):
    world.run(trained)
