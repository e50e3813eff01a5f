"""One connection, several Specs over it: their rows, their bytes, their order, and what is refused."""

import os
import re
import threading

import pytest
import torch

from crossdock import (
    Arena,
    Buffer,
    ConfigError,
    Connection,
    Expanded,
    Fp8,
    Fp32,
    NotSupported,
    Padded,
    PeerFailed,
    Spec,
    Topology,
    TransportError,
    run_local,
)
from crossdock.transport.base import group_of, raise_on_all
from tests import oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.world import meet, open_connection
from tests.worlds.test_setup import rank_of

SPECS = (
    Spec(num_experts=24, num_topk=3, hidden=37, max_tokens=9, wire=Fp32(), layout=Expanded(alignment=4), num_slots=2),
    Spec(num_experts=12, num_topk=2, hidden=16, max_tokens=5, wire=Fp8(block=8), layout=Padded(), combine_wire=Fp32()),
    Spec(num_experts=48, num_topk=4, hidden=24, max_tokens=3, wire=Fp32(), num_slots=3, reduce="rank"),
)
A, B, C = SPECS
ALL = "inproc-2", "processes-2", "processes-3", "interpreted-2"


def need(num_ranks, *specs):
    return sum(Arena(spec, Topology(num_ranks=num_ranks)).num_body_bytes + 8192 for spec in specs)


def cases_of(world, num_each=1):
    return [
        make_case(spec, [spec.max_tokens - i % 2 for i in range(world.num_ranks)], seed=seed)
        for seed in range(num_each)
        for spec in SPECS
    ]


def check_sums(cases, sums_by_rank):
    for i, case in enumerate(cases):
        wants = oracle.combined(case.spec, case.topk, case.flat_y())
        assert all(same_bits(sums[i], want) for sums, want in zip(sums_by_rank, wants, strict=True)), i


def take_turns(group, cases, num_bytes, exclusive):
    """Each case's rows and sums, in turn over one connection; and how many bytes that had."""
    with open_connection(group, num_bytes, max_experts=64) as connection:
        buffers = {spec: Buffer(connection, spec, exclusive=spec in exclusive) for spec in SPECS}
        rows, sums = [], []
        for case in cases:
            buffer, r = buffers[case.spec], connection.rank
            recv = buffer.dispatch(case.x[r], case.topk[r], rows="capacity" if case.spec is B else None)
            rows.append(observed(recv))
            sums.append(buffer.combine(case.y[r], recv.plan))
        connection.check()
        return rows, sums


@pytest.mark.worlds(*ALL)
@pytest.mark.parametrize("exclusive", [(), (B,), SPECS], ids=["shared", "one apart", "all apart"])
def test_specs_in_turn_bring_what_each_brings_alone(world, exclusive):
    cases = cases_of(world, 1 if world.kind == "interpreted" else 3)
    got = world.run(take_turns, cases, need(world.num_ranks, *SPECS), exclusive)
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for rows, _ in got], weights=False, extras=False)
    check_sums(cases, [sums for _, sums in got])


def see_what_is_stale(group, cases, num_bytes):
    """Rows of one Spec once another one's call has begun over the same bytes, and what is read of them then."""
    with open_connection(group, num_bytes, max_experts=64) as connection:
        a, b, apart = (Buffer(connection, spec, exclusive=spec is C) for spec in SPECS)
        r = connection.rank
        recv = a.dispatch(cases[0].x[r], cases[0].topk[r])
        rows, kept = observed(recv), recv.x.clone()
        apart.dispatch(cases[2].x[r], cases[2].topk[r])
        before = recv.is_stale, same_bits(recv.x, kept)
        b.dispatch(cases[1].x[r], cases[1].topk[r])
        with pytest.raises(ConfigError, match=r"stale.*or a call of another Spec over the same bytes"):
            observed(recv)
        after = recv.is_stale, same_bits(recv.src_idx, rows["src_idx"])  # read before the bytes were taken
        with pytest.raises((ConfigError, PeerFailed), match="y is stale"):
            a.combine(kept.set_(a._slots.rows("data", 0, kept.shape[0])), recv.plan)
        return before, after


@pytest.mark.worlds("inproc-2", "processes-2")
def test_rows_of_a_spec_are_stale_once_another_has_its_bytes(world):
    for before, after in world.run(see_what_is_stale, cases_of(world), need(world.num_ranks, *SPECS)):
        assert before == (False, True)
        assert after == (True, True)


