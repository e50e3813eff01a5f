"""Files of clients' own packages, where they are installed: ``pip install crossdock[clients]``.

torchtitan's is not among them: its operators are registered for CUDA alone.
"""

import importlib
import importlib.util
import warnings

import pytest
import torch

from crossdock.compat import install
from tests.compat.batches import NUM_LOCAL, make_batch
from tests.compat.dense import local_output
from tests.compat.test_clients import grad_of, near, of_dense
from tests.compat.test_normal import group_size

HIDDEN = 128
processes = pytest.mark.worlds("processes-2")


def wants(module):
    """Skips where a package is not installed, or lacks what it needs."""
    package = module.partition(".")[0]
    is_there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed: pip install crossdock[clients]")


def imported(module):
    """A client's module, which finds Crossdock's ``deep_ep``; in a process that is made for tests."""
    install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def megatron(group):
    fused = imported("megatron.core.transformer.moe.fused_a2a")
    assert fused.HAVE_DEEP_EP
    fused.set_deepep_num_sms(20)
    batch = make_batch(group_size(group), hidden=HIDDEN)
    r = group.rank()
    for flags in ({}, {"async_finish": True, "allocate_on_comm_stream": True}):
        x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
        rows, local_idx, row_weights, counts, handle = fused.fused_dispatch(
            x, batch.topk_idx[r], weights, batch.num_experts, group, **flags
        )
        assert counts.tolist() == batch.counts(r)
        out = fused.fused_combine(local_output(rows, local_idx, row_weights, r), group, handle, **flags)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(grad_of(batch, r))
        want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
        near(out, want)
        near(x.grad, grad_x)
        near(weights.grad, grad_weights)


@processes
@wants("megatron.core")
def test_megatrons_own_functions(world):
    world.run(megatron)


def deepspeed(group):
    comm = imported("deepspeed.module_inject.auto_ep_comm")
    batch = make_batch(group_size(group), hidden=HIDDEN)
    r = group.rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exchange = comm.DeepEPExchange(comm.new_exchange_scope(), group, batch.num_experts, 3, HIDDEN, 16)
    x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
    rows, row_weights, _ = comm.deepep_dispatch(exchange, x, batch.topk_idx[r], weights)
    handle = exchange.last_handle
    counts = handle.num_recv_tokens_per_expert_list
    assert counts == batch.counts(r)
    numbers = torch.arange(r * NUM_LOCAL, (r + 1) * NUM_LOCAL).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    y = row_weights.unsqueeze(1) * (rows.float() * (numbers % 3 + 1) + (numbers + 1))
    out = comm.deepep_combine(exchange, y.bfloat16(), handle)
    out.backward(grad_of(batch, r))
    want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
    near(out, want)
    near(x.grad, grad_x)
    near(weights.grad, grad_weights)
    exchange.destroy()


@processes
@wants("deepspeed")
def test_deepspeeds_own_exchange(world):
    world.run(deepspeed)
