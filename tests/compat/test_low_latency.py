"""V1's low-latency calls by their definition: blocks, counts, handles, hooks, casts, sums."""

import pickle
from functools import partial

import pytest
import torch

from crossdock import ConfigError, Fp8, NotSupported, PeerFailed
from crossdock.compat import deep_ep
from crossdock.compat.deep_ep.engine import Started
from tests.compat.batches import NUM_LOCAL, make_batch
from tests.compat.test_normal import dispatched, group_size

M = 8
HIDDEN = 512
MODES = {"at once": {}, "hook": {"return_recv_hook": True}, "event": {"async_finish": True}}
modes = pytest.mark.parametrize("mode", MODES)


def make(group, **options):
    batch = make_batch(
        group_size(group), hidden=HIDDEN, tokens=[(5 + 3 * r) % (M + 1) for r in range(10)][: group_size(group)]
    )
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(M, HIDDEN, batch.num_ranks, batch.num_experts)
    return batch, deep_ep.Buffer(group, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=NUM_LOCAL, **options)


def finish(event, hook):
    if hook is not None:
        hook()
    elif event.event is not None:
        event.current_stream_wait()


def blocks(group, mode):
    batch, buffer = make(group)
    r, num_ranks = buffer.rank, batch.num_ranks
    stats, waits = torch.zeros(NUM_LOCAL, dtype=torch.int32), torch.zeros(num_ranks, dtype=torch.int64)
    for step in range(3):
        recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
            batch.x[r], batch.topk_idx[r], M, batch.num_experts, use_fp8=False, **MODES[mode],
            cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waits,
        )  # fmt: skip
        assert (hook is None) == (mode != "hook")
        assert (event.event is None) == (mode != "event")
        finish(event, hook)
        assert recv_x.shape == (NUM_LOCAL, num_ranks * M, HIDDEN)
        assert recv_x.is_contiguous()
        assert count.dtype == torch.int32
        assert count.tolist() == batch.counts(r)
        src_info, layout_range, *numbers = handle
        assert numbers == [M, HIDDEN, batch.num_experts]
        assert src_info.shape == (NUM_LOCAL, num_ranks * M)
        y = torch.full_like(recv_x, float("nan"))
        for e in range(NUM_LOCAL):
            rows = batch.rows(r, e)
            for row, (s, t, _) in enumerate(rows):
                assert torch.equal(recv_x[e, row], batch.x[s][t])
                assert src_info[e, row] == t
                y[e, row] = (r * NUM_LOCAL + e + 1) * recv_x[e, row]
            for s in range(num_ranks):
                begin, num = divmod(int(layout_range[e, s]), 2**32)
                assert [s == source for source, _, _ in rows[begin : begin + num]] == [True] * num
                assert num == sum(s == source for source, _, _ in rows)
        out = None if step == 0 else torch.full_like(batch.x[r], 7.0)
        x = y
        if step == 2:
            y[:] = y.nan_to_num(0.0)
            buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
            x = torch.full_like(y, 99.0)
        combined, event, hook = buffer.low_latency_combine(
            x, batch.topk_idx[r], batch.topk_weights[r], handle, zero_copy=step == 2, out=out, **MODES[mode],
            combine_wait_recv_cost_stats=waits,
        )  # fmt: skip
        finish(event, hook)
        assert out is None or combined is out
        picks = batch.topk_idx[r]
        factors = (batch.topk_weights[r] * (picks + 1)).where(picks >= 0, 0.0).sum(1, keepdim=True)
        assert torch.equal(combined, (batch.x[r].float() * factors).bfloat16())
    assert stats.tolist() == [3 * count for count in batch.counts(r)]
    assert (waits >= 0).all()


@modes
def test_blocks_go_out_and_home(world, mode):
    world.run(blocks, mode)


