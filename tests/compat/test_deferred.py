"""V2.5: one event and nothing else, whose first wait gives what the call gives."""

import pytest
import torch

from crossdock import ConfigError, NotSupported
from crossdock.compat import deep_ep
from tests.compat.batches import make_batch
from tests.compat.test_expert_parallel import HIDDEN, M, dispatched, expanded_rows, make, want_sums, weighted
from tests.compat.test_normal import group_size

layouts = pytest.mark.parametrize("expands", [False, True], ids=["compact", "expand"])
LATER = {"async_with_compute_stream": True, "defer_epilogue": True}


def deferred(group, expands):
    batch, buffer = make(group, "V2.5")
    r = buffer.rank_idx
    first = dispatched(buffer, batch, do_expand=expands, expert_alignment=2)
    rows, _ = expanded_rows(batch, r, 2) if expands else (batch.pairs(r), None)
    for asks_host in (True, False):
        event = dispatched(buffer, batch, do_expand=expands, expert_alignment=2, do_cpu_sync=asks_host, **LATER)
        assert isinstance(event, deep_ep.EventOverlap)
        recv_x, recv_idx, recv_weights, handle = event.wait()
        assert event.current_stream_wait() is None
        came = [row for row, place in enumerate(rows) if place is not None]
        assert torch.equal(recv_x[came], first[0][came])
        assert torch.equal(recv_weights[came], first[2][came])
        y = weighted(batch, buffer, recv_x, recv_idx, rows)
        event = buffer.combine(y, handle, **LATER)
        out, out_weights = event.current_stream_wait()
        assert event.wait() is None
        assert out_weights is None
        assert torch.equal(out, want_sums(batch, r))
        out, out_weights = buffer.combine(y, handle, topk_weights=recv_weights, **LATER).wait()
        assert torch.equal(out, want_sums(batch, r))
        assert torch.equal(out_weights, batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0))
        event = buffer.dispatch(2 * batch.x[r], handle=handle, num_sms=handle.num_sms, **LATER)
        again, _, _, same = event.wait()
        assert same is handle
        assert torch.equal(again[came], 2 * recv_x[came])


@layouts
def test_a_wait_gives_what_the_call_gives(world, expands):
    world.run(deferred, expands)


def late_bias(group):
    """What stands in the bias when the sums are waited for is added."""
    batch, buffer = make(group, "V2.5")
    r = buffer.rank_idx
    recv_x, recv_idx, _, handle, _ = dispatched(buffer, batch)
    bias = torch.full_like(batch.x[r], float("nan"))
    event = buffer.combine(weighted(batch, buffer, recv_x, recv_idx, batch.pairs(r)), handle, bias=bias, **LATER)
    bias.copy_(3 * batch.x[r])
    with event as same:
        assert same is event
        out, _ = event.wait()
    assert torch.equal(out, want_sums(batch, r, 3 * batch.x[r].float()))


def test_a_bias_is_read_when_sums_are_waited_for(world):
    world.run(late_bias)


def overlapping(group):
    """Events that nobody has waited for yet, of both verbs, in any order, are in no later call's way."""
    batch, buffer = make(group, "V2.5")
    r = buffer.rank_idx
    events = [dispatched(buffer, batch, x=2**n * batch.x[r], do_expand=bool(n % 2), **LATER) for n in range(1, 6)]
    got = [event.wait() for event in events]
    sums = []
    for n, (recv_x, recv_idx, _, handle) in enumerate(got, start=1):
        rows, _ = expanded_rows(batch, r, 1) if n % 2 else (batch.pairs(r), None)
        sums.append(buffer.combine(weighted(batch, buffer, recv_x, recv_idx, rows), handle, **LATER))
    lost = dispatched(buffer, batch, **LATER)
    for n, event in reversed(list(enumerate(sums, start=1))):
        out, _ = event.wait()
        assert torch.equal(out, (2**n * want_sums(batch, r).float()).bfloat16())
    with lost:
        pass
    assert lost.wait() is None
    with pytest.raises(ConfigError, match="async_with_compute_stream=True"):
        dispatched(buffer, batch, defer_epilogue=True)


def test_events_may_pile_up(world):
    world.run(overlapping)


def refusals(group):
    batch, buffer = make(group, "V2.5")
    with pytest.raises(NotSupported, match="do_handle_copy=False"):
        dispatched(buffer, batch, do_handle_copy=True)
    with pytest.raises(NotSupported, match="Placement"):
        deep_ep.EPBuffer(group, lb_allocation_plan_or_num_bytes=2**21)
    with pytest.raises(ConfigError, match="a multiple of 2,097,152"):
        deep_ep.EPBuffer(group, num_bytes=2**21 + 1)
    with pytest.raises(NotSupported, match="Placement"):
        buffer.lb_prefetch_weights(None, None, None)
    with pytest.raises(NotSupported, match="leave it 0"):
        deep_ep.ElasticBuffer(group, num_cpu_bytes=1)
    buffer.print_memory_usage()
    assert buffer.main_context is buffer.context
    assert buffer.num_lb_bytes == 0


@pytest.mark.worlds("inproc-1")
def test_what_is_not_supported_is_said(world, capsys):
    world.run(refusals)
    assert "bytes" in capsys.readouterr().out


def not_expert_parallel(group):
    buffer = deep_ep.ElasticBuffer(group, num_bytes=1 << 20)
    for name, instead in (
        ("engram_write", "embeddings"), ("engram_fetch", "embeddings"), ("get_engram_storage_size_hint", "embeddings"),
        ("pp_set_config", "pipelining"), ("pp_send", "pipelining"), ("pp_recv", "pipelining"),
        ("all_gather", "all_gather_into_tensor"), ("create_agrs_session", "all_gather_into_tensor"),
        ("get_agrs_buffer_size_hint", "all_gather_into_tensor"),
    ):  # fmt: skip
        with pytest.raises(NotSupported, match=f"{name} is not supported: .*{instead}"):
            getattr(buffer, name)(1, two=2)
    batch = make_batch(group_size(group))
    with pytest.raises(ConfigError, match="num_max_tokens_per_rank"):
        buffer.dispatch(batch.x[0], batch.topk_idx[0], num_experts=batch.num_experts)
    batch = make_batch(group_size(group), hidden=HIDDEN)
    recv_x, *_ = buffer.dispatch(
        batch.x[0], batch.topk_idx[0], num_experts=batch.num_experts, num_max_tokens_per_rank=M
    )
    assert len(recv_x) == len(batch.pairs(0))
    assert buffer.num_bytes == 1 << 20


@pytest.mark.worlds("inproc-1")
def test_what_is_no_expert_parallelism_is_refused_by_name(world):
    world.run(not_expert_parallel)


@pytest.mark.parametrize("name", ["EngramBuffer", "PPBuffer", "BucketBuffer", "BucketSession", "BufferAllocator"])
def test_classes_of_other_things_say_what_to_use(name):
    with pytest.raises(NotSupported, match=f"{name} is not supported: .*use|{name} is not supported: .*replicate"):
        getattr(deep_ep, name)(1, 2)


def test_a_hook_that_fails_is_called_again():
    event, tries = deep_ep.EventOverlap(deep_ep.EventHandle()), []

    def hook():
        tries.append(event.event)
        if len(tries) == 1:
            raise RuntimeError("not yet")
        return "done"

    event.register_hook_after_wait(hook)
    with pytest.raises(RuntimeError, match="not yet"):
        event.wait()
    assert event.wait() == "done"
    assert event.event is not tries[1]  # another moment: who waits later waits for what the hook did
    assert event.wait(release_handle=True) is None
    assert event.event is None
    assert len(tries) == 2
