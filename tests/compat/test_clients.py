"""Programs that use DeepEP as its clients do, each in its own way, against a dense mixture of experts."""

import copy

import pytest
import torch

from crossdock.compat import deep_ep
from tests.compat.batches import NUM_LOCAL, make_batch
from tests.compat.dense import dense, expert, grouped_output, local_output
from tests.compat.test_normal import group_size

HIDDEN = 128
M = 16


def near(got, want):
    """As near as a few roundings to bfloat16 are."""
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=0.5)


def of_dense(batch, r, grad):
    """The dense layer's output, and its gradients of x and of the weights."""
    x = batch.x[r].clone().requires_grad_()
    weights = batch.topk_weights[r].clone().requires_grad_()
    out = dense(x, batch.topk_idx[r], weights)
    out.backward(grad.float())
    return out.detach(), x.grad, weights.grad


def grad_of(batch, r):
    return torch.randint(-2, 3, batch.x[r].shape, generator=torch.Generator().manual_seed(r)).bfloat16()


def megatron(group, is_async):
    """The fused all-to-all: two autograd functions, the handle of the forward pass in the backward pass."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    buffer = deep_ep.Buffer(
        group,
        max(c.get_nvl_buffer_size_hint(2 * HIDDEN, batch.num_ranks) for c in (
            deep_ep.Buffer.get_dispatch_config(batch.num_ranks), deep_ep.Buffer.get_combine_config(batch.num_ranks)
        )), 0,
    )  # fmt: skip
    flags = {"async_finish": is_async, "allocate_on_comm_stream": is_async}

    def now():
        return deep_ep.EventOverlap(deep_ep.EventHandle()) if is_async else None

    def joined(event):
        if is_async:
            event.current_stream_wait()

    class FusedDispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, idx, weights):
            per_rank, per_node, per_expert, is_in, event = buffer.get_dispatch_layout(
                idx, batch.num_experts, previous_event=now(), **flags
            )
            recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in, num_tokens_per_expert=per_expert,
                previous_event=event, **flags,
            )  # fmt: skip
            joined(event)
            ctx.handle = handle
            return recv_x, recv_idx, recv_weights, torch.tensor(counts), handle

        @staticmethod
        def backward(ctx, grad_x, _idx, grad_weights, _counts, _handle):
            grad_x, grad_weights, event = buffer.combine(
                grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.float(), previous_event=now(), **flags
            )
            joined(event)
            return grad_x, None, grad_weights

    class FusedCombine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, handle):
            combined, _, event = buffer.combine(x, handle=handle, previous_event=now(), **flags)
            joined(event)
            ctx.handle = handle
            return combined

        @staticmethod
        def backward(ctx, grad):
            grad_x, _, _, _, _, event = buffer.dispatch(
                grad.contiguous(), handle=ctx.handle, previous_event=now(), **flags
            )
            joined(event)
            return grad_x, None

    r = buffer.rank
    for _ in range(2):
        x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
        rows, local_idx, row_weights, counts, handle = FusedDispatch.apply(x, batch.topk_idx[r], weights)
        assert counts.tolist() == batch.counts(r)
        y = local_output(rows, local_idx, row_weights, r)
        out = FusedCombine.apply(y, handle)
        out.backward(grad_of(batch, r))
        want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
        near(out, want)
        near(x.grad, grad_x)
        near(weights.grad, grad_weights)


@pytest.mark.parametrize("is_async", [False, True])
def test_megatrons_fused_all_to_all(world, is_async):
    world.run(megatron, is_async)


def xtuner(group):
    """A handle whose tensors autograd has kept, and given back as others."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    deep_ep.Buffer.set_num_sms(20)
    buffer = deep_ep.Buffer(group)
    r = buffer.rank

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, idx, weights):
            per_rank, per_node, per_expert, is_in, _ = buffer.get_dispatch_layout(idx, batch.num_experts)
            recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
                x, None, per_rank, per_node, is_in, per_expert, idx, weights
            )
            ctx.save_for_backward(*handle)
            return recv_x, recv_idx, recv_weights, *handle

        @staticmethod
        def backward(ctx, grad_x, _, grad_weights, *__):
            grad_x, grad_weights, _ = buffer.combine(grad_x, ctx.saved_tensors, topk_weights=grad_weights)
            return grad_x, None, grad_weights

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *handle):
            ctx.save_for_backward(*handle)
            return buffer.combine(x, handle)[0]

        @staticmethod
        def backward(ctx, grad):
            return buffer.dispatch(grad, handle=ctx.saved_tensors)[0], *[None] * 6

    x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
    rows, local_idx, row_weights, *handle = Dispatch.apply(x, batch.topk_idx[r], weights)
    out = Combine.apply(local_output(rows, local_idx, row_weights, r), *handle)
    out.backward(grad_of(batch, r))
    want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
    near(out, want)
    near(x.grad, grad_x)
    near(weights.grad, grad_weights)