def casts(group, mode, scale, hook):
    batch, buffer = make(group)
    r = buffer.rank
    (data, scales), count, _, event, call = buffer.low_latency_dispatch(
        batch.x[r], batch.topk_idx[r], M, batch.num_experts, return_recv_hook=hook, **scale
    )
    finish(event, call)
    wire = Fp8(pow2=mode == "pow2", scale="ue8m0" if mode == "ue8m0" else "f32", packed=mode == "ue8m0")
    rows = batch.num_ranks * M
    assert data.dtype == torch.float8_e4m3fn
    assert scales.shape == (NUM_LOCAL, rows, HIDDEN // (512 if mode == "ue8m0" else 128))
    assert scales.dtype == (torch.int32 if mode == "ue8m0" else torch.float32)
    assert scales.stride(1) == 1
    for e in range(NUM_LOCAL):
        for row, (s, t, _) in enumerate(batch.rows(r, e)):
            want = wire.quantize(batch.x[s][t : t + 1])
            assert torch.equal(data[e, row].float(), want.data[0].float())
            assert torch.equal(scales[e, row], want.scale[0])
    assert count.tolist() == batch.counts(r)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(
    ("mode", "scale"),
    [("f32", {}), ("pow2", {"round_scale": True}), ("ue8m0", {"round_scale": True, "use_ue8m0": True})],
)
def test_rows_are_cast_on_the_way(world, mode, scale, hook):
    world.run(casts, mode, scale, hook)


def overlapped(group):
    """Two micro-batches: the second one is sent before the first one has been received."""
    batch, buffer = make(group)
    r = buffer.rank
    idx, weights = batch.topk_idx[r], batch.topk_weights[r]
    factors = weights.where(idx >= 0, 0.0).sum(1, keepdim=True)
    for _ in range(3):
        sent = []
        for factor in (1, 2):
            recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
                factor * batch.x[r], idx, M, batch.num_experts, use_fp8=False, return_recv_hook=True
            )
            sent.append((recv_x, handle, hook))
        got = []
        for recv_x, handle, hook in sent:
            hook()
            got.append(buffer.low_latency_combine(recv_x, idx, weights, handle, return_recv_hook=True))
        for factor, (out, _, hook) in zip((1, 2), got, strict=True):
            hook()
            assert torch.equal(out, (factor * batch.x[r].float() * factors).bfloat16())


def test_two_micro_batches_overlap(world):
    world.run(overlapped)


def unfinished(group):
    """Hooks that nobody has called are in no later call's way, and M may change."""
    batch, buffer = make(group)
    r = buffer.rank
    idx, weights = batch.topk_idx[r], batch.topk_weights[r]
    held = []
    for step in range(5):
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            batch.x[r], idx, M if step % 2 else 2 * M, batch.num_experts, use_fp8=False, return_recv_hook=True
        )
        held.append((recv_x, count, handle, hook))
    buffer.clean_low_latency_buffer(M, HIDDEN, batch.num_experts)
    recv_x, *_, handle, _ = dispatched(buffer, batch)  # a normal call on the same buffer
    out, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(out.float(), batch.x[r].float() * batch.num_homes(r).unsqueeze(1))
    factors = weights.where(idx >= 0, 0.0).sum(1, keepdim=True)
    for recv_x, count, handle, hook in held[-2:]:
        hook()
        assert count.tolist() == batch.counts(r)
        out, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())
    buffer.low_latency_dispatch(batch.x[r], idx, M, batch.num_experts, use_fp8=False, return_recv_hook=True)
    for _ in range(3):  # until the slot of the call before comes round
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(batch.x[r], idx, M, batch.num_experts, use_fp8=False)
        out, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())


def test_hooks_that_nobody_calls_are_in_no_ones_way(world):
    world.run(unfinished)


def failed(group):
    """A hook of a dispatch that a peer gave up fails whenever it is called, and so does a combine on its handle."""
    batch, buffer = make(group)
    r = buffer.rank
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, M, batch.num_experts, use_fp8=False)
    want, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    if r == 0:
        with pytest.raises(ConfigError, match="pass float32"):
            buffer.low_latency_combine(rows, idx, None, handle)
    else:
        recv_x, _, lost, _, hook = buffer.low_latency_dispatch(
            x, idx, M, batch.num_experts, use_fp8=False, return_recv_hook=True
        )
        for call in (hook, hook, lambda: buffer.low_latency_combine(recv_x, idx, weights, lost)):
            with pytest.raises(PeerFailed, match="rank 0 failed this call: topk_weights is a NoneType"):
                call()
    out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    assert torch.equal(out, want)


@pytest.mark.worlds("inproc-2", "processes-2")
def test_a_hook_that_failed_fails_again(world):
    world.run(failed)


def test_who_asks_late_waits_for_what_was_finished_early(monkeypatch):
    """On another stream than the one on which it was finished, that is."""
    waits, finished, unfinished = [], [], []
    monkeypatch.setattr(deep_ep.EventHandle, "current_stream_wait", lambda _: waits.append("waited"))
    first, second = (Started(None, partial(finished.append, name), unfinished) for name in "ab")
    second()
    assert finished == ["a", "b"]
    assert waits == []
    second()
    assert waits == []
    first()
    assert waits == ["waited"]
    assert finished == ["a", "b"]