def overlap(group, cases, num_bytes, exclusive):
    """Calls of two Specs that are started one before the other is waited for, or how that is refused."""
    with open_connection(group, num_bytes, max_experts=64) as connection:
        a, b = Buffer(connection, A), Buffer(connection, B, exclusive=exclusive)
        r = connection.rank
        started = a.dispatch_start(cases[0].x[r], cases[0].topk[r])
        text = ""
        if not exclusive:
            with pytest.raises((ConfigError, PeerFailed)) as raised:
                b.dispatch_start(cases[1].x[r], cases[1].topk[r])
            text = str(raised.value)
            started = a.dispatch_start(cases[0].x[r], cases[0].topk[r])
            recv = started.wait()
            rows = [observed(recv)]
        else:
            others = b.dispatch_start(cases[1].x[r], cases[1].topk[r])
            recv, other = started.wait(), others.wait()
            rows = [observed(recv), observed(other)]
        summing = a.combine_start(cases[0].y[r], recv.plan)
        other = b.dispatch(cases[1].x[r], cases[1].topk[r])  # finishes it, where bytes are shared
        rows.append(observed(other))
        return rows, [summing.wait(), b.combine(cases[1].y[r], other.plan)], text


@pytest.mark.worlds("inproc-2", "processes-2", "interpreted-2")
@pytest.mark.parametrize("exclusive", [False, True])
def test_calls_of_specs_overlap_where_these_lie_apart_and_are_finished_or_refused_elsewhere(world, exclusive):
    cases = cases_of(world)
    got = world.run(overlap, cases, need(world.num_ranks, *SPECS), exclusive)
    check_received(cases[0], [rows[0] for rows, _, _ in got], weights=False, extras=False)
    check_received(cases[1], [rows[-1] for rows, _, _ in got], weights=False, extras=False)
    check_sums(cases[:2], [sums for _, sums, _ in got])
    for _, _, text in got:
        assert exclusive or re.search(r"receive slot 0 of another Spec, over the same bytes, .*exclusive=True", text)


def call_different_specs(group, case, num_bytes):
    """Rank 0 dispatches by one Spec, the others by one that differs in nothing but the order of sums."""
    with open_connection(group, num_bytes, max_experts=64) as connection:
        other = Spec(**{**case.spec.__dict__, "reduce": "rank"})
        buffers = Buffer(connection, case.spec), Buffer(connection, other)
        mine = buffers[min(1, connection.rank)]
        r = connection.rank
        with pytest.raises(PeerFailed) as raised:
            mine.dispatch(case.x[r], case.topk[r])
        meet(group)
        return str(raised.value), observed(buffers[0].dispatch(case.x[r], case.topk[r]))


@pytest.mark.worlds("inproc-2", "processes-3", "interpreted-2")
def test_ranks_in_calls_of_different_specs_all_raise_and_go_on(world):
    case = make_case(A, [4] * world.num_ranks)
    got = world.run(call_different_specs, case, need(world.num_ranks, A, A))
    for text, _ in got:
        assert "is of another Spec than that of rank" in text
    check_received(case, [rows for _, rows in got], weights=False, extras=False)


