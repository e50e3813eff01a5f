"""V2's and V2.5's calls by their definition: both layouts, with and without the host, handles, weights, sums."""

import copy
import inspect
import pickle

import pytest
import torch

from crossdock import Arena, Bf16, Compact, ConfigError, Expanded, Fp8, Opaque, Padded, Spec, Topology
from crossdock.compat import deep_ep
from crossdock.compat.deep_ep import sizes
from tests.compat.batches import NUM_LOCAL, fp8_rows, make_batch
from tests.compat.test_normal import group_size

M = 16
HIDDEN = 128
KINDS = {"V2": deep_ep.ElasticBuffer, "V2.5": deep_ep.EPBuffer}
kinds = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("expands", [False, True], ids=["compact", "expand"])
hosts = pytest.mark.parametrize("asks_host", [True, False], ids=["host", "no host"])


def make(group, kind, seed=0, **options):
    batch = make_batch(group_size(group), hidden=HIDDEN, seed=seed)
    options = {"num_max_tokens_per_rank": M, "hidden": HIDDEN, "num_topk": 3, "explicitly_destroy": True} | options
    return batch, KINDS[kind](group, **options)


def dispatched(buffer, batch, x=None, **options):
    r = buffer.rank_idx
    options = {"topk_idx": batch.topk_idx[r], "topk_weights": batch.topk_weights[r]} | options
    return buffer.dispatch(batch.x[r] if x is None else x, num_experts=batch.num_experts, **options)


def expanded_rows(batch, rank, alignment):
    """Row -> (source, token, pick), None in gaps; and the start of each expert."""
    rows, starts = [], []
    for e in range(NUM_LOCAL):
        starts.append(len(rows))
        rows += batch.rows(rank, e)
        rows += [None] * (-len(rows) % alignment)
    return rows, starts


def align(value, alignment):
    return -(-value // alignment) * alignment


def weighted(batch, buffer, recv_x, recv_idx, rows):
    """Outputs of experts that multiply by their number + 1; NaN in rows that nothing points to. By row, [R, H]."""
    r = buffer.rank_idx
    y = torch.full((recv_x.shape[0], HIDDEN), float("nan"), dtype=torch.bfloat16)
    for row, place in enumerate(rows):
        if place is None:
            continue
        experts = (
            [batch.topk_idx[place[0]][place[1]].tolist()[place[2]]]
            if len(place) == 3
            else [r * NUM_LOCAL + e for e in recv_idx[row].tolist() if e >= 0]
        )
        y[row] = recv_x[row] * sum(e + 1 for e in experts)
    return y


def want_sums(batch, rank, bias=0.0):
    picks = batch.topk_idx[rank]
    factors = (picks + 1).where(picks >= 0, 0).sum(1, keepdim=True)
    return (batch.x[rank].float() * factors + bias).bfloat16()


def fresh(group, kind, expands, asks_host, alignment):
    batch, buffer = make(group, kind)
    r, num_ranks = buffer.rank_idx, batch.num_ranks
    stats = torch.zeros(NUM_LOCAL, dtype=torch.int32)
    options = {"do_expand": expands, "do_cpu_sync": asks_host, "expert_alignment": alignment}
    recv_x, recv_idx, recv_weights, handle, event = dispatched(
        buffer, batch, do_zero_padding=expands, cumulative_local_expert_recv_stats=stats, **options
    )
    assert event.event is None
    counts, pairs = batch.counts(r), batch.pairs(r)
    assert stats.tolist() == counts
    rows, _ = expanded_rows(batch, r, alignment) if expands else (pairs, None)
    if expands:
        worst = align(num_ranks * M * min(3, NUM_LOCAL) + (alignment - 1) * NUM_LOCAL, alignment)
        assert recv_x.shape == (len(rows) if asks_host else worst, HIDDEN)
        assert recv_idx is None
        assert recv_weights.shape == (recv_x.shape[0],)
        for row, place in enumerate(rows):
            if place is None:
                assert not recv_x[row].any()
                assert recv_weights[row] == 0
            else:
                s, t, k = place
                assert torch.equal(recv_x[row], batch.x[s][t])
                assert recv_weights[row] == batch.topk_weights[s][t, k]
    else:
        assert recv_x.shape == (len(pairs) if asks_host else num_ranks * M, HIDDEN)
        assert recv_idx.dtype == torch.int64
        assert recv_idx[len(pairs) :].eq(-1).all()
        for row, (s, t) in enumerate(pairs):
            assert torch.equal(recv_x[row], batch.x[s][t])
            assert recv_idx[row].tolist() == batch.local(r, s, t)
            is_here = recv_idx[row] >= 0
            assert torch.equal(recv_weights[row][is_here], batch.topk_weights[s][t][is_here])
    check_tables(batch, buffer, handle, expands, asks_host, alignment, rows)
    y = weighted(batch, buffer, recv_x, recv_idx, rows)
    for bias in (None, batch.x[r], (batch.x[r], 2 * batch.x[r])):
        out, out_weights, _ = buffer.combine(y, handle, bias=bias)
        total = 0.0 if bias is None else bias.float() if torch.is_tensor(bias) else bias[0].float() + bias[1].float()
        assert torch.equal(out, want_sums(batch, r, total))
        assert out_weights is None
    given = torch.full_like(recv_weights, float("nan"))
    for row, place in enumerate(rows):
        if place is not None:
            given[row] = recv_weights[row] * 2 if expands else recv_weights[row].where(recv_idx[row] >= 0, float("nan"))
    out, out_weights, _ = buffer.combine(y, handle, topk_weights=given)
    assert torch.equal(out, want_sums(batch, r))
    want = batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0)
    assert torch.equal(out_weights, 2 * want if expands else want)
    buffer.destroy()
    buffer.destroy()
    with pytest.raises(ConfigError, match="the buffer was destroyed; make a new one"):
        buffer.combine(y, handle)


