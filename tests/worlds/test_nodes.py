"""Two hops: bit for bit the rows of the flat path and the sums of ``reduce="node"``, whatever comes late."""

import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import crossdock as cd
from crossdock import (
    Bf16,
    CapacityError,
    Compact,
    ConfigError,
    Expanded,
    Fp8,
    Fp32,
    NotSupported,
    Opaque,
    Padded,
    PeerFailed,
    PeerTimeout,
    Spec,
    Topology,
    run_local,
)
from crossdock.backends.nodes.chunks import ChunkFormat
from crossdock.backends.nodes.outbound import Inbound
from crossdock.transport.base import group_of
from crossdock.transport.lanes import Lane
from crossdock.transport.rail import Box
from crossdock.transport.rails.dist import DistEngine
from crossdock.transport.rails.inproc import InprocEngine
from crossdock.transport.rails.nixl import NixlEngine
from tests import oracle
from tests.cases import EXTRA_BYTES, check_received, loads, make_case, observed, same_bits
from tests.child import HUNG_S
from tests.world import NIXL, meet, open_buffer, open_connection
from tests.worlds import test_combine, test_dispatch

LAYOUTS = [Compact(), Expanded(alignment=8), Padded()]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
grids = pytest.mark.worlds("grid-2x2", "grid-3x2", "grid-4x1", "dist-2x2", "nixl-2x2")
WIRES = [
    Bf16(),
    Fp32(),
    Fp8(block=8),
    Fp8(block=4, scale="ue8m0", packed=True, column_major=True),
    Opaque(dtype=torch.uint8, block=8, scale_dtype=torch.uint8),
]


def spec_of(layout, wire=None, **kwargs):
    kwargs = {"num_experts": 24, "num_topk": 4, "hidden": 24, "max_tokens": 9, "extra_bytes": EXTRA_BYTES} | kwargs
    return Spec(layout=layout, wire=wire or Bf16(), reduce="node", **kwargs)


@pytest.mark.worlds("grid-2x2")
@pytest.mark.parametrize("wire", WIRES, ids=repr)
@layouts
def test_brings_every_row_to_its_place(world, layout, wire):
    test_dispatch.check_each(world, loads(spec_of(layout, wire), world.num_ranks))


@pytest.mark.worlds("grid-3x2", "grid-4x1", "dist-2x2", "nixl-2x2")
@pytest.mark.parametrize(("wire", "layout"), list(zip(WIRES, LAYOUTS + LAYOUTS[:2], strict=True)), ids=repr)
def test_brings_every_row_to_its_place_among_other_nodes(world, layout, wire):
    test_dispatch.check_each(world, loads(spec_of(layout, wire), world.num_ranks))


@pytest.mark.worlds("grid-2x2", "grid-4x1", "dist-2x2", "nixl-2x2")
@pytest.mark.parametrize("wire", [Bf16(), Fp8(block=8)], ids=repr)
@layouts
def test_sums_each_node_first(world, layout, wire):
    cases = loads(spec_of(layout, wire), world.num_ranks)
    test_combine.check_each(world, cases, node_size=world.node_size)


def along_a_plan(group, case, rows):
    """Rows of a cached dispatch, of a copy, and of one that counts rows by the slot's capacity; weights travel too."""
    with open_buffer(group, case.spec, debug=True) as buffer:
        r = buffer.rank
        given = {"weights": case.weights[r], "extras": case.extras[r]}
        plan = buffer.dispatch(case.x[r], case.topk[r], rows=rows).plan
        pending = [buffer.dispatch_start(case.x[r], plan, **given, copy=True) for _ in range(2)]
        return [observed(each.wait()) for each in pending]


