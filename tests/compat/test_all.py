"""What holds for all calls, point by point, as programs rely on it; some points have files of their own.

1 empty ranks, rows of no picks. 2 handles in any order, gradients wanted, inference mode. 3 events. 4 streams and 5
graphs (tests/gpu). 6 two results outstanding, switching. 7 groups and hints. 8 kinds of groups. 9 imports and classes.
10 default dtype. 11 refusals.
"""

import gc
import inspect
import weakref
from functools import partial

import pytest
import torch

from crossdock import ConfigError, PeerFailed
from crossdock.compat import deep_ep
from tests.compat.batches import NUM_LOCAL, make_batch
from tests.compat.test_expert_parallel import make as make_elastic
from tests.compat.test_normal import check_sums, group_size
from tests.compat.test_normal import dispatched as dispatch_v1

HIDDEN = 128


def extremes(group):
    """1: all ranks but one are empty; no rank has a pick; all tokens at one expert."""
    size = group_size(group)
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=HIDDEN)
    for tokens, fill in (([0] * size, None), ([4] + [0] * (size - 1), None), ([3] * size, -1), ([5] * size, 0)):
        batch = make_batch(size, tokens=tokens)
        for idx in batch.topk_idx:
            if fill is not None:
                idx[:] = -1
                idx[:, 0] = fill
        recv_x, *_, handle, _ = dispatch_v1(buffer, batch)
        assert len(recv_x) == len(batch.pairs(buffer.rank))
        check_sums(batch, buffer, buffer.combine(recv_x, handle)[0])
        r = buffer.rank
        idx, weights = batch.topk_idx[r], batch.topk_weights[r]
        recv_x, count, handle, _, _ = buffer.low_latency_dispatch(batch.x[r], idx, 8, batch.num_experts, use_fp8=False)
        assert count.tolist() == batch.counts(r)
        out, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        factors = weights.where(idx >= 0, 0.0).sum(1, keepdim=True)
        assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())
        for expands in (False, True):
            recv_x, _, _, handle, _ = elastic.dispatch(
                batch.x[r], idx, weights, num_experts=batch.num_experts, do_expand=expands
            )
            out, _, _ = elastic.combine(recv_x, handle)
            times = (idx >= 0).sum(1, keepdim=True) if expands else batch.num_homes(r).unsqueeze(1)
            assert torch.equal(out, (batch.x[r].float() * times).bfloat16())


def test_1_ranks_may_be_empty_and_tokens_go_nowhere(world):
    world.run(extremes)


def gradients_wanted(group):
    """2: inputs require grad, and nothing is recorded; the same buffer in inference mode and outside."""
    batch = make_batch(group_size(group))
    with torch.inference_mode():
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN)
    r = buffer.rank
    for is_inference in (True, False, True):
        with torch.inference_mode(is_inference):
            x = batch.x[r].clone().requires_grad_(not is_inference)
            weights = batch.topk_weights[r].clone().requires_grad_(not is_inference)
            recv_x, _, recv_weights, _, handle, _ = dispatch_v1(buffer, batch, x=x, topk_weights=weights)
            out, out_weights, _ = buffer.combine(recv_x.requires_grad_(not is_inference), handle, recv_weights, bias=x)
            check_sums(batch, buffer, out, out_weights, bias=batch.x[r].float())
            recv_x, _, again, _, _ = buffer.low_latency_dispatch(x, batch.topk_idx[r], 16, batch.num_experts)
            low, _, _ = buffer.low_latency_combine(
                torch.zeros(NUM_LOCAL, 16 * batch.num_ranks, HIDDEN).bfloat16(), batch.topk_idx[r], weights, again
            )
            rows, _, _, other, _ = elastic.dispatch(
                x, batch.topk_idx[r], weights, num_experts=batch.num_experts, do_expand=True
            )
            summed, sum_weights, _ = elastic.combine(rows, other, torch.ones(len(rows)), bias=(x, x))
            for tensor in (out, out_weights, low, summed, sum_weights, rows, recv_x[0]):
                assert not tensor.requires_grad
                assert tensor.grad_fn is None


def test_2_gradients_are_not_recorded_in_or_out_of_inference_mode(world):
    world.run(gradients_wanted)


