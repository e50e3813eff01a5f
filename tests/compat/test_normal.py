"""V1's normal calls by their definition: rows, picks, weights, lists, handles, sums."""

import copy
import pickle

import pytest
import torch

from crossdock import ConfigError
from crossdock.compat import deep_ep
from tests.compat.batches import fp8_rows, make_batch

HIDDEN = 128
sixteen_ranks = pytest.mark.worlds("inproc-10")


def layout_of(buffer, batch):
    return buffer.get_dispatch_layout(batch.topk_idx[buffer.rank], batch.num_experts)


def dispatched(buffer, batch, x=None, **options):
    """A dispatch as clients write it: all by keyword."""
    r = buffer.rank
    num_tokens_per_rank, per_node, num_tokens_per_expert, is_token_in_rank, _ = layout_of(buffer, batch)
    options = {"topk_idx": batch.topk_idx[r], "topk_weights": batch.topk_weights[r], "handle": None} | options
    return buffer.dispatch(
        batch.x[r] if x is None else x,
        num_tokens_per_rank=num_tokens_per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=is_token_in_rank,
        num_tokens_per_expert=num_tokens_per_expert,
        **options,
    )


def layouts(group):
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    per_rank, per_node, per_expert, is_in, event = layout_of(buffer, batch)
    for token, picks in enumerate(batch.topk_idx[buffer.rank].tolist()):
        homes = {batch.home(e) for e in picks} - {-1}
        assert is_in[token].nonzero().flatten().tolist() == sorted(homes)
    assert torch.equal(per_rank, is_in.sum(0).int())
    picked = batch.topk_idx[buffer.rank].flatten()
    assert per_expert.tolist() == [int((picked == e).sum()) for e in range(batch.num_experts)]
    assert per_rank.dtype == per_expert.dtype == torch.int32
    assert is_in.dtype == torch.bool
    assert per_node is None
    assert event.event is None


def group_size(group):
    return group.size if isinstance(group.size, int) else group.size()


def test_a_layout_counts_tokens(world):
    world.run(layouts)


def rows(group, alignment):
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group, 1 << 20)
    r = buffer.rank
    recv_x, recv_idx, recv_weights, listed, handle, event = dispatched(buffer, batch, expert_alignment=alignment)
    pairs = batch.pairs(r)
    assert recv_x.shape == (len(pairs), HIDDEN)
    assert recv_idx.dtype == torch.int64
    assert recv_weights.dtype == torch.float32
    for row, (s, t) in enumerate(pairs):
        assert torch.equal(recv_x[row], batch.x[s][t])
        local = batch.local(r, s, t)
        assert recv_idx[row].tolist() == local
        weights = batch.topk_weights[s][t].tolist()
        assert recv_weights[row].tolist() == [w if e >= 0 else 0.0 for w, e in zip(weights, local, strict=True)]
    assert listed == [-(-count // alignment) * alignment for count in batch.counts(r)]
    assert event.event is None
    with pytest.raises(AssertionError, match="no event to wait for"):
        event.current_stream_wait()
    check_handle(batch, buffer, handle)
    out, out_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    check_sums(batch, buffer, out, out_weights)


def check_handle(batch, buffer, handle):
    """The six tensors, as DeepEP's own test reads them."""
    num_ranks, r = batch.num_ranks, buffer.rank
    prefix, channel, recv_channel, src_idx, is_in, head = handle
    assert len(handle) == 6
    assert isinstance(handle, tuple)
    sent = [[sum(s == source for s, _ in batch.pairs(dst)) for dst in range(num_ranks)] for source in range(num_ranks)]
    assert prefix.tolist() == torch.tensor(sent).cumsum(0).tolist()
    assert prefix.dtype == src_idx.dtype == head.dtype == torch.int32
    assert channel.shape == recv_channel.shape == (num_ranks, 10)
    assert src_idx.tolist() == [t for _, t in batch.pairs(r)]
    assert is_in.dtype == torch.bool
    assert head.shape == is_in.shape == (len(batch.x[r]), num_ranks)


def check_sums(batch, buffer, out, out_weights=None, bias=0.0):
    r = buffer.rank
    want = batch.x[r].float() * batch.num_homes(r).unsqueeze(1) + bias
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), want.bfloat16().float())
    if out_weights is not None:
        assert torch.equal(out_weights, batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0))


@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_come_by_source_and_go_home(world, alignment):
    world.run(rows, alignment)


