"""The façade on GPUs: programs of the CPU tests with their tensors there; then streams and graphs."""

import unittest.mock

import pytest
import torch

from crossdock import ConfigError
from crossdock.compat import deep_ep
from tests.compat import test_all as everything
from tests.compat import test_clients as clients
from tests.compat import test_deferred as deferred
from tests.compat import test_expert_parallel as expert_parallel
from tests.compat import test_low_latency as low_latency
from tests.compat import test_normal as normal
from tests.compat.batches import NUM_LOCAL, make_batch
from tests.world import device

two_ranks = pytest.mark.worlds("cuda-2")
four_ranks = pytest.mark.worlds("cuda-4")
M = 16
HIDDEN = 512

PROGRAMS = {
    "layout": (normal.layouts,),
    "normal": (normal.rows, 4),
    "handles": (normal.handles,),
    "scales": (normal.narrow, 2),
    "worst case": (normal.worst,),
    "biases": (normal.biased,),
    "no picks": (normal.without_picks,),
    "any number": (normal.any_number,),
    "asynchronous": (normal.asynchronous,),
    **{f"low latency, {mode}": (low_latency.blocks, mode) for mode in low_latency.MODES},
    "fp8": (low_latency.casts, "f32", {}, False),
    "ue8m0": (low_latency.casts, "ue8m0", {"round_scale": True, "use_ue8m0": True}, True),
    "micro-batches": (low_latency.overlapped,),
    "hooks nobody calls": (low_latency.unfinished,),
    "scratch": (low_latency.scratch,),
    **{
        f"{kind}, expands={expands}, host={host}": (expert_parallel.fresh, kind, expands, host, 4)
        for kind in expert_parallel.KINDS
        for expands in (False, True)
        for host in (False, True)
    },
    "cached": (expert_parallel.cached, "V2", True, False),
    "narrow": (expert_parallel.narrow, "V2", True, True, 3),
    "rewritten": (expert_parallel.rewritten, "V2", True),
    "once": (expert_parallel.once_at_the_owner, "V2"),
    "per call": (expert_parallel.per_call, "V2"),
    "elastic asynchronous": (expert_parallel.asynchronous, "V2.5", True),
    "barriers": (expert_parallel.barriers, "V2.5"),
    "deferred": (deferred.deferred, True),
    "late bias": (deferred.late_bias,),
    "piled up": (deferred.overlapping,),
    "extremes": (everything.extremes,),
    "gradients wanted": (everything.gradients_wanted,),
    "events": (everything.events,),
    "switching": (everything.switching,),
    "megatron": (clients.megatron, True),
    "xtuner": (clients.xtuner,),
    "torchtitan": (clients.torchtitan,),
    "deepspeed": (clients.expanded_training, deep_ep.ElasticBuffer, False),
    "prime-rl": (clients.expanded_training, deep_ep.EPBuffer, True),
    "vllm": (clients.vllm,),
    "sglang": (clients.sglang,),
    "lightllm": (clients.lightllm,),
}


def here(group, program, *args):
    """A program of the CPU tests whose tensors are made on this world's device."""
    before = torch.get_default_device()
    torch.set_default_device(device())
    made = make_batch

    def batch_here(*args, **options):
        torch.set_default_device("cpu")  # its generator is of the host
        try:
            batch = made(*args, **options)
        finally:
            torch.set_default_device(device())
        for tensors in (batch.x, batch.topk_idx, batch.topk_weights):
            tensors[:] = [tensor.to(device()) for tensor in tensors]
        return batch

    modules = (normal, low_latency, expert_parallel, deferred, everything, clients)
    patches = [unittest.mock.patch.object(module, "make_batch", batch_here) for module in modules]
    patches.append(unittest.mock.patch.object(clients, "grad_of", lambda batch, r: torch.ones_like(batch.x[r])))
    try:
        for patch in patches:
            patch.start()
        return program(group, *args)
    finally:
        for patch in patches:
            patch.stop()
        torch.set_default_device(before)


@two_ranks
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_as_on_cpus(world, name):
    world.run(here, *PROGRAMS[name])