def events(group):
    """3: what captures give, what a synchronous call gives, and that any of it is a previous event."""
    batch, elastic = make_elastic(group, "V2")
    buffer = deep_ep.Buffer(group)
    assert isinstance(deep_ep.Buffer.capture(), deep_ep.EventOverlap)
    assert isinstance(deep_ep.ElasticBuffer.capture(), deep_ep.EventHandle)
    assert isinstance(deep_ep.EPBuffer.capture(), deep_ep.EventHandle)
    previous = [
        None, deep_ep.EventOverlap(), deep_ep.EventOverlap(deep_ep.EventHandle()), deep_ep.EventHandle(),
        buffer.get_dispatch_layout(batch.topk_idx[buffer.rank], batch.num_experts)[-1],
    ]  # fmt: skip
    r = buffer.rank
    for event in previous:
        for is_async in (False, True):
            recv_x, *_, handle, done = dispatch_v1(buffer, batch, previous_event=event, async_finish=is_async)
            assert (done.event is None) == (not is_async)
            out, _, done = buffer.combine(recv_x, handle, previous_event=event, async_finish=is_async)
            check_sums(batch, buffer, out)
            elastic.dispatch(
                batch.x[r], batch.topk_idx[r], num_experts=batch.num_experts, previous_event=event,
                previous_event_before_epilogue=event, async_with_compute_stream=is_async,
                allocate_on_comm_stream=event is not None,
            )  # fmt: skip
    kept = deep_ep.EventOverlap(deep_ep.EventHandle(), [out])
    assert kept.extra_tensors == [out]
    kept.current_stream_wait(release_handle=True)
    assert kept.event is None
    assert kept.extra_tensors is None


def test_3_events_of_every_kind_go_on(world):
    world.run(events)


def switching(group):
    """6: normal, low-latency and normal again on one buffer, with two results outstanding, and another M."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    r = buffer.rank
    idx, weights = batch.topk_idx[r], batch.topk_weights[r]
    factors = weights.where(idx >= 0, 0.0).sum(1, keepdim=True)
    kept = dispatch_v1(buffer, batch)
    for num_tokens in (16, 11):
        buffer.clean_low_latency_buffer(num_tokens, HIDDEN, batch.num_experts)
        first = buffer.low_latency_dispatch(batch.x[r], idx, num_tokens, batch.num_experts, use_fp8=False)
        second = buffer.low_latency_dispatch(batch.x[r], idx, num_tokens, batch.num_experts, use_fp8=False)
        for recv_x, _, handle, _, _ in (first, second):
            out, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
            assert torch.equal(out, (batch.x[r].float() * factors).bfloat16())
        check_sums(batch, buffer, buffer.combine(kept[0], kept[4])[0])


def test_6_modes_may_be_switched(world):
    world.run(switching)


def many(group):
    """7, 9: the group is the same object; several buffers live at once; those that are dropped block nobody."""
    batch = make_batch(group_size(group))
    buffers = [deep_ep.Buffer(group) for _ in range(3)]
    for buffer in buffers:
        assert buffer.group is group
        recv_x, *_, handle, _ = dispatch_v1(buffer, batch)
        check_sums(batch, buffer, buffer.combine(recv_x, handle)[0])
    dropped = weakref.ref(buffers.pop())
    del buffer
    gc.collect()
    assert dropped() is None
    check_sums(batch, buffers[0], buffers[0].combine(*_rows_and_handle(buffers[0], batch))[0])
    for n in (1, 2, 3, 5, 8, 24, 144):
        assert deep_ep.Buffer.get_dispatch_config(n).get_nvl_buffer_size_hint(256, n) > 0
        assert deep_ep.Buffer.get_combine_config(n).get_rdma_buffer_size_hint(256, n) >= 0


def _rows_and_handle(buffer, batch):
    recv_x, *_, handle, _ = dispatch_v1(buffer, batch)
    return recv_x, handle


def test_7_groups_stay_and_buffers_are_many(world):
    world.run(many)


class Communicator:
    """What mpi4py's communicator has, over the threads of a world."""

    def __init__(self, group):
        self.group = group

    def Get_rank(self):  # noqa: N802 - mpi4py's name
        return self.group.rank

    def Get_size(self):  # noqa: N802 - mpi4py's name
        return self.group.size

    def allgather(self, value):
        return self.group.all_gather(value)