def check_tables(batch, buffer, handle, expands, asks_host, alignment, rows):
    r, num_ranks = buffer.rank_idx, batch.num_ranks
    counts, pairs = batch.counts(r), batch.pairs(r)
    aligned = [align(count, alignment) for count in counts]
    assert handle.num_recv_tokens_per_expert_list == (aligned if asks_host else [])
    per_rank = [sum(s == source for s, _ in pairs) for source in range(num_ranks)]
    psum = handle.psum_num_recv_tokens_per_scaleup_rank
    assert psum.tolist() == torch.tensor(per_rank).cumsum(0).tolist()
    assert handle.psum_num_recv_tokens_per_rank is psum
    ends = torch.tensor(aligned).cumsum(0)
    want = ends - torch.tensor(aligned) + torch.tensor(counts) if expands else ends
    assert handle.psum_num_recv_tokens_per_expert.tolist() == want.tolist()
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
    for name in ("psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "recv_src_metadata",
                 "num_unaligned_recv_tokens_per_expert", "dst_buffer_slot_idx"):  # fmt: skip
        assert getattr(handle, name).dtype == torch.int32, name
    metadata = handle.recv_src_metadata
    assert metadata.shape == (len(pairs) if asks_host else num_ranks * M, 3 + 2)
    place_of = {place: row for row, place in enumerate(rows) if place is not None}
    for row, (s, t) in enumerate(pairs):
        local = batch.local(r, s, t)
        last = max(k for k, e in enumerate(local) if e >= 0)
        assert metadata[row, :2].tolist() == [s * M + t, s * 3 + last]
        if expands:
            assert metadata[row, 2:].tolist() == [place_of[s, t, k] if e >= 0 else -1 for k, e in enumerate(local)]
    assert (handle.do_expand, handle.num_experts, handle.expert_alignment, handle.num_max_tokens_per_rank) == (
        expands, batch.num_experts, alignment, M,
    )  # fmt: skip
    assert handle.dst_buffer_slot_idx.shape == batch.topk_idx[r].shape
    if asks_host:
        assert handle.num_recv_tokens == len(pairs)
        assert handle.num_expanded_tokens == len(rows)