def saved(group):
    """A handle's tensors as other objects over the same memory, and as copies, also in a buffer that was made later."""
    batch, buffer = make(group, explicitly_destroy=True)
    r = buffer.rank
    idx, weights = batch.topk_idx[r], batch.topk_weights[r]
    for hook in (False, True):
        recv_x, count, handle, _, call = buffer.low_latency_dispatch(
            batch.x[r], idx, M, batch.num_experts, use_fp8=False, return_recv_hook=hook
        )
        finish(deep_ep.EventOverlap(), call)
        first, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        other = tuple(part.view_as(part) if isinstance(part, torch.Tensor) else part for part in handle)
        second, _, _ = buffer.low_latency_combine(recv_x, idx, weights, other)
        assert torch.equal(first, second)
        for e, num in enumerate(count.tolist()):
            recv_x[e, num:] = float("nan")
        copied = tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in handle)
        with pytest.raises(ConfigError, match="outputs of your own"):
            buffer.get_next_low_latency_combine_buffer(copied)
        sent = pickle.loads(pickle.dumps(handle))  # noqa: S301 - our own
        _, later = make(group)
        for where, form in ((buffer, copied), (buffer, copied), (later, handle), (later, sent)):
            out, _, call = where.low_latency_combine(recv_x, idx, weights, form, return_recv_hook=hook)
            finish(deep_ep.EventOverlap(), call)
            assert torch.equal(out, first)
    buffer.destroy()
    out, _, _ = later.low_latency_combine(recv_x, idx, weights, handle)
    assert torch.equal(out, first)
    with pytest.raises(ConfigError, match="two tensors and three numbers"):
        later.low_latency_combine(recv_x, idx, weights, handle[:2])


def test_a_handle_serves_in_every_form(world):
    world.run(saved)


def fresh(group):
    """Results of earlier calls stay what they were, and rows of copies are not kept for longer than their tensors."""
    batch, buffer = make(group)
    r = buffer.rank
    kept = []
    for factor in range(1, 5):
        recv_x, *_ = buffer.low_latency_dispatch(
            factor * batch.x[r], batch.topk_idx[r], M, batch.num_experts, use_fp8=False
        )
        kept.append(recv_x)
    for e in range(NUM_LOCAL):
        num = len(batch.rows(r, e))
        for factor, recv_x in enumerate(kept, start=1):
            assert torch.equal(recv_x[e, :num], factor * kept[0][e, :num])
    assert len({recv_x.data_ptr() for recv_x in kept}) == len(kept)


def test_every_call_has_tensors_of_its_own(world):
    world.run(fresh)