def of_communicator(group):
    """8: comm= in place of a group."""
    batch = make_batch(group.size)
    buffer = deep_ep.Buffer(None, 1 << 16, comm=Communicator(group))
    assert (buffer.group, buffer.rank, buffer.group_size) == (None, group.rank, group.size)
    check_sums(batch, buffer, buffer.combine(*_rows_and_handle(buffer, batch))[0])


@pytest.mark.worlds("inproc-1", "inproc-4")
def test_8_a_communicator_of_mpi_is_a_group(world):
    world.run(of_communicator)


def wrapped(group):
    """9: slime's way: __init__ is replaced by one that calls it, keyword arguments and all."""
    made = []
    original = deep_ep.Buffer.__init__

    def noted(self, *args, **kwargs):
        made.append(inspect.signature(original).bind(self, *args, **kwargs).arguments["num_nvl_bytes"])
        return original(self, *args, **kwargs)

    deep_ep.Buffer.__init__ = noted
    try:
        buffer = deep_ep.Buffer(group, num_nvl_bytes=1 << 12, num_rdma_bytes=0)
    finally:
        deep_ep.Buffer.__init__ = original
    assert made == [1 << 12]
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 12, 0)
    with pytest.raises(TypeError, match="no_such"):
        deep_ep.Buffer(group, no_such=True)


@pytest.mark.worlds("inproc-1")
def test_9_a_constructor_may_be_wrapped(world):
    world.run(wrapped)


def runtime(group):
    """9: what programs ask the runtime for: whether ranks are of one host, and where calls run."""
    for buffer in (deep_ep.Buffer(group, explicitly_destroy=True), make_elastic(group, "V2")[1]):
        assert buffer.runtime.is_available()
        assert (buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()) == (1, 0)
        assert buffer.runtime.get_comm_stream() is buffer.get_comm_stream()
        assert buffer.runtime.get_local_device_id() == -1
        buffer.destroy()
        assert not buffer.runtime.is_available()


@pytest.mark.worlds("inproc-1")
def test_9_the_runtime_says_where_it_is(world):
    world.run(runtime)


def ends(group):
    """9: destroy() where it was announced, and then every call says that it is over."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group, explicitly_destroy=True)
    buffer.destroy()
    with pytest.raises(ConfigError, match="make a new one"):
        dispatch_v1(buffer, batch)


def test_9_a_buffer_ends(world):
    world.run(ends)


def other_defaults(group, kinds):
    torch.set_default_dtype(torch.bfloat16)
    try:
        for kind in kinds:
            kind(group)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.worlds("processes-2")
def test_10_the_default_dtype_may_be_another(world):
    """10: DeepEP's own init_dist sets it, and servers do while they build a model; what tests make names its own."""
    world.run(other_defaults, [under_bfloat16])


def under_bfloat16(group):
    batch = make_batch(group_size(group))
    weights = [each.to(torch.float32) for each in batch.topk_weights]
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    elastic = deep_ep.EPBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN)
    r = buffer.rank
    recv_x, _, recv_weights, _, handle, _ = dispatch_v1(buffer, batch, topk_weights=weights[r])
    assert recv_weights.dtype == torch.float32
    out, out_weights, _ = buffer.combine(recv_x, handle, recv_weights)
    check_sums(batch, buffer, out, None)
    assert torch.equal(out_weights, weights[r].where(batch.topk_idx[r] >= 0, 0.0))
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
        batch.x[r], batch.topk_idx[r], 16, batch.num_experts, use_fp8=False
    )
    thirds = weights[r] / 3
    low, _, _ = buffer.low_latency_combine(recv_x, batch.topk_idx[r], thirds, handle)
    factors = thirds.where(batch.topk_idx[r] >= 0, 0.0)
    want = torch.zeros(batch.x[r].shape, dtype=torch.float32)
    for k in range(3):
        want += batch.x[r].float() * factors[:, k : k + 1]
    assert torch.equal(low, want.bfloat16())
    rows, _, row_weights, other, _ = elastic.dispatch(
        batch.x[r], batch.topk_idx[r], weights[r], num_experts=batch.num_experts, do_expand=True
    )
    assert row_weights.dtype == torch.float32
    summed, home, _ = elastic.combine(rows, other, row_weights)
    assert torch.equal(summed.float(), batch.x[r].float() * (batch.topk_idx[r] >= 0).sum(1, keepdim=True))
    assert torch.equal(home, weights[r].where(batch.topk_idx[r] >= 0, 0.0))