@pytest.mark.parametrize("alignment", [1, 4])
@hosts
@layouts
@kinds
def test_rows_go_out_and_home(world, kind, expands, asks_host, alignment):
    world.run(fresh, kind, expands, asks_host, alignment)


def cached(group, kind, expands, asks_host):
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    recv_x, recv_idx, recv_weights, handle, _ = dispatched(
        buffer, batch, do_expand=expands, do_cpu_sync=asks_host, expert_alignment=4
    )
    pairs = batch.pairs(r)
    rows, _ = expanded_rows(batch, r, 4) if expands else (pairs, None)
    came = [row for row, place in enumerate(rows) if place is not None]
    more = [
        {},
        {"do_expand": expands, "num_sms": handle.num_sms, "do_cpu_sync": False, "num_max_tokens_per_rank": M},
        {"expert_alignment": 4, "num_experts": batch.num_experts},
    ]
    for options in more:
        for weights in (None, 3 * batch.topk_weights[r]):
            again, idx, again_weights, same, _ = buffer.dispatch(
                2 * batch.x[r], handle=handle, topk_weights=weights, **options
            )
            assert same is handle
            assert again.shape == recv_x.shape
            assert torch.equal(again[came], 2 * recv_x[came])
            assert (idx is None) == expands
            assert expands or torch.equal(idx, recv_idx)
            assert (again_weights is None) == (weights is None)
            if weights is not None:
                assert torch.equal(again_weights[came], 3 * recv_weights[came])
    data, scales = fp8_rows(batch.x[r])
    (recv_data, recv_scales), *_ = buffer.dispatch((data, scales), handle=handle)
    assert torch.equal(recv_data[came].float(), recv_x[came].to(torch.float8_e4m3fn).float())
    every = [fp8_rows(x)[1] for x in batch.x]
    for row in came:
        assert torch.equal(recv_scales[row], every[rows[row][0]][rows[row][1]])
    out, _, _ = buffer.combine(weighted(batch, buffer, recv_x, recv_idx, rows), handle)
    assert torch.equal(out, want_sums(batch, r))
    for wrong in ({"expert_alignment": 8}, {"do_expand": True} if not expands else {"num_experts": 1},
                  {"topk_idx": batch.topk_idx[r]}, {"do_cpu_sync": True}):  # fmt: skip
        with pytest.raises(ConfigError):
            buffer.dispatch(batch.x[r], handle=handle, **wrong)


@hosts
@layouts
@kinds
def test_a_handle_sends_other_rows_the_same_way(world, kind, expands, asks_host):
    world.run(cached, kind, expands, asks_host)


def narrow(group, kind, expands, turns, words):
    """Data and scales of the client's own kind, in either order of memory."""
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    every = [fp8_rows(x, words) for x in batch.x]
    for asks_host in (True, False):
        (data, scales), _, _, handle, _ = dispatched(
            buffer, batch, x=every[r], do_expand=expands, do_cpu_sync=asks_host, expert_alignment=2,
            use_tma_aligned_col_major_sf=turns,
        )  # fmt: skip
        num_rows = data.shape[0]
        assert scales.shape == (num_rows, words)
        if turns:
            assert scales.stride() == (1, align(num_rows, 4))
        else:
            assert scales.is_contiguous()
        rows, _ = expanded_rows(batch, r, 2) if expands else (batch.pairs(r), None)
        for row, place in enumerate(rows):
            if place is None:
                assert not data[row].float().any()
                assert not scales[row].any()
            else:
                assert torch.equal(data[row].float(), every[place[0]][0][place[1]].float())
                assert torch.equal(scales[row], every[place[0]][1][place[1]])
        again, *_ = buffer.dispatch(batch.x[r], handle=handle)  # bfloat16 on a handle of FP8
        came = [row for row, place in enumerate(rows) if place is not None]
        assert torch.equal(again[came].float(), data[came].float())