def handles(group):
    """One handle in every form that a program may give it back in, for every kind of call, in any order."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    r = buffer.rank
    recv_x, _, recv_weights, _, handle, _ = dispatched(buffer, batch)
    saved = tuple(handle)
    forms = [
        handle,
        saved,
        tuple(tensor.view_as(tensor) for tensor in handle),  # new objects over the same memory, as autograd gives
        tuple(tensor.clone() for tensor in handle),
        copy.copy(handle),
        pickle.loads(pickle.dumps(handle)),  # noqa: S301 - our own
    ]
    for form in forms:
        out, out_weights, _ = buffer.combine(recv_x, form, topk_weights=recv_weights)
        check_sums(batch, buffer, out, out_weights)
        again, *nothing, event = buffer.dispatch(2 * batch.x[r], handle=form)
        assert torch.equal(again, 2 * recv_x)
        assert nothing == [None] * 4
        assert event.event is None
        out, out_weights, _ = buffer.combine(recv_x, handle=form)
        assert out_weights is None
        check_sums(batch, buffer, out)
        data, scales = fp8_rows(batch.x[r])
        (recv_data, recv_scales), *_ = buffer.dispatch((data, scales), handle=form)
        assert torch.equal(recv_data.float(), recv_x.to(torch.float8_e4m3fn).float())
        assert recv_scales.is_contiguous()


def test_a_handle_serves_in_every_form(world):
    world.run(handles)


def in_another_buffer(group):
    """Programs remake a buffer between a forward and a backward pass, and may have destroyed the first one."""
    batch = make_batch(group_size(group))
    first = deep_ep.Buffer(group, explicitly_destroy=True)
    recv_x, _, recv_weights, _, handle, _ = dispatched(first, batch)
    saved, later = tuple(handle), deep_ep.Buffer(group, 1 << 20)
    for is_destroyed in (False, True):
        if is_destroyed:
            first.destroy()
        for form in (handle, saved):
            out, out_weights, _ = later.combine(recv_x, form, topk_weights=recv_weights)
            check_sums(batch, later, out, out_weights)
            assert torch.equal(later.dispatch(batch.x[later.rank], handle=form)[0], recv_x)


def test_a_handle_outlives_its_buffer(world):
    world.run(in_another_buffer)


def of_many_tokens(group):
    """A buffer that was made later has room for as many tokens as the handle's had, on ranks of few tokens too."""
    batch = make_batch(group_size(group), tokens=[300 if rank == 0 else 2 for rank in range(group_size(group))])
    first = deep_ep.Buffer(group)
    recv_x, _, recv_weights, _, handle, _ = dispatched(first, batch)
    for form in (tuple(part.clone() for part in handle), pickle.loads(pickle.dumps(handle))):  # noqa: S301 - our own
        later = deep_ep.Buffer(group)
        out, out_weights, _ = later.combine(recv_x, form, topk_weights=recv_weights)
        check_sums(batch, later, out, out_weights)
        assert torch.equal(later.dispatch(batch.x[later.rank], handle=form)[0], recv_x)
    unsaid = tuple(part.clone() for part in handle)
    unsaid[1].zero_()
    if group_size(group) == 1:
        with pytest.raises(ConfigError, match="the handle is of 300 tokens, and this buffer has room for 128 "):
            deep_ep.Buffer(group).combine(recv_x, unsaid)


def test_a_handle_of_many_tokens_makes_room_in_a_later_buffer(world):
    world.run(of_many_tokens)


def of_fewer_ranks(group):
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    recv_x, *_, handle, _ = dispatched(buffer, batch)
    other = (handle[0][:1, :1].clone(), *(part.clone() for part in handle[1:]))
    with pytest.raises(ConfigError, match=f"the handle is of 1 ranks, and this buffer has {batch.num_ranks}"):
        buffer.combine(recv_x, other)


@pytest.mark.worlds("inproc-2")
def test_a_handle_of_another_group_is_refused(world):
    world.run(of_fewer_ranks)


def joined(group):
    """A handle is added to other tuples, from either side."""
    batch = make_batch(group_size(group))
    recv_x, *_, handle, _ = dispatched(deep_ep.Buffer(group), batch)
    for some, rest in (((recv_x, *handle), (recv_x,) + handle), ((*handle, recv_x), handle + (recv_x,))):  # noqa: RUF005
        assert all(one is other for one, other in zip(some, rest, strict=True))
    assert all(part is handle[i % 6] for i, part in enumerate(2 * handle))


@pytest.mark.worlds("inproc-1")
def test_a_handle_may_be_added_to_other_tensors(world):
    world.run(joined)