def on_another_device(group):
    """10: tensors that a program makes without saying where would be elsewhere; none of ours are."""
    batch, r = make_batch(group_size(group)), group.rank()
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    torch.set_default_device("meta")
    try:
        buffer = deep_ep.Buffer(group, 0, 1 << 12, low_latency_mode=True)
        elastic = deep_ep.EPBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN)
        recv_x, _, recv_weights, _, handle, _ = dispatch_v1(buffer, batch)
        copied = tuple(tensor.clone() for tensor in handle)
        given = [*buffer.combine(recv_x, copied, recv_weights, bias=(x, x))[:2], *copied]
        given.append(buffer.dispatch(x, handle=copied)[0])
        given.append(buffer.get_local_buffer_tensor(torch.int32, use_rdma_buffer=True))
        for hook in (False, True):
            (rows, scales), count, low, _, call = buffer.low_latency_dispatch(
                x, idx, 16, batch.num_experts, return_recv_hook=hook
            )
            if hook:
                call()
            y = rows.bfloat16()
            out, _, call = buffer.low_latency_combine(y, idx, weights, low, return_recv_hook=hook)
            if hook:
                call()
            given += [rows, scales, count, *low[:2], out]
        for expands in (False, True):
            rows, picks, row_weights, routed, _ = elastic.dispatch(
                x, idx, weights, num_experts=batch.num_experts, do_expand=expands, do_cpu_sync=False
            )
            out, home, _ = elastic.combine(rows, routed, row_weights)
            names = ("recv_src_metadata", "psum_num_recv_tokens_per_expert", "dst_buffer_slot_idx")
            given += [rows, row_weights, out, home, *(getattr(routed, name) for name in names)]
            given += [] if picks is None else [picks]
    finally:
        torch.set_default_device(None)
    return {tensor.device.type for tensor in given}


@pytest.mark.worlds("processes-2")
def test_10_the_default_device_may_be_another(world):
    assert world.run(on_another_device) == [{"cpu"}] * 2


def one_is_refused(group):
    """What this rank is told in calls that the façade refuses on rank 0, while the others are in them."""
    buffer, said = deep_ep.Buffer(group, low_latency_mode=True), []
    batch, elastic = make_elastic(group, "V2")
    r, is_guilty = elastic.rank_idx, elastic.rank_idx == 0
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    many = x.new_zeros(17, x.shape[1]), idx.new_full((17, 3), -1), weights.new_zeros(17, 3)
    layout = buffer.get_dispatch_layout(idx, batch.num_experts)
    given = {"num_tokens_per_rank": layout[0], "num_tokens_per_expert": layout[2], "is_token_in_rank": layout[3]}

    def elastic_dispatch(x=x, idx=idx, weights=weights):
        return elastic.dispatch(x, idx, weights, num_experts=batch.num_experts)

    def normal_dispatch():
        return buffer.dispatch(x, **given, topk_idx=idx, topk_weights=weights)

    def calls():
        rows, _, _, handle, _ = elastic_dispatch()
        elastic.combine(rows, handle)
        normal_dispatch()
        buffer.low_latency_dispatch(x, idx, 16, batch.num_experts, use_fp8=False)

    calls()
    for call, guilty in (
        (elastic_dispatch, partial(elastic_dispatch, *many)),
        (normal_dispatch, lambda: buffer.dispatch(x, **given, topk_idx=idx)),
        (
            lambda: buffer.low_latency_dispatch(x, idx, 16, batch.num_experts, use_fp8=False)[1].tolist()[0],
            partial(buffer.low_latency_dispatch, *many[:2], 16, batch.num_experts, use_fp8=False),
        ),
    ):
        with pytest.raises(ConfigError if is_guilty else PeerFailed) as error:
            (guilty if is_guilty else call)()
        said.append(str(error.value).removeprefix("rank 0 failed this call: ").partition(";")[0])
        calls()
    return said


