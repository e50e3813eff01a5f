"""What a call needs beside the arena: nothing of the order of its rows, but for the result."""

import gc
import tracemalloc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossdock import Bf16, Buffer, Compact, Expanded, Fp8, Fp32, Padded, Quantized, Spec, ThreadGroup
from tests.cases import STAGED

MAX_TOKENS, HIDDEN = 2048, 2048
X_BYTES = MAX_TOKENS * HIDDEN * 2


def storages(tree):
    """Of all tensors but sparse ones, whose parts are tensors that have been counted."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return [t.untyped_storage() for t in tensors if t.layout is torch.strided]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {storage.data_ptr() for storage in storages((args, kwargs))}
        made = storages(out)
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in known]
        return out


def watched(call):
    """The call's result, the storages it made, largest first, and the most bytes that numpy and Python held in it."""
    tracemalloc.start()
    try:
        with Allocations() as allocations:
            result = call()
        return result, sorted(allocations.sizes, reverse=True), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def watch(group, spec):
    with Buffer(group, spec) as buffer:
        x = torch.ones(MAX_TOKENS, HIDDEN, dtype=torch.bfloat16)
        idx = torch.rand(MAX_TOKENS, spec.num_experts).topk(spec.num_topk, 1).indices
        weights = torch.ones(MAX_TOKENS, spec.num_topk)
        watched(
            lambda: buffer.dispatch(x, idx, weights=weights)
        )  # torch imports what modes need when one first is used
        recv, dispatched, dispatch_peak = watched(lambda: buffer.dispatch(x, idx, weights=weights))
        rows = recv.x.data if isinstance(recv.x, Quantized) else recv.x
        y = recv.output_rows().copy_(rows)
        given = None
        if spec.reduce == "token":
            given = weights
        elif recv.topk_idx is None:
            given = recv.weights
        combines = [watched(lambda y=y: buffer.combine(y, recv.plan, weights=given))[1:] for y in (y, y.clone())]
        return rows.nbytes, (dispatched, dispatch_peak), combines


@pytest.mark.worlds("inproc-1", "processes-2")
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("wire", [Bf16(), Fp8()], ids=["Bf16", "Fp8"])
@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=128), Padded(), STAGED], ids=repr)
def test_nothing_of_the_order_of_the_rows_is_allocated_beside_the_arena(world, layout, wire, reduce):
    spec = Spec(
        num_experts=4, num_topk=2, hidden=HIDDEN, max_tokens=MAX_TOKENS, layout=layout, wire=wire, reduce=reduce
    )
    for row_bytes, (dispatched, dispatch_peak), combines in world.run(watch, spec):
        if spec.is_staged:
            assert dispatched.pop(0) == row_bytes  # of exactly the rows that came
        assert dispatched[0] <= X_BYTES / 4
        assert dispatch_peak <= X_BYTES / 8
        for sizes, peak in combines:
            assert sizes[0] == X_BYTES  # the result
            assert sizes[1] <= X_BYTES / 8
            assert peak <= X_BYTES / 8


def test_a_buffer_that_is_dropped_is_gone_at_once():
    """Not when Python next looks for what holds itself: a GPU's memory may be asked for before."""
    spec = Spec(num_experts=2, num_topk=1, hidden=4, max_tokens=2, wire=Fp32())
    x, topk_idx = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    buffer = Buffer(ThreadGroup.world(1)[0], spec)
    recv = buffer.dispatch(x, topk_idx)
    buffer.combine_start(recv.x, recv.plan).wait()
    started = buffer.dispatch_start(x, topk_idx)
    is_there = weakref.ref(buffer)
    gc.disable()
    try:
        started.wait()
        buffer.close()
        del buffer, started
        assert is_there() is None
    finally:
        gc.enable()