def masks(group):
    batch, buffer = make(group, enable_shrink=True)
    status = torch.full((batch.num_ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * batch.num_ranks
    buffer.low_latency_update_mask_buffer(0, mask=False)
    buffer.low_latency_clean_mask_buffer()
    with pytest.raises(ConfigError, match="pass int32"):
        buffer.low_latency_query_mask_buffer(status[:-1].long())
    with pytest.raises(ConfigError, match="ranks are 0 to"):
        buffer.low_latency_update_mask_buffer(batch.num_ranks, mask=True)
    _, other = make(group)
    with pytest.raises(ConfigError, match="enable_shrink=True"):
        other.low_latency_query_mask_buffer(status)


def test_masks_are_asked_for(world):
    world.run(masks)


def sizes_that_differ(group):
    """In the first call, which has to have memory made; the next one is alike on all ranks, and works."""
    batch, buffer = make(group)
    r = buffer.rank
    x, idx = batch.x[r], batch.topk_idx[r]
    for most in (M + r, M):
        try:
            buffer.low_latency_dispatch(x, idx, most, batch.num_experts, use_fp8=False)
        except ConfigError as error:
            assert "pass the same sizes, dtypes and options" in str(error)  # noqa: PT017 - the call after it works
            assert most == M + r
        else:
            assert most == M


@pytest.mark.worlds("inproc-2", "processes-2")
def test_sizes_that_differ_are_an_error_on_all(world):
    world.run(sizes_that_differ)


def one_leaves(group):
    """The last rank is gone: the others mask it together, its experts get nothing, and a mask is for good."""
    batch, buffer = make(group, enable_shrink=True, explicitly_destroy=True)
    r, last = buffer.rank, batch.num_ranks - 1
    if r == last:
        buffer.destroy()
        return None
    buffer.low_latency_update_mask_buffer(last, mask=True)
    buffer.low_latency_update_mask_buffer(last, mask=True)
    status = torch.zeros(batch.num_ranks, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
        batch.x[r], batch.topk_idx[r], M, batch.num_experts, use_fp8=False
    )
    out, _, _ = buffer.low_latency_combine(recv_x, batch.topk_idx[r], batch.topk_weights[r], handle)
    idx = batch.topk_idx[r]
    is_here = (idx >= 0) & (idx < last * NUM_LOCAL)
    factors = batch.topk_weights[r].where(is_here, 0.0).sum(1, keepdim=True)
    assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())
    for back in (
        buffer.low_latency_clean_mask_buffer,
        lambda: buffer.low_latency_update_mask_buffer(last, mask=False),
    ):
        with pytest.raises(NotSupported, match="for good"):
            back()
    return status.tolist()


@pytest.mark.worlds("inproc-3")
def test_a_rank_that_is_gone_is_masked(world):
    assert world.run(one_leaves) == [[0, 0, 1], [0, 0, 1], None]


def scratch(group):
    """vLLM zeroes it, LightLLM computes in it, both between two calls: no call minds."""
    batch, buffer = make(group)
    r = buffer.rank
    area = buffer.get_local_buffer_tensor(torch.int32, use_rdma_buffer=True)
    assert area.numel() == buffer.num_rdma_bytes // 4
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
        batch.x[r], batch.topk_idx[r], M, batch.num_experts, use_fp8=False
    )
    area.zero_()
    part = buffer.get_local_buffer_tensor(torch.bfloat16, size=torch.Size([3, 5]), offset=4, use_rdma_buffer=True)
    part.fill_(1.5)
    assert part.data_ptr() == area.data_ptr() + 8
    out, _, _ = buffer.low_latency_combine(recv_x, batch.topk_idx[r], batch.topk_weights[r], handle)
    factors = batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0).sum(1, keepdim=True)
    assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())
    assert (part == 1.5).all()
    with pytest.raises(ConfigError, match="more bytes"):
        buffer.get_local_buffer_tensor(torch.int64, size=torch.Size([area.numel()]), use_rdma_buffer=True)
    assert buffer.get_local_buffer_tensor(torch.int8).numel() == 0


def test_the_scratch_area_is_nobody_elses(world):
    world.run(scratch)


def refusals(group):
    batch, buffer = make(group)
    x, idx, weights = batch.x[0], batch.topk_idx[0], batch.topk_weights[0]
    with pytest.raises(ConfigError, match="pass one of them"):
        buffer.low_latency_dispatch(x, idx, M, batch.num_experts, async_finish=True, return_recv_hook=True)
    with pytest.raises(ConfigError, match="round_scale=True"):
        buffer.low_latency_dispatch(x, idx, M, batch.num_experts, use_ue8m0=True)
    with pytest.raises(ConfigError, match="fewer tokens"):
        buffer.low_latency_dispatch(x, idx, len(x) - 1, batch.num_experts)
    with pytest.raises(ConfigError, match="num_max_dispatch_tokens_per_rank=0; pass the most tokens"):
        buffer.low_latency_dispatch(x[:0], idx[:0], 0, batch.num_experts)
    with pytest.raises(ConfigError, match="not divisible by the 128 values of a scale; pass use_fp8=False"):
        buffer.low_latency_dispatch(x[:, :100], idx, M, batch.num_experts)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, M, batch.num_experts, use_fp8=False)
    with pytest.raises(NotSupported, match="use_fp8=True"):
        buffer.low_latency_combine(recv_x, idx, weights, handle, use_logfmt=True)
    with pytest.raises(NotSupported, match="leave it True"):
        deep_ep.Buffer(group, allow_nvlink_for_low_latency_mode=False)
    with pytest.raises(TypeError, match="use_nvfp4"):
        buffer.low_latency_dispatch(x, idx, M, batch.num_experts, use_nvfp4=True)


@pytest.mark.worlds("inproc-1")
def test_what_is_not_supported_is_said(world):
    world.run(refusals)


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 16])
def test_size_hints_grow_with_hidden(num_ranks):
    sizes = [deep_ep.Buffer.get_low_latency_rdma_size_hint(128, h, num_ranks, 256) for h in range(128, 8193, 64)]
    assert sizes == sorted(sizes)
    config = deep_ep.Buffer.get_dispatch_config(num_ranks)
    sizes = [config.get_nvl_buffer_size_hint(2 * h, num_ranks) for h in range(128, 8193, 64)]
    assert sizes == sorted(sizes)
    assert (config.get_rdma_buffer_size_hint(14336, num_ranks) == 0) == (num_ranks <= 8)