@pytest.mark.worlds("grid-2x2", "grid-3x2", "dist-2x2", "nixl-2x2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@layouts
def test_rows_go_along_a_plan_that_is_known(world, layout, rows):
    case = make_case(spec_of(layout), [9] * world.num_ranks)
    got = world.run(along_a_plan, case, rows)
    for i in range(2):
        check_received(case, [mine[i] for mine in got])


def in_flight(group, case):
    """Two dispatches, and then two combines, that are started before any is waited for."""
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        outs = []
        for _ in range(3):
            started = [buffer.dispatch_start(case.x[r], case.topk[r]) for _ in range(2)]
            plans = [each.wait().plan for each in started]
            combines = [buffer.combine_start(case.y[r], plan) for plan in plans]
            outs += [each.wait() for each in reversed(combines)]
        return outs


@pytest.mark.worlds("grid-2x2", "grid-3x2", "dist-2x2", "nixl-2x2")
@layouts
def test_calls_are_in_flight_together(world, layout):
    case = make_case(spec_of(layout), [9] * world.num_ranks)
    want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=world.node_size)
    for outs, mine in zip(world.run(in_flight, case), want, strict=True):
        assert len(outs) == 6
        assert all(same_bits(out, mine) for out in outs)


def trained(group, case, rail=True):
    """Outputs and gradients of two steps on one plan."""
    options = {} if rail else {"topology": Topology.grid(nodes=2, local=group.size // 2)}
    with open_buffer(group, case.spec, **options) as buffer:
        r = buffer.rank
        x = case.x[r].float().requires_grad_()
        weights = case.weights[r].clone().requires_grad_()
        recv = cd.autograd.dispatch(buffer, x, case.topk[r], weights=weights)
        row_weights = recv.weights if recv.weights.dim() == recv.x.dim() - 1 else recv.weights.sum(-1)
        out = cd.autograd.combine(buffer, recv.x * 3, recv, weights=row_weights)
        again = cd.autograd.dispatch(buffer, x * 2, recv.plan)
        out = out + cd.autograd.combine(buffer, again.x, again)
        (out * torch.arange(out.shape[1])).sum().backward()
        assert recv.plan.counts.shape == (group.size, buffer.arena.num_counts)
        return out.detach(), x.grad, weights.grad, recv.num_tokens_per_expert


@pytest.mark.worlds("grid-2x2")
@layouts
def test_gradients_are_those_of_one_domain(world, layout):
    case = make_case(spec_of(layout, Fp32(), extra_bytes=0), [9, 0, 5, 9])
    got = world.run(trained, case)
    want = run_local(lambda group: trained(group, case, rail=False), world.num_ranks)
    for mine, theirs in zip(got, want, strict=True):
        assert mine[1].abs().sum() > 0 or not mine[1].numel()
        assert mine[3].sum() > 0
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.worlds("grid-2x2", "grid-4x1")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@settings(max_examples=12)
@given(data=st.data())
def test_any_routing_arrives_as_on_one_domain(world, layout, data):
    token = st.lists(st.integers(-4, 7), min_size=3, max_size=3, unique_by=lambda e: e)
    topk = [
        torch.tensor(data.draw(st.lists(token, max_size=4)), dtype=torch.int64).view(-1, 3).clamp(min=-1)
        for _ in range(world.num_ranks)
    ]
    spec = spec_of(layout, num_experts=8, num_topk=3, max_tokens=4)
    base = make_case(spec, [len(idx) for idx in topk])
    case = replace(base, topk=topk)
    got = world.run(test_dispatch.dispatch_each, [case])
    check_received(case, [mine[0] for mine in got])


def overflowing(group, cases, rows):
    """Calls of which some do not fit; and the stats of those that do."""
    with open_buffer(group, cases[0].spec, timeout_s=10) as buffer:
        r, seen = buffer.rank, []
        for case in cases:
            try:
                recv = buffer.dispatch(case.x[r], case.topk[r], rows=rows)
                seen.append(recv.num_tokens_per_expert.sum().item())
                buffer.check()
            except CapacityError as error:
                seen.append(str(error))
        return seen


@pytest.mark.worlds("grid-2x2", "grid-3x2", "dist-2x2", "nixl-2x2")
@pytest.mark.parametrize("rows", ["exact", "capacity"])
@pytest.mark.parametrize("layout", [Compact(capacity=20), Expanded(capacity=20), Padded(capacity=8)], ids=repr)
def test_too_many_rows_raise_the_same_on_all_ranks(world, layout, rows):
    spec = spec_of(layout)
    few, many = [3] * world.num_ranks, [9] * world.num_ranks
    cases = [replace(make_case(replace(spec, layout=type(layout)()), n, picks=p), spec=spec) for n, p in (
        (few, "none"), (many, "one"), (few, "none"), (many, "one"), (few, "none"))]  # fmt: skip
    cases[1].topk[-1][:] = -1  # the last node has rows for nobody, and hears of it too
    flat = run_local(lambda group: overflow_flat(group, cases[1]), world.num_ranks)
    for seen in world.run(overflowing, cases, rows):
        errors = [each for each in seen if isinstance(each, str)]
        assert errors[0] == flat[0]
        assert len(errors) == 2
        assert [each for each in seen if not isinstance(each, str)] == [0] * (3 if rows == "exact" else 5)


def overflow_flat(group, case):
    with cd.Buffer(group, case.spec, rail=None) as buffer, pytest.raises(CapacityError) as caught:
        buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank], rows="exact")
    return str(caught.value)