def make_with(group, num_bytes, options, last):
    if rank_of(group) == last:
        num_bytes *= 2
    with open_connection(group, num_bytes, **options):
        return "made"


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize(
    ("options", "num_bytes", "differs", "says"),
    [
        ({}, 1 << 16, True, "the Connections of rank 0 and rank 1 differ in num_bytes: 65536 != 131072"),
        ({"max_experts": 0}, 1 << 16, False, "rank 0: max_experts=0; pass a positive integer"),
        ({"max_in_flight": 9}, 1 << 16, False, "rank 0: max_in_flight=9 calls; pass 1 to 6"),
        ({"topology": Topology(num_ranks=5)}, 1, False, "rank 0: the Topology has 5 ranks, the group 2"),
        ({}, -1, False, "rank 0: num_bytes=-1; pass bytes"),
        ({"timeout_s": 0}, 1, False, "rank 0: timeout_s=0; pass a positive number of seconds"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_ranks_that_differ_or_ask_for_what_cannot_be_are_refused_on_all(world, options, num_bytes, differs, says):
    for error in world.outcomes(make_with, num_bytes, options, 1 if differs else None):
        assert isinstance(error, ConfigError)
        assert str(error).startswith(says)


def refusal(call):
    try:
        call()
    except (ConfigError, NotSupported) as error:
        return str(error)
    return "done"


def lay_what_does_not_fit(group):
    with Connection(group, need(2, A) + 8192, max_experts=24, max_in_flight=2) as connection:
        texts = [
            refusal(lambda spec=spec, options=options: Buffer(connection, spec, **options))
            for spec, options in (
                (C, {}),
                (Spec(num_experts=4, num_topk=1, hidden=8, max_tokens=2, num_slots=3), {}),
                (Spec(num_experts=4, num_topk=1, hidden=4096, max_tokens=999), {}),
                ("a spec", {}),
                (A, {"timeout_s": 3}),
                (A, {"device": "cpu"}),
                (A, {"num_sms": 3}),
                (Spec(num_experts=5, num_topk=1, hidden=8, max_tokens=2), {}),
            )
        ]
        Buffer(connection, A)
        texts.append(refusal(lambda: Buffer(connection, A, exclusive=True)))
    texts += refusal(lambda: Buffer(connection, A)), refusal(connection.check)
    return [*texts, repr(connection).replace(f"rank={group.rank}", "rank=r")]


def test_a_spec_that_does_not_fit_says_what_there_is():
    texts, others = run_local(lay_what_does_not_fit, 2)
    assert texts == others
    for text, says in zip(
        texts,
        (
            "num_experts=48, and the connection was made for at most max_experts=24; make it with more",
            "num_slots=3, and the connection was made for at most max_in_flight=2 calls",
            "the Spec needs .* bytes, and the connection has .* that Specs share .*reserve",
            "spec is a str; pass a crossdock.Spec",
            "device, topology, rail, timeout_s and trace are the connection's",
            "device, topology, rail, timeout_s and trace are the connection's",
            "num_sms, expand and mover say how a GPU moves rows",
            "num_experts=5 is not divisible by num_ranks=2",
            "the Spec needs .* bytes, and the connection has .* that no other Spec lies in",
            "the connection is closed; make a new one",
            "the connection is closed; make a new one",
            r"Connection\(rank=r, num_ranks=2, .* bytes, closed\)",
        ),
        strict=True,
    ):
        assert re.match(says, text), text


def close_some(group, cases, num_bytes):
    """A Buffer that lay apart is closed: its rows are stale, its place is another's, and the others go on."""
    with Connection(group, num_bytes, max_experts=64) as connection:
        r = connection.rank
        shared, apart = Buffer(connection, A), Buffer(connection, B, exclusive=True)
        recv = apart.dispatch(cases[1].x[r], cases[1].topk[r])
        place = apart.arena.begin
        apart.close()
        apart.close()
        texts = [refusal(lambda: recv.x), refusal(lambda: apart.dispatch(cases[1].x[r], cases[1].topk[r]))]
        again = Buffer(connection, B, exclusive=True)
        assert again.arena.begin == place
        rows = [observed(again.dispatch(cases[1].x[r], cases[1].topk[r]))]
        with Buffer(connection, A) as same:  # of one Spec: plans are good for both
            plan = shared.dispatch(cases[0].x[r], cases[0].topk[r]).plan
            rows.append(observed(same.dispatch(cases[0].x[r], plan)))
        return [*texts, repr(apart)], rows


def test_a_buffer_that_is_closed_leaves_the_connection_to_the_others():
    cases = [make_case(spec, [3, 2]) for spec in SPECS]
    got = run_local(lambda group: close_some(group, cases, need(2, A, B)), 2)
    for texts, _ in got:
        assert "these rows are stale" in texts[0]
        assert texts[1] == "the buffer is closed; make a new one"
        assert texts[2].endswith("closed)")
    check_received(cases[1], [rows[0] for _, rows in got], weights=False, extras=False)
    check_received(cases[0], [rows[1] for _, rows in got], weights=False, extras=False)


def lose_a_rank(group, cases, num_bytes):
    with Connection(group, num_bytes, max_experts=64, timeout_s=20) as connection:
        a, b = Buffer(connection, A), Buffer(connection, B)
        meet(group)
        if connection.rank == 2:
            return None
        r = connection.rank
        with pytest.raises(PeerFailed):
            a.dispatch(cases[0].x[r], cases[0].topk[r])
        connection.mask(2)
        late = Buffer(connection, C)
        return [
            (buffer.masked, observed(buffer.dispatch(case.x[r], case.topk[r])))
            for buffer, case in zip((a, b, late), cases, strict=True)
        ]


def test_a_mask_is_that_of_all_specs_also_of_later_ones():
    cases = [make_case(spec, [3, 2, 3]) for spec in SPECS]
    got = run_local(lambda group: lose_a_rank(group, cases, need(3, *SPECS)), 3)
    for i, case in enumerate(cases):
        num_local = case.spec.num_experts // 3
        picks = torch.cat(case.topk[:2])
        for rank, mine in enumerate(got[:2]):
            masked, rows = mine[i]
            assert masked == (2,)
            assert rows["counts"].tolist() == [int((picks == rank * num_local + j).sum()) for j in range(num_local)]


def drop_and_fail(group, num_bytes):
    """An exception leaves the block of one Buffer on rank 0; the other rank, in a call of another one, hears of it."""
    with Connection(group, num_bytes, max_experts=64) as connection:
        a, b = Buffer(connection, A), Buffer(connection, A, exclusive=True)
        x, topk_idx = torch.ones(2, 37), torch.tensor([[0, 1, 2], [3, 4, 23]])
        text = ""
        try:
            if connection.rank == 0:
                with a:
                    int("of the user's")
            b.dispatch(x, topk_idx)
        except (ValueError, PeerFailed) as error:
            text = f"{type(error).__name__}: {error}"
        meet(group)
        return text, b.dispatch(x, topk_idx).num_rows is not None


def test_an_exception_in_the_block_of_one_buffer_is_told_in_calls_of_the_others():
    (own, own_ok), (told, told_ok) = run_local(lambda group: drop_and_fail(group, need(2, A, A)), 2)
    assert own.startswith("ValueError: invalid literal")
    assert told.startswith("PeerFailed: rank 0")
    assert "ValueError: invalid literal" in told
    assert own_ok
    assert told_ok


def grow(group, cases, num_bytes):
    """Rows and sums before and after the memory grew, by a plan of before; and what lay in a slot meanwhile."""
    with open_connection(group, need(group_size(group), A), max_experts=64) as connection:
        r = connection.rank
        a = Buffer(connection, A)
        recv = a.dispatch(cases[0].x[r], cases[0].topk[r])
        first = observed(recv)
        before = connection.num_bytes
        connection.reserve(num_bytes)
        connection.reserve(1)
        kept = same_bits(recv.x, first["data"])
        b, c = Buffer(connection, B, exclusive=True), Buffer(connection, C)
        rows, sums = [], []
        for buffer, case in zip((a, b, c), cases, strict=True):
            got = buffer.dispatch(case.x[r], recv.plan if buffer is a else case.topk[r])
            rows.append(observed(got))
            sums.append(buffer.combine(case.y[r], got.plan))
        return (before, connection.num_bytes, kept), rows, sums


def group_size(group):
    return group.size if isinstance(group.size, int) else group.size()


@pytest.mark.worlds("inproc-2", "processes-3")
def test_memory_grows_under_what_lies_in_it(world):
    cases, num_bytes = cases_of(world), need(world.num_ranks, *SPECS)
    got = world.run(grow, cases, num_bytes)
    for (before, after, kept), _, _ in got:
        assert before < num_bytes <= after < num_bytes + 4096
        assert kept
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for _, rows, _ in got], weights=False, extras=False)
    check_sums(cases, [sums for _, _, sums in got])


def ask_for(group, sizes):
    with open_connection(group, 1 << 20, max_experts=64) as connection:
        buffer = Buffer(connection, A)
        x, topk_idx = torch.ones(2, 37), torch.tensor([[0, 1, 2], [3, 4, 23]])
        texts = []
        for size in sizes:
            try:
                connection.reserve(size[connection.rank])
            except (ConfigError, TransportError) as error:
                texts.append(str(error))
        pending = buffer.dispatch_start(x, topk_idx) if connection.rank == 0 else None
        texts += [refusal(lambda: connection.reserve(1 << 21)), refusal(connection.release)]
        pending = pending or buffer.dispatch_start(x, topk_idx)
        return texts, connection.num_bytes, pending.wait().num_rows


@pytest.mark.worlds("processes-2")
def test_growing_is_refused_on_all_ranks_and_changes_nothing(world):
    for texts, num_bytes, num_rows in world.run(ask_for, [(-5, 1 << 20), (1 << 21, 1 << 22), (1 << 60, 1 << 60)]):
        for text, says in zip(
            texts,
            (
                "rank 0: num_bytes=-5; pass bytes",
                "rank 0 calls reserve(2097152), rank 1 reserve(4194304); pass the same on all ranks",
                "rank 0: ",
                "rank 0: 1 calls were started and not waited for",
                "rank 0: 1 calls were started and not waited for",
            ),
            strict=True,
        ):
            assert text.startswith(says), text
        assert "has no room for a segment of 1,152," in texts[2]
        assert (num_bytes, num_rows > 0) == (1 << 20, True)


def sleep_and_wake(group, case):
    """What the segment's file holds, by the system, before, during and after; rows behind that; and what is refused."""
    with open_connection(group, 64 << 20, max_experts=64) as connection:
        r, buffer = connection.rank, Buffer(connection, A)
        fd = connection.transport.segments._fds[r]
        texts = [refusal(connection.reacquire)]
        recv = buffer.dispatch(case.x[r], case.topk[r])
        held = [os.fstat(fd).st_blocks * 512]
        connection.release()
        held.append(os.fstat(fd).st_blocks * 512)
        texts += [refusal(lambda: buffer.dispatch(case.x[r], recv.plan)), refusal(connection.check), str(recv.is_stale)]
        connection.reacquire()
        held.append(os.fstat(fd).st_blocks * 512)
        return texts, held, observed(buffer.dispatch(case.x[r], recv.plan))


@pytest.mark.worlds("processes-2")
def test_memory_is_given_back_and_taken_again(world):
    case = make_case(A, [4, 3])
    got = world.run(sleep_and_wake, case)
    check_received(case, [rows for _, _, rows in got], weights=False, extras=False)
    for texts, held, _ in got:
        assert "was not released" in texts[0]
        assert texts[1] == texts[2] == "the connection's memory was released; call reacquire() on all ranks first"
        assert texts[3] == "True"
        assert held[0] > 64 << 20
        assert held[1] < 1 << 20
        assert held[2] == held[0]


def move_on_a_device(group, cases, num_bytes):
    """Rows and sums by plans of before, over memory that another took the place of, twice; and what is refused."""
    with open_connection(group, need(group_size(group), A), max_experts=64) as connection:
        r, rank_0 = connection.rank, connection.rank == 0
        a = Buffer(connection, A)
        recv = a.dispatch(cases[0].x[r], cases[0].topk[r])
        x, outputs = recv.x, recv.output_rows()
        outputs.copy_(cases[0].y[r])
        kept = x.clone()
        connection.consent._streams.has_captured = not rank_0
        texts = [refusal(lambda: connection.reserve(num_bytes)), refusal(connection.release)]
        connection.consent._streams.has_captured = False
        connection.reserve(1)  # there is more
        texts.append(str(recv.is_stale))
        map_segments, connection.transport._map_segments = connection.transport._map_segments, no_room_at_1(group)
        with pytest.raises(TransportError, match="rank 1: no room"):
            connection.reserve(num_bytes)
        connection.transport._map_segments = map_segments
        texts.append(str(recv.is_stale))
        connection.reserve(num_bytes)
        texts += [str(recv.is_stale), str(same_bits(x, kept))]
        sums = [a.combine(outputs, recv.plan)]  # of memory that is nobody's any more, but the tensor's
        b, c = Buffer(connection, B, exclusive=True), Buffer(connection, C)
        connection.release()
        texts += [refusal(lambda: a.dispatch(cases[0].x[r], recv.plan)), refusal(lambda: Buffer(connection, C))]
        held = connection.transport.segment.numel()
        connection.reacquire()
        rows = []
        for buffer, case in zip((a, b, c), cases, strict=True):
            got = buffer.dispatch(case.x[r], recv.plan if buffer is a else case.topk[r])
            rows.append(observed(got))
            out = got.output_rows()
            out.copy_(case.y[r])
            sums.append(buffer.combine(out, got.plan))
        return texts, (held, connection.control.num_bytes), rows, sums


def no_room_at_1(group):
    def map_segments(_):
        members = group_of(group)
        raise_on_all(members, "no room" if members.rank == 1 else None, TransportError)

    return map_segments


@pytest.mark.worlds("interpreted-2")
def test_on_a_device_other_memory_takes_the_place_of_the_one_there_is(world):
    cases = cases_of(world)
    check_moved(cases, world.run(move_on_a_device, cases, need(world.num_ranks, *SPECS)))


def check_moved(cases, got):
    released = "the connection's memory was released; call reacquire() on all ranks first"
    for texts, (held, control), _, _ in got:
        assert texts[0] == texts[1]
        assert texts[0].startswith("rank 1: calls may have been captured in a CUDA graph")
        assert texts[2:] == ["False", "False", "True", "True", released, released]
        assert held == control
    for i, case in enumerate(cases):
        check_received(case, [rows[i] for _, _, rows, _ in got], weights=False, extras=False)
    check_sums([cases[0], *cases], [sums for *_, sums in got])


def leave_in_a_child(group, num_bytes):
    """Rank 1 forks; the child leaves both blocks, as a program does that ends, and has no part in either."""
    x, topk_idx = torch.ones(2, 37), torch.tensor([[0, 1, 2], [3, 4, 23]])
    with Connection(group, num_bytes, max_experts=64) as connection, Buffer(connection, A) as buffer:
        buffer.dispatch(x, topk_idx)
        code = None
        if connection.rank == 1:
            child = os.fork()
            if not child:
                code = 3 * ("which was forked" in refusal(lambda: buffer.dispatch(x, topk_idx)))
                buffer.__exit__(SystemExit, SystemExit(0), None)
                connection.__exit__(SystemExit, SystemExit(0), None)
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, buffer.dispatch(x, topk_idx).num_rows > 0


@pytest.mark.worlds("processes-2")
def test_a_child_has_no_part_in_a_connection(world):
    assert world.run(leave_in_a_child, need(2, A)) == [(None, True), (3, True)]


def write_sums_into_a_slot(group, num_bytes):
    """A tensor for sums that lies where peers write, before and after the memory has grown: how it is refused."""
    x, topk_idx = torch.ones(2, 16), torch.tensor([[0, 1], [2, 3]])
    spec = Spec(num_experts=4, num_topk=2, hidden=16, max_tokens=4, wire=Fp32())
    with Connection(group, num_bytes, max_experts=64) as connection, Buffer(connection, spec) as buffer:
        texts = []
        for size in (1, 2 * num_bytes):
            connection.reserve(size)
            recv = buffer.dispatch(x, topk_idx)
            y, slot = recv.x.clone(), recv.output_rows()[:2]
            texts.append(refusal(lambda y=y, slot=slot, plan=recv.plan: buffer.combine(y, plan, out=slot)))
        return texts


def test_sums_are_not_written_where_peers_write_also_once_the_memory_has_grown():
    (before, after), *_ = run_local(lambda group: write_sums_into_a_slot(group, 1 << 20), 1)
    assert before == after
    assert before != "done"


def test_poison_waits_for_a_call_of_all_ranks_also_behind_one_that_failed():
    """Rank 1 is still pulling outputs of one Spec when a call of another, over the same bytes, has failed elsewhere."""
    small = Spec(num_experts=6, num_topk=2, hidden=16, max_tokens=4, wire=Fp32())
    large = Spec(num_experts=6, num_topk=2, hidden=256, max_tokens=64, wire=Fp32(), num_slots=1)
    case = make_case(small, [4, 4, 4])
    poisoned = [threading.Event() for _ in range(2)]

    def pull_late(sum_rows):
        def sums(*args, **options):
            assert all(event.wait(30) for event in poisoned)
            return sum_rows(*args, **options)

        return sums

    def program(group):
        r, x, picks = group.rank, torch.ones(2, 256), torch.tensor([[0, 5], [2, 3]])
        with Connection(group, need(3, small, large), max_experts=6) as connection:
            first, second = Buffer(connection, small), Buffer(connection, large, debug=True)
            recv = first.dispatch(case.x[r], case.topk[r])
            outputs = recv.output_rows().copy_(case.y[r])
            if r == 1:
                rows = first._backend._rows
                rows.sum_rows = pull_late(rows.sum_rows)
            out = first.combine(outputs, recv.plan)
            with pytest.raises((ConfigError, PeerFailed), match="x has shape"):
                second.dispatch(x if r != 2 else x[:, :5], picks)
            pending = second.dispatch_start(x, picks)
            if r != 1:
                poisoned[r // 2].set()
            pending.wait()
            return out

    wants = oracle.combined(small, case.topk, case.flat_y())
    for out, want in zip(run_local(program, 3), wants, strict=True):
        assert same_bits(out, want)