@pytest.mark.worlds("inproc-1", "inproc-4")
@pytest.mark.parametrize("words", [1, 3, 70])
@pytest.mark.parametrize("turns", [False, True])
@layouts
@kinds
def test_rows_with_scales_arrive_bit_for_bit(world, kind, expands, turns, words):
    world.run(narrow, kind, expands, turns, words)


def rewritten(group, kind, is_inference):
    """LightLLM's way: dense rows, one per token that came, named by the metadata in place of the expanded ones."""
    with torch.inference_mode(is_inference):
        batch, buffer = make(group, kind)
        r = buffer.rank_idx
        for asks_host in (True, False):
            recv_x, _, _, handle, _ = dispatched(buffer, batch, do_expand=True, do_cpu_sync=asks_host)
            untouched = copy.copy(handle)
            pairs = batch.pairs(r)
            metadata = handle.recv_src_metadata
            dense = torch.full((max(len(pairs), 1), HIDDEN), float("nan"), dtype=torch.bfloat16)
            for row, (s, t) in enumerate(pairs):
                dense[row] = batch.x[s][t] * sum(r * NUM_LOCAL + e + 1 for e in batch.local(r, s, t) if e >= 0)
            metadata[:, 2:] = -1
            metadata[: len(pairs), 2] = torch.arange(len(pairs), dtype=torch.int32)
            out, _, _ = buffer.combine(dense, handle)
            assert torch.equal(out, want_sums(batch, r))
            other = copy.copy(handle)
            other.recv_src_metadata = torch.cat([metadata[: len(pairs)], torch.full((3, 5), 77, dtype=torch.int32)])
            other.recv_src_metadata[: len(pairs), 2] = -1
            other.recv_src_metadata[: len(pairs), 4] = torch.arange(len(pairs), dtype=torch.int32)
            out, _, _ = buffer.combine(dense, other)
            assert torch.equal(out, want_sums(batch, r))
            rows, _ = expanded_rows(batch, r, 1)
            out, _, _ = buffer.combine(weighted(batch, buffer, recv_x, None, rows), untouched)
            assert torch.equal(out, want_sums(batch, r))


@pytest.mark.parametrize("is_inference", [False, True])
@kinds
def test_metadata_that_was_rewritten_says_what_is_summed(world, kind, is_inference):
    world.run(rewritten, kind, is_inference)


def once_at_the_owner(group, kind):
    """allow_multiple_reduction=False: picks in their order, with no rounding in between; the tables are the same."""
    batch, buffer = make(group, kind, allow_multiple_reduction=False)
    r = buffer.rank_idx
    for asks_host in (True, False):
        recv_x, _, _, handle, _ = dispatched(buffer, batch, do_expand=True, do_cpu_sync=asks_host, expert_alignment=4)
        rows, _ = expanded_rows(batch, r, 4)
        check_tables(batch, buffer, handle, True, asks_host, 4, rows)
        y = weighted(batch, buffer, recv_x, None, rows)
        out, _, _ = buffer.combine(y, handle)
        assert torch.equal(out, want_sums(batch, r))
        with pytest.raises(ConfigError, match="allow_multiple_reduction=True"):
            buffer.combine(y, handle, topk_weights=torch.ones(len(y)))
    recv_x, recv_idx, recv_weights, handle, _ = dispatched(buffer, batch)
    out, out_weights, _ = buffer.combine(
        weighted(batch, buffer, recv_x, recv_idx, batch.pairs(r)), handle, topk_weights=recv_weights
    )
    assert torch.equal(out, want_sums(batch, r))
    assert torch.equal(out_weights, batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0))


@kinds
def test_picks_are_summed_once_where_that_is_asked_for(world, kind):
    world.run(once_at_the_owner, kind)


def rounding(group, sums_at_rank):
    """2**8 + 1 is no bfloat16: what a rank rounds before it goes home shows."""
    kind = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=1, hidden=8, allow_multiple_reduction=sums_at_rank)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    recv_x, _, _, handle, _ = kind.dispatch(
        x, torch.tensor([[0, 1, 2]]), torch.ones(1, 3), num_experts=3, do_expand=True
    )
    y = recv_x * torch.tensor([256.0, 1.0, 1.0]).unsqueeze(1)
    out, _, _ = kind.combine(y.bfloat16(), handle, bias=torch.full((1, 8), -256.0).bfloat16())
    return out[0, 0].item()