def many_handles(group):
    """Records go when their tensors do, and those that are still there are found."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    records = buffer._normal._records
    recv_x, *_, first, _ = dispatched(buffer, batch)
    kept = tuple(first)
    del first
    for _ in range(200):
        handle = dispatched(buffer, batch)[4]
        tuple(handle)
    assert len(records) <= 130
    out, _, _ = buffer.combine(recv_x, kept)
    check_sums(batch, buffer, out)
    assert records.find(kept[3]) is not None
    assert records.find(kept[3].clone()) is None


@pytest.mark.worlds("inproc-1")
def test_records_end_with_their_tensors(world):
    world.run(many_handles)


def narrow(group, words):
    batch = make_batch(group_size(group), hidden=256)
    buffer = deep_ep.Buffer(group)
    given = [fp8_rows(x, words) for x in batch.x]
    mine = given[buffer.rank]
    strided = mine[1].t().contiguous().t()
    (recv_data, recv_scales), *_, handle, _ = dispatched(buffer, batch, x=(mine[0], strided))
    pairs = batch.pairs(buffer.rank)
    assert recv_data.dtype == torch.float8_e4m3fn
    assert recv_scales.shape == (len(pairs), words)
    for row, (s, t) in enumerate(pairs):
        assert torch.equal(recv_data[row].float(), given[s][0][t].float())
        assert torch.equal(recv_scales[row], given[s][1][t])
    out, _, _ = buffer.combine(recv_data.bfloat16(), handle)
    again, *_ = buffer.dispatch(batch.x[buffer.rank], handle=handle)  # rows of the other kind on the same handle
    assert torch.equal(again.float(), recv_data.float())
    check_sums(batch, buffer, out)


@pytest.mark.parametrize("words", [2, 1, 6, 101])
def test_rows_with_scales_arrive_bit_for_bit(world, words):
    world.run(narrow, words)


def integer_scales(group):
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    scales = torch.randint(-(2**31), 2**31, (len(batch.x[buffer.rank]), 1), dtype=torch.int32)
    (_, recv_scales), *_ = dispatched(buffer, batch, x=(batch.x[buffer.rank].to(torch.float8_e4m3fn), scales))
    return recv_scales.dtype


def test_scales_may_be_integers(world):
    assert set(world.run(integer_scales)) == {torch.int32}


def worst(group):
    """As many rows as were asked for, whatever came: the tail has no picks, and combine takes it all."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    num_rows = 12 * batch.num_ranks + 1
    recv_x, recv_idx, recv_weights, listed, handle, _ = dispatched(buffer, batch, num_worst_tokens=num_rows)
    pairs = batch.pairs(buffer.rank)
    assert recv_x.shape[0] == recv_idx.shape[0] == recv_weights.shape[0] == handle[3].shape[0] == num_rows
    assert listed == []
    assert recv_idx[: len(pairs)].tolist() == [batch.local(buffer.rank, s, t) for s, t in pairs]
    assert (recv_idx[len(pairs) :] == -1).all()
    y = recv_x.clone()
    y[len(pairs) :] = float("nan")
    for form in (handle, tuple(tensor.clone() for tensor in handle)):
        out, out_weights, _ = buffer.combine(y, form, topk_weights=recv_weights)
        check_sums(batch, buffer, out, out_weights)
        again, *_ = buffer.dispatch(batch.x[buffer.rank], handle=form)
        assert torch.equal(again[: len(pairs)], recv_x[: len(pairs)])


def test_a_bound_on_rows_needs_no_host(world):
    world.run(worst)


def biased(group):
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    r = buffer.rank
    recv_x, *_, handle, _ = dispatched(buffer, batch)
    for bias in (batch.x[r], (batch.x[r], 4 * batch.x[r])):
        total = bias.float() if isinstance(bias, torch.Tensor) else bias[0].float() + bias[1].float()
        out, _, _ = buffer.combine(recv_x, handle, bias=bias)
        check_sums(batch, buffer, out, bias=total)


def test_one_or_two_biases_are_added(world):
    world.run(biased)