def count_notes(group, case):
    """Notes of each call, and the longest."""
    with open_buffer(group, case.spec) as buffer:
        transport, r = buffer.connection.transport, buffer.rank
        lengths, tell = [], transport._rail.tell
        transport._rail.tell = lambda node, note: (lengths.append(len(note)), tell(node, note))
        counts = []
        for _ in range(5):
            before = len(lengths)
            recv = buffer.dispatch(case.x[r], case.topk[r])
            counts.append(len(lengths) - before)
            before = len(lengths)
            buffer.combine(case.y[r], recv.plan)
            counts.append(len(lengths) - before)
        return (
            counts,
            max(lengths),
            len(transport.rail_peers),
            len(transport.mates) - 1,
            transport.host.segments.num_ranks,
        )


@pytest.mark.worlds("grid-2x3", "grid-3x2", "grid-4x1")
def test_a_call_is_a_note_to_each_rail_peer(world):
    """With room for all rows: a box that is too small asks for more."""
    world = world.opening(rail=InprocEngine(box=Box(chunk_bytes=4096, num_chunks=8)))
    spec = spec_of(Expanded())
    case = make_case(spec, [9] * world.num_ranks)
    num_nodes = world.num_ranks // world.node_size
    for counts, longest, num_rail, num_mates, num_mapped in world.run(count_notes, case):
        assert counts == [num_nodes - 1] * 10
        assert longest <= 64 + 4 * (spec.num_experts // num_nodes + world.node_size)
        assert (num_rail, num_mates, num_mapped) == (num_nodes - 1, world.node_size - 1, world.node_size)


def settled_count():
    """Threads and open files, once these have been the same for a while."""
    seen = []
    while (len(seen) < 100 and len(set(seen[-8:])) != 1) or len(seen) < 8:
        gc.collect()
        seen.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))  # noqa: PTH208
        time.sleep(0.05)
    return seen[-1]


def drop_buffers(group, case, num_buffers):
    """What is left behind each buffer that was dropped."""
    counts = []
    for _ in range(num_buffers):
        buffer = open_buffer(group, case.spec)
        recv = buffer.dispatch(case.x[buffer.rank], case.topk[buffer.rank])
        buffer.combine(case.y[buffer.rank], recv.plan)
        del buffer, recv
        meet(group)
        counts.append(settled_count())
        meet(group)
    return counts


@pytest.mark.worlds("dist-2x2", "nixl-2x2")
def test_buffers_that_are_dropped_leave_no_threads_and_no_sockets(world):
    case = make_case(spec_of(Compact()), [9] * world.num_ranks)
    for counts in world.run(drop_buffers, case, 3):
        (threads, files), (threads_then, files_then) = counts[0], counts[-1]
        assert threads_then <= threads, counts
        assert files_then <= files + 2, counts