@pytest.mark.worlds("inproc-1")
def test_a_rank_rounds_its_sum_once(world):
    assert world.run(rounding, False) == [2.0]
    assert world.run(rounding, True) == [2.0]  # 258 is a bfloat16


def per_call(group, kind):
    """M changes from call to call, with and without the host."""
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    for asks_host in (True, False, True):
        for num_tokens in (11, 16, 12, 64, 11):
            recv_x, recv_idx, _, handle, _ = dispatched(
                buffer, batch, num_max_tokens_per_rank=num_tokens, do_cpu_sync=asks_host
            )
            pairs = batch.pairs(r)
            assert recv_x.shape[0] == (len(pairs) if asks_host else batch.num_ranks * num_tokens)
            assert handle.recv_src_metadata[: len(pairs), 0].tolist() == [s * num_tokens + t for s, t in pairs]
            out, _, _ = buffer.combine(weighted(batch, buffer, recv_x, recv_idx, pairs), handle)
            assert torch.equal(out, want_sums(batch, r))
    with pytest.raises(ConfigError, match="fewer tokens"):
        dispatched(buffer, batch, x=batch.x[0].new_zeros(17, HIDDEN))


@kinds
def test_the_most_tokens_may_change_per_call(world, kind):
    world.run(per_call, kind)


def crowded(group):
    """All to one rank, with less room than that at first: all ranks make more together, also behind a deferred call."""
    batch, buffer = make(group, "V2.5")
    r, num_ranks = buffer.rank_idx, batch.num_ranks
    num_tokens = 12 * M
    idx = torch.tensor([[0, 1, 2]]).expand(num_tokens, 3).contiguous()
    x = torch.full((num_tokens, HIDDEN), 1.0 + r).bfloat16()
    options = {"num_experts": batch.num_experts, "num_max_tokens_per_rank": num_tokens, "do_expand": True}
    for later in (False, True):
        if later:
            buffer._calls._shapes._capacities.clear()
            event = buffer.dispatch(x, idx, async_with_compute_stream=True, defer_epilogue=True, **options)
            recv_x, _, _, handle = event.wait()
        else:
            recv_x, _, _, handle, _ = buffer.dispatch(x, idx, **options)
        assert recv_x.shape[0] == (3 * num_tokens * num_ranks if r == 0 else 0)
        out, _, _ = buffer.combine(recv_x, handle)
        assert torch.equal(out, 3 * x)


@pytest.mark.worlds("inproc-1", "inproc-4")
def test_more_rows_than_there_is_room_for_make_room(world, monkeypatch):
    monkeypatch.setattr(sizes, "rows_at_first", lambda worst, *, num_tokens, **_: min(worst, num_tokens))
    world.run(crowded)


def crowded_twice(group):
    """Two deferred calls for which there is no room, and every second rank waits for the later one first."""
    batch, buffer = make(group, "V2.5")
    r, num_tokens = buffer.rank_idx, 12 * M
    idx = torch.tensor([[0, 1, 2]]).expand(num_tokens, 3).contiguous()
    given = [torch.full((num_tokens, HIDDEN), 1.0 + r + 10 * call).bfloat16() for call in range(2)]
    options = {"num_experts": batch.num_experts, "num_max_tokens_per_rank": num_tokens, "do_expand": True}
    events = [buffer.dispatch(x, idx, async_with_compute_stream=True, defer_epilogue=True, **options) for x in given]
    came = {}
    for call in (1, 0) if r % 2 else (0, 1):
        came[call] = events[call].wait()
    for call, x in enumerate(given):
        recv_x, _, _, handle = came[call]
        assert recv_x.shape[0] == (3 * num_tokens * batch.num_ranks if r == 0 else 0)
        assert torch.equal(buffer.combine(recv_x, handle)[0], 3 * x)