@four_ranks
@pytest.mark.parametrize("name", ["normal", "low latency, hook", "V2, expands=True, host=True", "megatron", "vllm"])
def test_four_ranks_do_as_two(world, name):
    world.run(here, *PROGRAMS[name])


def inputs(group, hidden=HIDDEN):
    batch = make_batch(group.size(), hidden=hidden)
    r = group.rank()
    return batch, *(each[r].to(device()) for each in (batch.x, batch.topk_idx, batch.topk_weights))


def captured(step):
    """A graph of one step, warmed up on another stream as torch wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    return graph, given


def graphs(group):
    """5: low latency, V1 with a bound on rows, V2 without the host; replayed with other rows and other picks."""
    batch, x, idx, weights = inputs(group)
    buffer = deep_ep.Buffer(group, 0, 1 << 20, low_latency_mode=True)
    elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=3)

    def low():
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, M, batch.num_experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        out, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        return out, count

    def bounded():
        per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(idx, batch.num_experts)
        recv_x, *_, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert, topk_idx=idx,
            topk_weights=weights, num_worst_tokens=M * batch.num_ranks,
        )  # fmt: skip
        return (buffer.combine(recv_x, handle)[0],)

    def without_host():
        recv_x, _, _, handle, _ = elastic.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, do_expand=True, do_cpu_sync=False
        )
        return elastic.combine(recv_x, handle)[0], handle.psum_num_recv_tokens_per_scaleup_rank

    for step in (low, bounded, without_host):
        graph, given = captured(step)
        for factor in (1, 3):
            x.mul_(factor)
            idx.copy_(idx.flip(0))
            graph.replay()
            got = [tensor.clone() for tensor in given]
            for replayed, eager in zip(got, step(), strict=True):
                assert torch.equal(replayed, eager)
    return True


@two_ranks
def test_calls_without_the_host_are_captured(world):
    assert world.run(graphs) == [True, True]


def streams(group):
    """4: work on the communication stream is waited for where the event is, and rows may be dropped before that."""
    batch, x, idx, weights = inputs(group)
    buffer = deep_ep.Buffer(group)
    assert isinstance(buffer.get_comm_stream(), torch.cuda.Stream)
    assert buffer.get_comm_stream() != torch.cuda.current_stream()
    want = x.float() * batch.num_homes(group.rank()).to(device()).unsqueeze(1)
    for _ in range(20):
        slow = torch.ones(2048, 2048, device=device())
        for _ in range(5):
            slow = slow @ slow * 1e-4
        mine = x + 0 * slow[0, 0].bfloat16()
        previous = deep_ep.Buffer.capture()
        flags = {"previous_event": previous, "async_finish": True, "allocate_on_comm_stream": True}
        per_rank, _, per_expert, is_in, event = buffer.get_dispatch_layout(idx, batch.num_experts, **flags)
        recv_x, *_, handle, event = buffer.dispatch(
            mine, num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert, topk_idx=idx,
            topk_weights=weights, **flags | {"previous_event": event},
        )  # fmt: skip
        del mine
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            event.current_stream_wait()
            y = recv_x * 1
        torch.cuda.current_stream().wait_stream(side)
        out, _, event = buffer.combine(y, handle, **flags | {"previous_event": deep_ep.Buffer.capture()})
        del recv_x, y
        event.current_stream_wait()
        assert torch.equal(out.float(), want.bfloat16().float())
    return True


@two_ranks
def test_events_order_streams(world):
    assert world.run(streams) == [True, True]


def in_capture(group):
    """A call that asks the host says so in a capture, as the native one does."""
    batch, x, idx, weights = inputs(group)
    elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=3)
    recv_x, *_ = elastic.dispatch(x, idx, weights, num_experts=batch.num_experts)
    assert len(recv_x) == len(batch.pairs(group.rank()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device=x.device).add_(1)  # torch warns of a graph without work
        with pytest.raises(ConfigError, match="capacity"):
            elastic.dispatch(x, idx, weights, num_experts=batch.num_experts)
    return NUM_LOCAL


@two_ranks
def test_a_capture_refuses_what_asks_the_host(world):
    assert world.run(in_capture) == [NUM_LOCAL] * 2