LEFT_OPEN = """
import os, sys, time
import torch, torch.distributed as dist
from crossdock import Buffer, Fp32, Spec, Topology

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=3)
spec = Spec(num_experts=3, num_topk=1, hidden=8, max_tokens=2, wire=Fp32(), reduce="node")
buffer = Buffer(None, spec, topology=Topology.grid(nodes=3, local=1), rail=sys.argv[3])
buffer.dispatch(torch.ones(1, 8), torch.tensor([[1 - rank % 2]]))
dist.barrier()
time.sleep(0.2 * rank)
if rank == 1 and not os.fork():
    sys.exit()  # as a data loader's worker may
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("rail", ["dist", NIXL])
def test_programs_may_end_with_buffers_over_nodes_open(tmp_path, rail):
    arguments = [sys.executable, "-c", LEFT_OPEN, str(tmp_path / "store")]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NIXL_LOG_LEVEL": "ERROR"}
    piped = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen([*arguments, str(rank), rail], env=environment, **piped) for rank in range(3)]
    for process in running:
        out, err = process.communicate(timeout=HUNG_S)
        assert (process.returncode, out, err) == (0, "done\n", "")


def rows_before_words(group, case, engine):
    """Chunks that a rank has put before anything has come from its rail peer."""
    engine.down = {1}
    with cd.Buffer(group, case.spec, topology=Topology.grid(nodes=2, local=1), rail=engine) as buffer:
        r = buffer.rank
        group.all_gather(None)
        pending = buffer.dispatch_start(case.x[r], case.topk[r]) if r == 0 else None
        num_put = [lane.num_put for lane in buffer.connection.transport.lanes.values()]
        group.all_gather(None)
        engine.down = set()
        (pending or buffer.dispatch_start(case.x[r], case.topk[r])).wait()
        return num_put


def test_rows_wait_for_nobodys_counts():
    case = make_case(spec_of(Compact(), num_experts=8), [9, 9])
    engine = InprocEngine()
    assert run_local(lambda group: rows_before_words(group, case, engine), 2) == [[1], [0]]


def failing(group, case, victim):
    """One rank gives up; then all go on."""
    with open_buffer(group, case.spec, timeout_s=20) as buffer:
        r = buffer.rank
        buffer.dispatch(case.x[r], case.topk[r])
        try:
            if r == victim:
                buffer.abort("it had enough")
                said = None
            else:
                for _ in range(3):
                    buffer.combine(case.y[r], buffer.dispatch(case.x[r], case.topk[r]).plan)
                said = "nothing"
        except PeerFailed as error:
            said = error.rank, error.reason
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        return said, observed(recv), buffer.combine(case.y[r], recv.plan)


@pytest.mark.worlds("grid-2x2", "grid-3x2", "dist-2x2", "nixl-2x2")
@layouts
def test_a_rank_that_gives_up_is_heard_by_all_and_the_next_call_works(world, layout):
    case = make_case(spec_of(layout), [9] * world.num_ranks)
    for victim in (0, world.num_ranks - 1):
        got = world.run(failing, case, victim)
        assert [said for said, *_ in got] == [
            None if r == victim else (victim, "it had enough") for r in range(world.num_ranks)
        ]
        check_received(case, [rows for _, rows, _ in got])
        want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=world.node_size)
        assert all(same_bits(out, mine) for (_, _, out), mine in zip(got, want, strict=True))


def hanging(group, case, victim):
    """One rank stays away from the second call until all have seen that."""
    with open_buffer(group, case.spec, timeout_s=1.5) as buffer:
        r = buffer.rank
        recv = buffer.dispatch(case.x[r], case.topk[r])
        said = None
        if r != victim:
            try:
                for _ in range(3):
                    buffer.combine(case.y[r], recv.plan)
                    recv = buffer.dispatch(case.x[r], case.topk[r])
            except PeerTimeout as error:
                said = error.rank, error.hop, str(error)
            except PeerFailed as error:
                said = error.rank, "failed", str(error)
        meet(group)
        buffer.restart()
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        return said, observed(recv)


@pytest.mark.worlds("grid-2x2", "grid-3x2")
def test_all_name_the_rank_that_hangs_and_restart_together(world):
    case = make_case(spec_of(Compact()), [9] * world.num_ranks)
    victim = world.num_ranks - 1
    got = world.run(hanging, case, victim)
    for rank, (said, _) in enumerate(got):
        if rank == victim:
            assert said is None
            continue
        assert said[0] == victim, (rank, said)
        assert said[1] in ("scale_up", "scale_out"), (rank, said)
        assert f"rank {victim} (node {victim // world.node_size}, local {victim % world.node_size})" in said[2]
    check_received(case, [rows for _, rows in got])


def late_chunks(group, case, engine):
    """A call fails while rows of it are under way; they come when the next call has begun."""
    with cd.Buffer(group, case.spec, topology=Topology.grid(nodes=2, local=1), rail=engine, timeout_s=1) as buffer:
        r = buffer.rank
        group.all_gather(None)
        if r == 0:
            engine.down = {0}
        group.all_gather(None)
        said = ""
        try:
            for _ in range(2):  # the first may do at the rank whose own messages are the late ones
                buffer.dispatch(case.x[r] + 1, case.topk[r])
        except PeerTimeout as error:
            said = str(error)
        group.all_gather(None)
        pending = buffer.dispatch_start(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        group.all_gather(None)
        engine.down = set()
        return said, observed(pending.wait())


@layouts
def test_rows_that_come_after_their_call_has_failed_are_skipped(layout):
    case = make_case(spec_of(layout, Fp32(), num_experts=8), [9, 9])
    engine = InprocEngine(box=Box(chunk_bytes=1024, num_chunks=2))
    got = run_local(lambda group: late_chunks(group, case, engine), 2)
    assert "rank 0 (node 0, local 0) did not begin this dispatch over scale_out within timeout_s=1" in got[1][0]
    assert "over scale_out within timeout_s=1" in got[0][0]  # to rank 0 it may seem that rank 1 makes no room
    check_received(case, [rows for _, rows in got])


class _Rail:
    """A rail on which chunks have landed."""

    def __init__(self, box, num_landed):
        self.inbox = torch.zeros(2, box.num_chunks, box.chunk_bytes, dtype=torch.uint8)
        self.outbox, self.num_landed = self.inbox.clone(), num_landed

    def landed(self, _):
        return self.num_landed

    def freed(self, *_):
        pass


def test_room_of_chunks_that_are_skipped_is_given_back_at_once():
    """They come when the next call has begun, whose rows wait for that leave."""
    box, told = Box(chunk_bytes=1024, num_chunks=2), []
    lane = Lane(_Rail(box, num_landed=2), box, 1)
    for chunk in lane._in:
        chunk[:16].view(torch.int64)[:] = torch.tensor([(1 << 32) + 3, 1])  # a row of call 3
    transport = SimpleNamespace(lanes={1: lane}, rail_peers={1: 1}, give_leave=lambda: told.append(lane.grant))
    coming = Inbound(transport, 2 << 32, [0, 5], ChunkFormat((8,)))
    assert not coming.take(lambda *_: pytest.fail("a row of another call"))
    assert told == [4]
    assert coming.waiting == [1]


def first_note(group, engine):
    """What rank 1 hears, which looks when rank 0 sends."""
    rail = engine.connect(group, Topology.grid(nodes=2, local=1))
    group.all_gather(None)
    if group.rank == 0:
        rail.tell(1, b"the first")
    else:
        rail.heard()
    group.all_gather(None)
    return [*rail.heard()]


def test_first_notes_are_heard_wherever_memory_is_collected():
    """What the collector ends may let other threads on, in the middle of making a list."""
    engine, at = InprocEngine(box=Box(chunk_bytes=1024, num_chunks=2)), gc.get_threshold()
    gc.callbacks.append(let_others_on := lambda *_: time.sleep(1e-5))
    gc.set_threshold(1)
    try:
        heard = [run_local(lambda group: first_note(group, engine), 2) for _ in range(40)]
    finally:
        gc.set_threshold(*at)
        gc.callbacks.remove(let_others_on)
    assert heard == [[[], [(0, b"the first")]]] * 40


def two_rails(group):
    """Of two processes that are a node each, with room for two chunks."""
    return DistEngine(box=Box(chunk_bytes=1024, num_chunks=2)).connect(group_of(group), Topology.grid(nodes=2, local=1))


def comes(is_there, seconds=10):
    """Whether something comes to be."""
    until = time.monotonic() + seconds
    while not is_there() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(is_there())


def chunks_after_the_end(group):
    """Rank 0 wants no more chunks; two come for which it has posted receives, and a note behind them."""
    rail, rank = two_rails(group), dist.get_rank(group)
    if rank == 0:
        rail._chunks[1].end()
    for _ in range(2):
        meet(group)
        if rank == 1:
            rail.put(0, 1024)
        elif not comes(lambda: rail.landed(1)):
            return "nothing has come"
    if rank == 1:
        rail.tell(0, b"behind")
    heard = rank == 1 or comes(rail.heard)
    meet(group)
    rail.close()
    return heard


@pytest.mark.worlds("processes-2")
def test_what_comes_behind_chunks_that_nobody_wants_is_heard(world):
    assert world.run(chunks_after_the_end) == [True, True]


def notes_after_goodbye(group):
    """Rank 0 leaves, which rank 1 answers in a thread, and goes on telling it things. How many it has sent."""
    rail, rank = two_rails(group), dist.get_rank(group)
    rail.tell(1 - rank, b"before")
    comes(rail.heard)
    meet(group)
    if rank == 0:
        rail.leave()
    for thread in rail._threads:
        thread.join(10)
    num_sent = len(rail._notes[1 - rank])
    rail.tell(1 - rank, b"after")
    rail.put(1 - rank, 1024)
    more = len(rail._notes[1 - rank]) - num_sent, rail.num_put(1 - rank)
    meet(group)
    rail.close()
    return num_sent, *more


@pytest.mark.worlds("processes-2")
def test_nothing_is_sent_behind_a_goodbye(world):
    """Its receives are gone: gloo would find it in the connection again and again, for as long as the process lives."""
    assert world.run(notes_after_goodbye) == [(2, 0, 1), (2, 0, 1)]


def left_by_a_child(group, case):
    """Rank 1 forks within the block, and the child leaves it, as a program does that ends."""
    with open_buffer(group, case.spec, timeout_s=10) as buffer:
        r = buffer.rank
        buffer.dispatch(case.x[r], case.topk[r])
        if r == 1 and (child := os.fork()) == 0:
            try:
                buffer.__exit__(SystemExit, SystemExit(0), None)
            finally:
                os._exit(0)
        elif r == 1:
            os.waitpid(child, 0)
        meet(group)
        recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
        return observed(recv)


@pytest.mark.worlds("dist-2x2")
def test_a_child_says_nothing_to_its_parents_rail_peers(world):
    case = make_case(spec_of(Compact()), [9] * 4)
    check_received(case, world.run(left_by_a_child, case))


def masking(group, case, gone):
    """The ranks of a node leave; the others go on without it."""
    buffer = open_buffer(group, case.spec, timeout_s=10)
    r = buffer.rank
    buffer.dispatch(case.x[r], case.topk[r])
    if r in gone:
        buffer.close()
        return None
    with buffer:
        buffer.mask(*gone)
        recv = buffer.dispatch(case.x[r], case.topk[r])
        out = buffer.combine(case.y[r][: recv.x.shape[0]] * 0 + 1, recv.plan)
        return recv.src_idx, out


@pytest.mark.worlds("grid-3x2", "grid-3x1")
def test_a_whole_node_is_masked(world):
    case = make_case(spec_of(Expanded(), Fp32()), [9] * world.num_ranks, picks="some")
    gone = tuple(range(world.node_size, 2 * world.node_size))
    got = world.run(masking, case, gone)
    num_local = case.spec.num_experts // world.num_ranks
    for rank, mine in enumerate(got):
        if rank in gone:
            assert mine is None
            continue
        src_idx, out = mine
        assert not {s // case.spec.max_tokens for s in src_idx.tolist()} & set(gone)
        left = [(e >= 0) & ~torch.isin(e // num_local, torch.tensor(gone)) for e in case.topk[rank]]
        assert out[:, 0].tolist() == [float(row.sum()) for row in left]


def masking_a_part(group, case):
    with open_buffer(group, case.spec, timeout_s=5) as buffer:
        buffer.mask(1)


@pytest.mark.worlds("grid-2x2")
def test_a_part_of_a_node_is_not_masked(world):
    outcomes = world.outcomes(masking_a_part, make_case(spec_of(Compact()), [1] * 4))
    for outcome in outcomes:
        assert isinstance(outcome, (ConfigError, PeerFailed))
        assert "whole nodes" in str(outcome)


def refused(group, reduce):
    spec = replace(spec_of(Expanded()), reduce=reduce)
    with open_buffer(group, spec):
        pass


@pytest.mark.worlds("grid-2x2")
@pytest.mark.parametrize(("reduce", "price"), [("token", "4.00 rows"), ("rank", "2.85 rows")])
def test_sums_elsewhere_are_refused_with_their_price(world, reduce, price):
    for outcome in world.outcomes(refused, reduce):
        assert isinstance(outcome, NotSupported)
        assert f"would bring {price} of a token home, and reduce='node' brings 1.91" in str(outcome)


def several_specs(group, cases):
    """Buffers of two Specs over one connection."""
    with open_connection(group, 1 << 22) as connection:
        buffers = [cd.Buffer(connection, case.spec) for case in cases]
        got = []
        for case, buffer in [*zip(cases, buffers, strict=True)] * 2:
            r = connection.rank
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
            got.append((observed(recv), buffer.combine(case.y[r], recv.plan)))
        return got


@pytest.mark.worlds("grid-2x2", "dist-2x2")
def test_specs_share_a_connection(world):
    cases = [make_case(spec_of(Compact()), [9] * 4), make_case(spec_of(Padded(), Fp8(block=8), max_tokens=4), [4] * 4)]
    got = world.run(several_specs, cases)
    for i in range(4):
        case = cases[i % 2]
        check_received(case, [mine[i][0] for mine in got])
        want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=2)
        assert all(same_bits(mine[i][1], out) for mine, out in zip(got, want, strict=True))


def counted(group, case):
    with open_buffer(group, case.spec) as buffer:
        r = buffer.rank
        counters = cd.Counters(num_tokens_per_expert=torch.zeros(6, dtype=torch.int64))
        if r == 3:
            time.sleep(0.3)
        buffer.dispatch(case.x[r], case.topk[r], counters=counters)
        return counters.num_tokens_per_expert, buffer.stats


@pytest.mark.worlds("grid-2x2")
def test_stats_count_tokens_and_waits(world):
    case = make_case(spec_of(Padded()), [9] * 4)
    wants = oracle.received(case.spec, case.topk, case.x)
    for rank, (counts, stats) in enumerate(world.run(counted, case)):
        assert counts.tolist() == wants[rank]["counts"].tolist() == stats.num_tokens_per_expert.tolist()
        if rank in (1, 2):  # its rail peer, and its mate
            assert stats.wait_s[3] > 0.1


def with_rail(group, rail):
    with cd.Buffer(group, spec_of(Compact()), topology=Topology.grid(nodes=2, local=1), rail=rail):
        pass


@pytest.mark.worlds("inproc-2", "processes-2")
def test_rails_that_cannot_be_are_refused_on_all_ranks(world):
    for outcome in world.outcomes(with_rail, "tcp"):
        assert isinstance(outcome, ConfigError)
        assert "rail='tcp'; pass 'auto', 'inproc', 'dist', 'nixl', an engine, or None for no rail" in str(outcome)
    of_others = "dist" if world.kind == "inproc" else "inproc"
    for outcome in world.outcomes(with_rail, of_others):
        assert isinstance(outcome, cd.BackendUnavailable)
        assert f"rank 0: rail='{of_others}'" in str(outcome)
    with mock.patch("crossdock.transport.rails.nixl._MODULES", ("no_such_nixl",)):
        says = NixlEngine().problem(None)
    assert says == "rail='nixl' needs NIXL, which is not installed; pip install 'crossdock[nixl]'"


def test_a_row_that_fits_no_chunk_is_refused_with_what_to_do():
    engine = InprocEngine(box=Box(chunk_bytes=1024, num_chunks=2))
    spec = spec_of(Compact(), hidden=1024, num_experts=4)

    def program(group):
        with cd.Buffer(group, spec, topology=Topology.grid(nodes=2, local=1), rail=engine):
            pass

    with pytest.raises(ConfigError, match=r"a row of 2,\d+ bytes does not fit a chunk of 1,024 bytes"):
        run_local(program, 2)
    with pytest.raises(ConfigError, match="pass at least 2, of 1024 bytes or more"):
        Box(num_chunks=1)