@pytest.mark.worlds("inproc-2", "inproc-4")
def test_calls_that_begin_again_do_so_in_one_order(world, monkeypatch):
    monkeypatch.setattr(sizes, "rows_at_first", lambda worst, *, num_tokens, **_: min(worst, num_tokens))
    world.run(crowded_twice)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [16, 4096])
def test_a_hint_has_room_for_what_a_call_begins_with(num_ranks, num_tokens):
    topology = Topology(num_ranks=num_ranks)
    hint = sizes.elastic(num_tokens, 7168, num_ranks, 8)
    common = {"num_experts": 32 * num_ranks, "num_topk": 8, "hidden": 7168, "max_tokens": num_tokens, "reduce": "rank"}
    worst = Expanded(alignment=128).worst_case(
        num_ranks=num_ranks, max_tokens=num_tokens, num_topk=8, num_local_experts=32
    )
    rows = sizes.rows_at_first(worst, num_ranks=num_ranks, num_tokens=num_tokens, num_topk=8)
    for layout in (Compact(capacity=num_ranks * num_tokens), Expanded(alignment=128, capacity=rows)):
        for wire in (Bf16(), Opaque(dtype=torch.float8_e4m3fn, block=128)):
            spec = Spec(layout=layout, wire=wire, num_slots=1, **common)
            assert Arena(spec, topology).num_body_bytes <= hint
    hint = sizes.low_latency(num_tokens, 7168, num_ranks, 32 * num_ranks)
    for wire in (Bf16(), Fp8(column_major=True)):
        padded = {**common, "reduce": "token"}
        spec = Spec(layout=Padded(capacity=num_ranks * num_tokens), wire=wire, **padded)
        assert Arena(spec, topology).num_body_bytes <= hint


def identity(group, kind):
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    idx = batch.topk_idx[r].clone()
    copies = kind == "V2"
    *_, handle, _ = dispatched(buffer, batch, topk_idx=idx)
    assert torch.equal(handle.topk_idx, batch.topk_idx[r])
    assert (handle.topk_idx.data_ptr() != idx.data_ptr()) == (copies and idx.numel() > 0)
    *_, handle, _ = dispatched(buffer, batch, topk_idx=idx, do_handle_copy=False)
    assert handle.topk_idx is idx or handle.topk_idx.data_ptr() == idx.data_ptr()
    *_, other, _ = dispatched(buffer, batch, topk_idx=idx, do_handle_copy=False)
    assert torch.equal(handle.dst_buffer_slot_idx, other.dst_buffer_slot_idx)
    idx.add_(0)
    if copies:
        assert torch.equal(handle.topk_idx, idx)
        return
    with pytest.raises(AssertionError, match="written to after"):
        handle.topk_idx  # noqa: B018 - read
    with torch.inference_mode():
        idx = batch.topk_idx[r].clone()
        *_, handle, _ = dispatched(buffer, batch, topk_idx=idx)
        idx.add_(0)
        assert torch.equal(handle.topk_idx, idx)


@kinds
def test_a_handle_has_the_picks_or_a_copy(world, kind):
    world.run(identity, kind)


def asynchronous(group, kind, expands):
    """In the ways of vLLM (an event of combine, no previous one) and of SGLang (a captured one, on their stream)."""
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    recv_x, recv_idx, _, handle, event = dispatched(
        buffer, batch, do_expand=expands, previous_event=type(buffer).capture(), async_with_compute_stream=True,
        allocate_on_comm_stream=True,
    )  # fmt: skip
    assert event.event is not None
    seen = []
    event.register_hook_after_wait(lambda: seen.append(1) or "hooked")
    with event(release_handle=True):
        pass
    assert seen == [1]
    assert event.event is None
    rows, _ = expanded_rows(batch, r, 1) if expands else (batch.pairs(r), None)
    y = weighted(batch, buffer, recv_x, recv_idx, rows)
    for _ in range(4):  # nobody waits for these
        out, _, event = buffer.combine(y, handle, async_with_compute_stream=True, allocate_on_comm_stream=True)
    event.current_stream_wait()
    assert torch.equal(out, want_sums(batch, r))
    out, _, event = buffer.combine(y, handle, previous_event=event, allocate_on_comm_stream=True)
    assert event.event is None
    assert torch.equal(out, want_sums(batch, r))