def without_picks(group):
    """The mask of ranks is the routing, and the list comes of the counts that were passed."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    recv_x, recv_idx, recv_weights, listed, handle, _ = dispatched(
        buffer, batch, topk_idx=None, topk_weights=None, expert_alignment=2
    )
    assert recv_idx is None
    assert recv_weights is None
    assert listed == [-(-count // 2) * 2 for count in batch.counts(buffer.rank)]
    for row, (s, t) in enumerate(batch.pairs(buffer.rank)):
        assert torch.equal(recv_x[row], batch.x[s][t])
    check_handle(batch, buffer, handle)
    out, _, _ = buffer.combine(recv_x, handle)
    check_sums(batch, buffer, out)


def test_a_mask_of_ranks_alone_is_a_routing(world):
    world.run(without_picks)


def any_number(group):
    """Ranks may bring more at every call, and a rank alone; nothing was said of how many."""
    buffer = deep_ep.Buffer(group)
    size = group_size(group)
    kept = []
    for step, most in enumerate((1, 0, 3, 40, 7, 300)):
        batch = make_batch(size, tokens=[most if rank == step % size else 1 for rank in range(size)], seed=step)
        recv_x, *_, handle, _ = dispatched(buffer, batch)
        kept.append((batch, recv_x, handle))
    for batch, recv_x, handle in reversed(kept):
        out, _, _ = buffer.combine(recv_x, handle)
        check_sums(batch, buffer, out)


def test_tokens_have_no_bound(world):
    world.run(any_number)


def several(group):
    """E, K, H and formats change from call to call."""
    buffer = deep_ep.Buffer(group)
    size = group_size(group)
    for hidden, num_topk in ((128, 3), (64, 1), (256, 2), (128, 3)):
        batch = make_batch(size, hidden=hidden, num_topk=num_topk)
        recv_x, *_, handle, _ = dispatched(buffer, batch)
        out, _, _ = buffer.combine(recv_x, handle)
        check_sums(batch, buffer, out)


def test_shapes_may_change_from_call_to_call(world):
    world.run(several)


def asynchronous(group):
    """As SGLang writes it: an event of the layout goes on, and that of the dispatch is waited for."""
    batch = make_batch(group_size(group))
    buffer = deep_ep.Buffer(group)
    r = buffer.rank
    flags = {"async_finish": True, "allocate_on_comm_stream": True}
    per_rank, per_node, per_expert, is_in, event = buffer.get_dispatch_layout(
        batch.topk_idx[r], batch.num_experts, previous_event=deep_ep.Buffer.capture(), **flags
    )
    recv_x, _, _, _, handle, event = buffer.dispatch(
        batch.x[r], topk_idx=batch.topk_idx[r], topk_weights=batch.topk_weights[r], num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in, num_tokens_per_expert=per_expert,
        previous_event=event, **flags,
    )  # fmt: skip
    assert event.event is not None
    event.current_stream_wait()
    event.current_stream_wait()
    for _ in range(5):  # nobody waits for these
        out, _, event = buffer.combine(recv_x, handle, async_finish=True, previous_event=deep_ep.EventHandle())
    check_sums(batch, buffer, out)
    with event:
        pass


def test_events_go_on_and_need_not_be_waited_for(world):
    world.run(asynchronous)


def ten_tensors(group):
    batch = make_batch(group.size)
    buffer = deep_ep.Buffer(group)
    _, per_node, *_ = layout_of(buffer, batch)
    assert per_node.shape == (2,)
    recv_x, _, recv_weights, _, handle, _ = dispatched(buffer, batch)
    assert len(handle) == 10
    assert all(isinstance(tensor, torch.Tensor) for tensor in handle)
    for form in (handle, tuple(handle), tuple(tensor.clone() for tensor in handle)):
        out, out_weights, _ = buffer.combine(recv_x, form, topk_weights=recv_weights)
        check_sums(batch, buffer, out, out_weights)


@sixteen_ranks
def test_a_handle_of_many_ranks_has_ten_tensors(world):
    world.run(ten_tensors)


def refusals(group):
    batch = make_batch(1)
    buffer = deep_ep.Buffer(group)
    x, idx, weights = batch.x[0], batch.topk_idx[0], batch.topk_weights[0]
    said = []
    for call in (
        lambda: dispatched(buffer, batch, topk_weights=None),
        lambda: dispatched(buffer, batch, topk_idx=None, topk_weights=None, num_worst_tokens=8),
        lambda: dispatched(buffer, batch, num_worst_tokens=len(x) - 1),
        lambda: dispatched(buffer, batch, x=x.float()),
        lambda: dispatched(buffer, batch, x=(x, weights.double())),
        lambda: dispatched(buffer, batch, allocate_on_comm_stream=True),
        lambda: dispatched(buffer, batch, previous_event=3),
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights),
        lambda: buffer.combine(x, ()),
        lambda: buffer.get_dispatch_layout(torch.full_like(idx, batch.num_experts), batch.num_experts),
        lambda: deep_ep.Config(5),
        lambda: deep_ep.Config(20, 8, 8),
        lambda: deep_ep.Buffer.set_num_sms(7),
        lambda: buffer.low_latency_dispatch(x, idx, 8, 3),
        lambda: deep_ep.Buffer(None),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        said.append(str(caught.value))
    recv_x, *_, handle, _ = dispatched(buffer, batch)
    with pytest.raises(ConfigError, match="leave topk_idx"):
        buffer.dispatch(x, handle=handle, topk_idx=idx, topk_weights=weights)
    with pytest.raises(ConfigError, match="bias is a list"):
        buffer.combine(recv_x, handle, bias=[x])
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        buffer.destroy()
    return said


@pytest.mark.worlds("inproc-1")
def test_what_is_wrong_is_said(world):
    (said,) = world.run(refusals)
    assert all(";" in message or "num_worst" in message for message in said), said