@pytest.mark.worlds("inproc-2", "processes-2")
def test_11_what_one_rank_is_refused_the_others_are_told_at_once(world):
    for said in world.run(one_is_refused):
        assert said == [
            "x has 17 tokens, and num_max_tokens_per_rank=16",
            "topk_idx and topk_weights come together or not at all",
            "x has 17 tokens, and num_max_dispatch_tokens_per_rank=16",
        ]


def one_raises(group):
    """What this rank is told of what keeps rank 0 from a call, whoever found it, while the others are in it."""
    buffer, said = deep_ep.Buffer(group, low_latency_mode=True), []
    batch, elastic = make_elastic(group, "V2")
    r, is_guilty = elastic.rank_idx, elastic.rank_idx == 0
    x, idx, weights = batch.x[r], batch.topk_idx[r], batch.topk_weights[r]
    rows, _, recv_weights, handle, _ = elastic.dispatch(x, idx, weights, num_experts=batch.num_experts)
    packed, _, low, _, _ = buffer.low_latency_dispatch(x, idx, 16, batch.num_experts, use_fp8=False)

    def calls():
        elastic.combine(rows, handle)
        buffer.low_latency_combine(packed, idx, weights, low)

    calls()
    for call, guilty in (
        (
            lambda: elastic.combine(rows, handle, topk_weights=recv_weights),
            lambda: elastic.combine(rows, handle, topk_weights=recv_weights[1:]),
        ),
        (calls, lambda: elastic.combine(rows, handle, bias=(x, x[1:]))),
        (calls, lambda: elastic.combine(None, handle)),
        (
            lambda: elastic.dispatch(x, idx, weights, num_experts=batch.num_experts),
            lambda: elastic.dispatch(x, idx[:, 0], weights, num_experts=batch.num_experts),
        ),
        (
            lambda: buffer.low_latency_dispatch(x, idx, 16, batch.num_experts, use_fp8=False)[1].tolist()[0],
            lambda: buffer.low_latency_dispatch(x, idx[:, 0], 16, batch.num_experts, use_fp8=False),
        ),
        (
            lambda: buffer.low_latency_combine(packed, idx, weights, low),
            lambda: buffer.low_latency_combine(packed, idx, None, low),
        ),
    ):
        with pytest.raises((ConfigError, AttributeError) if is_guilty else PeerFailed) as error:
            (guilty if is_guilty else call)()
        said.append(str(error.value).removeprefix("rank 0 failed this call: ").partition(";")[0])
        calls()
    return said


@pytest.mark.worlds("inproc-2", "processes-2")
def test_11_what_keeps_one_rank_from_a_call_the_others_are_told_at_once(world):
    of_rank_0, *others = world.run(one_raises)
    pairs, no_shape = len(make_batch(2).pairs(0)), "'NoneType' object has no attribute 'shape'"
    assert of_rank_0 == [
        f"topk_weights has shape [{pairs - 1}, 3]",
        "bias is a pair of [5, 128] and [4, 128]",
        no_shape,
        "topk_idx is torch.int64 [5]",
        "topk_idx is torch.int64 [5]",
        "topk_weights is a NoneType",
    ]
    assert all(said == [line.replace(no_shape, f"AttributeError: {no_shape}") for line in of_rank_0] for said in others)


def too_different(group):
    """A connection that ranks fail to make is told as that, and the next calls work."""
    buffer, batch = deep_ep.Buffer(group), make_batch(2)
    idx = batch.topk_idx[buffer.rank]
    given = {"topk_idx": idx, "topk_weights": batch.topk_weights[buffer.rank]}

    def dispatch(num_experts):
        per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(idx, num_experts)
        counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": is_in}
        return buffer.dispatch(batch.x[buffer.rank], **counts, **given)[0]

    with pytest.raises(ConfigError, match="differ in max_experts: 2048 != 4096; pass the same on all ranks"):
        dispatch(2048 * (1 + buffer.rank))
    return len(dispatch(batch.num_experts))


@pytest.mark.worlds("inproc-2", "processes-2")
def test_11_ranks_that_cannot_meet_again_are_told_why(world):
    assert world.run(too_different) == [len(make_batch(2).pairs(rank)) for rank in range(2)]