@layouts
@kinds
def test_events_are_waited_for_or_not(world, kind, expands):
    world.run(asynchronous, kind, expands)


def barriers(group, kind):
    _, buffer = make(group, kind)
    for with_cpu_sync in (False, True):
        buffer.barrier(with_cpu_sync=with_cpu_sync)
        buffer.barrier(False, with_cpu_sync)
    sms = buffer.get_theoretical_num_sms(256, 8)
    assert sms >= 4
    assert sms % (4 if kind == "V2.5" else 2) == 0
    assert buffer.get_theoretical_num_qps(sms) >= 1
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, buffer.num_ranks)
    assert buffer.group is group
    assert (buffer.num_scaleout_ranks, buffer.scaleup_rank_idx) == (1, buffer.rank_idx)
    hints = [type(buffer).get_buffer_size_hint(group, M, hidden) for hidden in range(128, 8193, 320)]
    assert hints == sorted(hints)
    assert kind == "V2" or all(hint % 2**21 == 0 for hint in hints)


@kinds
def test_ranks_wait_for_each_other(world, kind):
    world.run(barriers, kind)


def other_forms(group, kind, expands):
    """A handle that was copied with its tensors, or made of its parts: the routing is found again, on all ranks."""
    batch, buffer = make(group, kind)
    r = buffer.rank_idx
    names = list(inspect.signature(deep_ep.EPHandle).parameters)
    for asks_host in (True, False):
        recv_x, recv_idx, recv_weights, handle, _ = dispatched(
            buffer, batch, do_expand=expands, do_cpu_sync=asks_host, expert_alignment=4, num_max_tokens_per_rank=11
        )
        rows, _ = expanded_rows(batch, r, 4) if expands else (batch.pairs(r), None)
        came = [row for row, place in enumerate(rows) if place is not None]
        y = weighted(batch, buffer, recv_x, recv_idx, rows)
        made = deep_ep.EPHandle(*(getattr(handle, name) for name in names))
        assert all(getattr(made, name) is getattr(handle, name) for name in names)
        _, later = make(group, kind)
        for form in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle)), made):  # noqa: S301 - our own
            assert torch.equal(form.recv_src_metadata, handle.recv_src_metadata)
            for where in (buffer, later):
                out, _, _ = where.combine(y, form)
                assert torch.equal(out, want_sums(batch, r))
            again, *_, same, _ = later.dispatch(2 * batch.x[r], handle=form)
            assert same is form
            assert torch.equal(again[came], 2 * recv_x[came])
            out, home, _ = later.combine(y, form, topk_weights=recv_weights)
            assert torch.equal(home, batch.topk_weights[r].where(batch.topk_idx[r] >= 0, 0.0))
        buffer.destroy()
        out, _, _ = later.combine(y, handle)
        assert torch.equal(out, want_sums(batch, r))
        buffer = later
    with pytest.raises(ConfigError, match="pass the EPHandle"):
        buffer.combine(y, None)


@layouts
@kinds
def test_a_handle_serves_in_every_form(world, kind, expands):
    world.run(other_forms, kind, expands)


def few_specs(group):
    """Calls of all M up to a power of two, with the host and without, are one Spec's."""
    batch, buffer = make(group, "V2")
    for expands in (False, True):
        for num_tokens in (12, 16, 13, 11):
            for asks_host in (True, False):
                dispatched(buffer, batch, num_max_tokens_per_rank=num_tokens, do_cpu_sync=asks_host, do_expand=expands)
    return len(buffer._engine._buffers)


@pytest.mark.worlds("inproc-1", "inproc-2")
def test_calls_of_several_m_share_a_spec(world):
    assert set(world.run(few_specs)) == {2}