def test_xtuners_saved_handles(world):
    world.run(xtuner)


def torchtitan(group):
    """Compact with the host; backward by combine with [N, K] weights, and by a cached dispatch without the host."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    hint = deep_ep.ElasticBuffer.get_buffer_size_hint(group, M, HIDDEN, num_topk=3)
    buffer = deep_ep.ElasticBuffer(
        group, num_bytes=hint, num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=3, deterministic=True,
        explicitly_destroy=True,
    )  # fmt: skip
    assert buffer.group == group
    assert buffer.num_bytes == hint
    r = buffer.rank_idx
    cache = {}

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, idx, weights):
            rows, local_idx, row_weights, handle, _ = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts,
                num_max_tokens_per_rank=max(len(each) for each in batch.x), do_cpu_sync=True,
            )  # fmt: skip
            cache["handle"] = ctx.handle = handle
            return rows, local_idx, row_weights

        @staticmethod
        def backward(ctx, grad_x, _, grad_weights):
            grad_x, grad_weights, _ = buffer.combine(grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.float())
            return grad_x, None, grad_weights

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            out, _, event = buffer.combine(y, cache["handle"], async_with_compute_stream=True)
            event.current_stream_wait()
            ctx.handle = cache["handle"]
            return out

        @staticmethod
        def backward(ctx, grad):
            rows, *_ = buffer.dispatch(grad, handle=ctx.handle, num_sms=ctx.handle.num_sms, do_cpu_sync=False)
            return rows

    x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
    rows, local_idx, row_weights = Dispatch.apply(x, batch.topk_idx[r], weights)
    assert cache["handle"].num_recv_tokens_per_expert_list == batch.counts(r)
    out = Combine.apply(local_output(rows, local_idx, row_weights, r))
    out.backward(grad_of(batch, r))
    want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
    near(out, want)
    near(x.grad, grad_x)
    near(weights.grad, grad_weights)
    buffer.destroy()


def test_torchtitans_custom_ops(world):
    world.run(torchtitan)


def expanded_training(group, kind, later):
    """DeepSpeed's expand layout; and prime-rl's, with padding, and results that come with the wait."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    alignment = 8 if later else 1
    buffer = kind(group, num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=3)
    r = buffer.rank_idx

    def call(verb, *args, **options):
        if not later:
            return getattr(buffer, verb)(*args, **options)[:-1]
        event = getattr(buffer, verb)(*args, defer_epilogue=True, async_with_compute_stream=True, **options)
        return event.wait()

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, idx, weights):
            rows, _, row_weights, handle = call(
                "dispatch", x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, do_expand=True,
                do_zero_padding=later, expert_alignment=alignment,
            )  # fmt: skip
            ctx.handle = handle
            return rows, row_weights, handle

        @staticmethod
        def backward(ctx, grad_rows, grad_weights, _):
            grad_x, grad_weights = call("combine", grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights)
            return grad_x, None, grad_weights

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, handle):
            ctx.handle = handle
            return call("combine", y, handle)[0]

        @staticmethod
        def backward(ctx, grad):
            rows, *_ = call(
                "dispatch", grad, handle=ctx.handle, num_sms=ctx.handle.num_sms, do_expand=True, do_zero_padding=later
            )
            return rows, None

    x, weights = batch.x[r].clone().requires_grad_(), batch.topk_weights[r].clone().requires_grad_()
    rows, row_weights, handle = Dispatch.apply(x, batch.topk_idx[r], weights)
    assert torch.equal(handle.topk_idx, batch.topk_idx[r])
    ends = handle.psum_num_recv_tokens_per_expert.tolist()
    begins = [0, *(-(-end // alignment) * alignment for end in ends[:-1])]
    numbers = torch.zeros(len(rows))
    for e, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        numbers[begin:end] = r * NUM_LOCAL + e
    y = row_weights.unsqueeze(1) * (rows.float() * (numbers % 3 + 1).unsqueeze(1) + (numbers + 1).unsqueeze(1))
    out = Combine.apply(y.bfloat16(), handle)
    out.backward(grad_of(batch, r))
    want, grad_x, grad_weights = of_dense(batch, r, grad_of(batch, r))
    near(out, want)
    near(x.grad, grad_x)
    near(weights.grad, grad_weights)


def test_deepspeeds_expanded_layout(world):
    world.run(expanded_training, deep_ep.ElasticBuffer, False)


def test_prime_rls_deferred_epilogues(world):
    world.run(expanded_training, deep_ep.EPBuffer, True)


def vllm(group):  # noqa: PLR0915 - one buffer, three classes
    """Its three classes: high throughput, low latency with hooks and out=, V2 (prefill expanded, decode compact)."""
    batch = make_batch(group_size(group), hidden=512)
    num_ranks = batch.num_ranks
    with torch.inference_mode():
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=M, hidden=512, num_ranks=num_ranks, num_experts=batch.num_experts
        )
        buffer = deep_ep.Buffer(
            group=group, num_nvl_bytes=1 << 16, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=NUM_LOCAL,
            allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=True, enable_shrink=True,
        )  # fmt: skip
        r = buffer.rank
        x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
        want = dense(x, idx, weights)

        # High throughput: everything by keyword, no previous event's memory on the communication stream.
        previous = deep_ep.Buffer.capture()
        per_rank, per_node, per_expert, is_in, event = buffer.get_dispatch_layout(
            topk_idx=idx, num_experts=batch.num_experts, previous_event=previous, async_finish=False,
            allocate_on_comm_stream=False,
        )  # fmt: skip
        rows, local_idx, row_weights, counts, handle, event = buffer.dispatch(
            x=x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in,
            num_tokens_per_expert=per_expert, topk_idx=idx, topk_weights=weights, expert_alignment=1,
            config=deep_ep.Buffer.get_dispatch_config(num_ranks), previous_event=previous, async_finish=True,
            allocate_on_comm_stream=False,
        )  # fmt: skip
        event.current_stream_wait()
        assert counts == batch.counts(r)
        y = local_output(rows, local_idx, row_weights, r)
        out, _, event = buffer.combine(
            x=y, handle=handle, topk_weights=None, config=deep_ep.Buffer.get_combine_config(num_ranks),
            previous_event=deep_ep.Buffer.capture(), async_finish=True, allocate_on_comm_stream=False,
        )  # fmt: skip
        event.current_stream_wait()
        near(out, want)

        # Low latency, a step: who is masked is asked; rows come as FP8 or bfloat16; sums go into the layer's output.
        buffer.clean_low_latency_buffer(M, 512, batch.num_experts)
        status = torch.empty(num_ranks, dtype=torch.int32)
        for use_fp8 in (False, True):
            buffer.low_latency_query_mask_buffer(status)
            assert not status.any()
            recv, count, handle, _, hook = buffer.low_latency_dispatch(
                x, idx, M, batch.num_experts, use_fp8=use_fp8, round_scale=use_fp8, use_ue8m0=use_fp8,
                async_finish=False, return_recv_hook=True,
            )  # fmt: skip
            hook()
            if use_fp8:
                from crossdock.compat.deep_ep.utils.math import per_token_cast_back  # noqa: PLC0415

                recv = torch.stack([per_token_cast_back(recv[0][e], recv[1][e]) for e in range(NUM_LOCAL)])
            y = torch.full_like(recv, float("nan"))
            for e, num in enumerate(count.tolist()):
                y[e, :num] = expert(recv[e, :num].float(), r * NUM_LOCAL + e).bfloat16()
            out = torch.empty_like(x)
            _, _, hook = buffer.low_latency_combine(
                y, idx, weights, handle, zero_copy=False, async_finish=False, return_recv_hook=False, out=out
            )
            assert hook is None
            torch.testing.assert_close(out.float(), want, rtol=8e-2 if use_fp8 else 2e-2, atol=2.0)
        buffer.get_local_buffer_tensor(dtype=torch.int32, use_rdma_buffer=True).zero_()
        buffer.low_latency_clean_mask_buffer()

        # V2: prefill has the host wait and expands; decode does not, and M is the next power of two.
        elastic = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=2 * M, hidden=512, num_topk=3, allow_hybrid_mode=False,
            prefer_overlap_with_compute=True, allow_multiple_reduction=False, explicitly_destroy=True,
        )  # fmt: skip
        rows, _, row_weights, handle, _ = elastic.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, do_expand=True, do_cpu_sync=True
        )
        ends = torch.tensor(handle.num_recv_tokens_per_expert_list).cumsum(0).tolist()
        y = grouped_output(rows, list(zip([0, *ends[:-1]], ends, strict=True)), r) * row_weights.unsqueeze(1)
        out, _, event = elastic.combine(
            y.bfloat16(), handle, async_with_compute_stream=True, allocate_on_comm_stream=True
        )
        event.current_stream_wait()
        near(out, want)
        rows, local_idx, row_weights, handle, _ = elastic.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, num_max_tokens_per_rank=M,
            do_cpu_sync=False,
        )  # fmt: skip
        num = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        is_row = torch.arange(len(rows)) < num
        local_idx = local_idx.masked_fill(~is_row.unsqueeze(1), -1)
        y = local_output(rows.masked_fill(~is_row.unsqueeze(1), 0), local_idx, row_weights, r)
        out, _, event = elastic.combine(y, handle, async_with_compute_stream=True, allocate_on_comm_stream=True)
        event.current_stream_wait()
        near(out, want)
        buffer.destroy()


def test_vllms_three_classes(world):
    world.run(vllm)


def sglang(group):
    """Its dispatchers: layout by position, an event that goes on; hooks; decode expanded, aligned, without the host."""
    batch = make_batch(group_size(group), hidden=512)
    buffer = deep_ep.Buffer(group, 1 << 16, 1 << 16, low_latency_mode=True, num_qps_per_rank=NUM_LOCAL, use_fabric=True)
    r = buffer.rank
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    want = dense(x, idx, weights)
    flags = {"async_finish": True, "allocate_on_comm_stream": True}
    per_rank, per_node, per_expert, is_in, previous = buffer.get_dispatch_layout(
        idx, batch.num_experts, previous_event=deep_ep.Buffer.capture(), **flags
    )
    rows, local_idx, row_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=is_in, num_tokens_per_expert=per_expert, previous_event=previous, expert_alignment=128,
        config=deep_ep.Config(20, 8, 256), **flags,
    )  # fmt: skip
    event.current_stream_wait()
    assert counts == [-(-count // 128) * 128 for count in batch.counts(r)]
    out, _, event = buffer.combine(
        local_output(rows, local_idx, row_weights, r), handle, previous_event=deep_ep.Buffer.capture(), **flags
    )
    event.current_stream_wait()
    near(out, want)
    recv, count, handle, _, hook = buffer.low_latency_dispatch(
        x, idx, M, batch.num_experts, use_fp8=False, async_finish=False, return_recv_hook=True
    )
    hook()
    y = torch.zeros_like(recv)
    for e, num in enumerate(count.tolist()):
        y[e, :num] = expert(recv[e, :num].float(), r * NUM_LOCAL + e).bfloat16()
    out, _, hook = buffer.low_latency_combine(y, idx, weights, handle, async_finish=False, return_recv_hook=True)
    hook()
    near(out, want)
    elastic = deep_ep.ElasticBuffer(
        group, num_max_tokens_per_rank=M, hidden=512, num_topk=3, sl_idx=0, prefer_overlap_with_compute=False
    )
    given = (x.to(torch.float8_e4m3fn), torch.ones(len(x), 4))
    (rows, _), _, row_weights, handle, _ = elastic.dispatch(
        given, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, expert_alignment=128, do_expand=True,
        do_cpu_sync=False, use_tma_aligned_col_major_sf=True,
    )  # fmt: skip
    ends = handle.psum_num_recv_tokens_per_expert.tolist()
    begins = [0, *(-(-end // 128) * 128 for end in ends[:-1])]
    y = grouped_output(rows.bfloat16(), list(zip(begins, ends, strict=True)), r) * row_weights.unsqueeze(1)
    out, _, _ = elastic.combine(y.bfloat16(), handle)
    near(out, want)


def test_sglangs_dispatchers(world):
    world.run(sglang)


def lightllm(group):
    """Rows of the metadata are written anew, and dense rows combined on the handle of an expanded dispatch."""
    batch = make_batch(group_size(group), hidden=HIDDEN)
    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=3)
    r = buffer.rank_idx
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    with torch.inference_mode():
        rows, _, row_weights, handle, _ = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=batch.num_experts, do_expand=True, expert_alignment=4
        )
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        begins = [0, *(-(-end // 4) * 4 for end in ends[:-1])]
        y = grouped_output(rows, list(zip(begins, ends, strict=True)), r).float() * row_weights.unsqueeze(1)
        metadata = handle.recv_src_metadata
        picked = metadata[:, 2:].long()
        dense_rows = y[picked.clamp(min=0)].where((picked >= 0).unsqueeze(2), 0.0).sum(1).bfloat16()  # [N, H]
        metadata[:, 2:] = -1
        metadata[:, 2] = torch.arange(len(metadata), dtype=torch.int32)
        out, _, _ = buffer.combine(dense_rows, copy.copy(handle))
    near(out, dense(x, idx, weights))


def test_lightllms_rewritten_metadata(world):
    world.run(lightllm)
