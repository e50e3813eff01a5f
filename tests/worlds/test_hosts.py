"""Ranks on hosts that are network namespaces, with slow links between them: bits, bytes on the link, failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import crossdock as cd
from crossdock import Bf16, Buffer, Compact, Expanded, Fp8, Spec, Topology
from crossdock.cli.trace.figures import measure
from crossdock.cli.trace.parts import read
from crossdock.routing import group_limited_topk
from tests import hosts, oracle
from tests.cases import check_received, make_case, observed, same_bits
from tests.child import HUNG_S
from tests.house.pages import ROOT, blocks_of, commands_of
from tests.world import NIXL

_PROBLEM = hosts.problem()
pytestmark = pytest.mark.skipif(_PROBLEM is not None, reason=str(_PROBLEM))
GRIDS = [(2, 2), (4, 1), (2, 4)]


def spec_of(layout, wire=None, **kwargs):
    kwargs = {"num_experts": 16, "num_topk": 4, "hidden": 1024, "max_tokens": 64} | kwargs
    return Spec(layout=layout, wire=wire or Bf16(), reduce="node", **kwargs)


def sent_in(call):
    """What the call gives, and the bytes that this host has sent over its link in it, once all ranks are done."""
    dist.barrier()
    before = hosts.sent_bytes()
    dist.barrier()  # no rank of the host sends rows before the others have looked
    result = call()
    dist.barrier()
    after = hosts.sent_bytes()
    dist.barrier()
    return result, after - before


def round_trips(group, cases, rail):
    """Of each case: rows, sums, and bytes of five dispatches and combines; and the topology that was found."""
    topology, got = Topology.of(group), []
    for case in cases:
        with Buffer(group, case.spec, topology=topology, rail=rail, timeout_s=100) as buffer:
            r = buffer.rank
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
            rows, plan = observed(recv), recv.plan
            out = buffer.combine(case.y[r], plan)

            def dispatches(buffer=buffer, case=case, r=r):
                for _ in range(5):
                    buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])

            def combines(buffer=buffer, case=case, r=r, plan=plan):
                for _ in range(5):
                    buffer.combine(case.y[r], plan)

            _, dispatched = sent_in(dispatches)
            _, combined = sent_in(combines)
            got.append((topology, rows, out, dispatched / 5, combined / 5))
    return got


def rows_over_link(case, nodes, local):
    """By host, the rows that its ranks send to other hosts: one for each token and host with a pick."""
    per_node = case.spec.num_experts // nodes
    counts = []
    for node in range(nodes):
        there = 0
        for topk in case.topk[node * local : (node + 1) * local]:
            homes = torch.where(topk >= 0, topk // per_node, node)
            there += sum(len(set(row) - {node}) for row in homes.tolist())
        counts.append(there)
    return counts


rails = pytest.mark.parametrize("rail", ["auto", NIXL])


@pytest.fixture(autouse=True)
def _only_the_link(monkeypatch):
    """Between network namespaces of one machine UCX would find ways around the link."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")


@rails
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_rows_cross_a_link_once_per_host_and_nothing_else_does(grid, rail):
    nodes, local = grid
    num_ranks = nodes * local
    specs = [spec_of(Compact()), spec_of(Expanded(), Fp8(block=128))]
    cases = [make_case(spec, [64] * num_ranks, seed=i) for i, spec in enumerate(specs)]
    with hosts.Hosts(nodes, local) as world:
        got = world.run(round_trips, cases, rail)
    for i, case in enumerate(cases):
        here = [mine[i] for mine in got]
        assert {topology for topology, *_ in here} == {Topology.grid(nodes=nodes, local=local)}
        check_received(case, [rows for _, rows, *_ in here], extras=False)
        want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=local)
        assert all(same_bits(out, mine) for (_, _, out, *_), mine in zip(here, want, strict=True))
        _check_bytes(case, nodes, local, [here[node * local][3:] for node in range(nodes)])


@pytest.mark.parametrize("layout", [Compact(), Expanded()], ids=repr)
def test_a_gate_that_picks_from_two_of_four_hosts_sends_fewer_rows_over_the_links(layout):
    """By as many as its own picks say: of each token to two hosts at most."""
    nodes, local = 4, 2
    spec = spec_of(layout, max_tokens=48, num_topk=6)
    scores = torch.rand(nodes * local, 48, 16, generator=torch.Generator().manual_seed(7))
    gates = [scores.topk(6, 2).indices, group_limited_topk(scores.flatten(0, 1), 6, num_groups=4, num_topk_groups=2)]
    picks = [gates[0], gates[1].topk_idx.view(nodes * local, 48, 6)]
    cases = [make_case(spec, [48] * nodes * local, picks=list(each)) for each in picks]
    with hosts.Hosts(nodes, local) as world:
        got = world.run(round_trips, cases, "auto")
    sent, counted = [], []
    for i, case in enumerate(cases):
        here = [mine[i] for mine in got]
        check_received(case, [rows for _, rows, *_ in here], extras=False)
        want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=local)
        assert all(same_bits(out, mine) for (_, _, out, *_), mine in zip(here, want, strict=True))
        of_hosts = [here[node * local][3:] for node in range(nodes)]
        _check_bytes(case, nodes, local, of_hosts)
        sent.append(sum(map(sum, of_hosts)))
        counted.append(sum(rows_over_link(case, nodes, local)))
    assert counted[1] <= 2 * 48 * nodes * local
    assert sent[1] / sent[0] == pytest.approx(counted[1] / counted[0], rel=0.05)
    assert counted[1] < 0.8 * counted[0]


def _check_bytes(case, nodes, local, of_hosts):
    """Bytes that each host has sent in a dispatch and in a combine, against the rows that its picks let cross."""
    num_topk = case.spec.num_topk
    ids = 4 * (1 + num_topk * (1 if case.spec.layout.per_pick else 2))  # source, weights, and picks
    going = case.spec.row_bytes() + ids + 4 * num_topk  # and places
    coming = case.spec.hidden * 2
    homes = rows_over_link(case, nodes, local)
    returned = [sum(_rows_back(case, nodes, local, node).values()) for node in range(nodes)]
    for node in range(nodes):
        dispatched, combined = of_hosts[node]
        for sent, rows, row_bytes in ((dispatched, homes[node], going), (combined, returned[node], coming)):
            bound = rows * row_bytes
            # Ethernet, IP and TCP have 66 of 1514 bytes; a note, an acknowledgement and gloo's words are small.
            room = 1.06 * bound + 1500 * local * (nodes - 1) + 66 * bound / 1448
            assert bound < sent < room, ((nodes, local), case.spec.wire, node, sent / bound)


def _rows_back(case, nodes, local, node):
    """By rank of other hosts, the sums that this host sends it: one for each of its tokens with a pick here."""
    per_node = case.spec.num_experts // nodes
    others = [rank for rank in range(nodes * local) if rank // local != node]
    return {rank: int(((case.topk[rank] >= 0) & (case.topk[rank] // per_node == node)).any(1).sum()) for rank in others}


def until_a_peer_is_gone(group, case, timeout_s, rail="auto"):
    """Calls until one fails; the error, and how long the failing call took."""
    with Buffer(group, case.spec, topology=Topology.of(group), rail=rail, timeout_s=timeout_s) as buffer:
        r = buffer.rank
        for i in range(10_000):
            began = time.monotonic()
            try:
                recv = buffer.dispatch(case.x[r], case.topk[r])
                buffer.combine(case.y[r], recv.plan)
            except cd.CrossdockError as error:
                return type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic() - began
            if i == 3:
                hosts.leave(f"warm-{r}")
    return None


@rails
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_all_name_a_rank_that_was_killed_or_stopped(how, rail):
    case = make_case(spec_of(Compact()), [64] * 4)
    victim = 3
    with hosts.Hosts(2, 2) as world:
        world.start(until_a_peer_is_gone, case, 4, rail)
        for rank in range(4):
            world.wait_for(f"warm-{rank}")
        world.signal(victim, how)
        outcomes = world.outcomes(of=range(3))
    for rank in range(3):
        kind, culprit, says, _ = outcomes[rank]
        assert (kind, culprit) == ("PeerTimeout", victim), (rank, outcomes[rank])
        assert f"rank {victim} (node 1, local 1)" in says


def through_a_break(group, case, rail):
    """Calls while the link is down for a while: late, and right."""
    with Buffer(group, case.spec, topology=Topology.of(group), rail=rail, timeout_s=40) as buffer:
        r = buffer.rank
        outs = []
        for i in range(40):
            recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
            outs.append((observed(recv), buffer.combine(case.y[r], recv.plan)))
            if i == 3:
                hosts.leave(f"warm-{r}")
        return outs[-1], all(same_bits(out, outs[0][1]) for _, out in outs)


@rails
def test_a_link_that_is_down_for_a_while_makes_calls_late_and_not_wrong(rail):
    case = make_case(spec_of(Compact()), [64] * 4)
    with hosts.Hosts(2, 2) as world:
        world.start(through_a_break, case, rail)
        world.wait_for("warm-0")
        with world.network.link_down(1):
            time.sleep(2)
        outcomes = world.outcomes()
    assert all(is_same for _, is_same in outcomes), outcomes
    check_received(case, [rows for (rows, _), _ in outcomes], extras=False)
    want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=2)
    assert all(same_bits(out, mine) for ((_, out), _), mine in zip(outcomes, want, strict=True))


def over_a_slow_link(group, case, rail):
    """Rows and sums of the last of some rounds, their seconds, and the bytes that this host has sent for them."""
    with Buffer(group, case.spec, topology=Topology.of(group), rail=rail, timeout_s=60) as buffer:
        r = buffer.rank

        def rounds():
            for _ in range(4):
                recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r])
                out = buffer.combine(case.y[r], recv.plan)
            return observed(recv), out

        began = time.monotonic()
        (rows, out), num_bytes = sent_in(rounds)
        return rows, out, time.monotonic() - began, num_bytes


@rails
def test_a_host_at_a_tenth_of_the_rate_makes_calls_late_and_not_wrong(rail):
    case = make_case(spec_of(Compact(), num_experts=12), [64] * 3)
    with hosts.Hosts(3, 1) as world:
        world.network.set_rate(2, "20mbit")
        outcomes = world.run(over_a_slow_link, case, rail)
    check_received(case, [rows for rows, *_ in outcomes], extras=False)
    want = oracle.combined(case.spec, case.topk, case.flat_y(), node_size=1)
    assert all(same_bits(out, mine) for (_, out, *_), mine in zip(outcomes, want, strict=True))
    *_, num_bytes = outcomes[2]
    at_least_s = (num_bytes - 2 * 131_072) / (20e6 / 8)  # what a token bucket has saved goes at once, and is sent on
    assert at_least_s > 0.1
    assert all(took > at_least_s for _, _, took, _ in outcomes)  # all wait for it


def traced(group, case, folder):
    """Calls to which the last rank comes late, over links on which a call's rows take some tenths of a second."""
    with Buffer(group, case.spec, topology=Topology.of(group), trace=folder, timeout_s=60) as buffer:
        r = buffer.rank
        for _ in range(3):
            if r == 3:
                time.sleep(0.5)
            recv = buffer.dispatch(case.x[r], case.topk[r])
            buffer.combine(case.y[r], recv.plan)


def test_a_trace_of_hosts_names_the_late_rank_and_measures_the_link(tmp_path):
    pytest.importorskip("rich")
    case = make_case(spec_of(Compact(), hidden=4096, max_tokens=128), [128] * 4)
    with hosts.Hosts(2, 2, rate="100mbit") as world:
        world.run(traced, case, str(tmp_path))
    trace = read(tmp_path)
    figures = measure(trace)
    assert figures.ranks[figures.slow_rank] == 3
    assert figures.waits[0, 3] > 0.75  # of three times 0.5 s, through its mate and its rail peer
    assert figures.clocks_within_s == 0  # namespaces of one machine have one clock
    over_link, in_memory = (np.nanmedian(figures.rates_over(hop)) for hop in ("scale_out", "scale_up"))
    assert 2e6 < over_link < 100e6 / 8 * 1.5  # both ranks of a host share it, and a token bucket may have saved some
    assert in_memory > 4 * over_link
    for part in trace.parts:
        assert all(line["landed"] and line["put"] for line in part.of("call"))


@rails
def test_a_link_that_stays_down_ends_in_an_error_over_that_axis(rail):
    case = make_case(spec_of(Compact()), [64] * 2)
    with hosts.Hosts(2, 1) as world:
        world.start(until_a_peer_is_gone, case, 3, rail)
        for rank in range(2):
            world.wait_for(f"warm-{rank}")
        with world.network.link_down(1):
            outcomes = world.outcomes()
    for rank, (kind, culprit, says, took) in enumerate(outcomes):
        assert (kind, culprit) == ("PeerTimeout", 1 - rank), outcomes
        assert "over scale_out within timeout_s=3" in says
        assert 2.5 < took < 20


def test_torchrun_over_two_hosts_from_the_words_of_the_page():
    """Each host has the command of docs/nodes.md, with its number and interface filled in."""
    blocks = [block.text for block in blocks_of((ROOT / "docs" / "nodes.md").read_text()) if block.kind == "console"]
    (shown,) = [shown for text in blocks for shown in commands_of(text) if "torchrun --nnodes 2" in shown.code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with hosts.Hosts(2, 2) as world:
        running = []
        for node in range(2):
            own_memory = "mount -t tmpfs tmpfs /dev/shm"  # a host has its own, and namespaces of networks do not
            variables = {
                "PATH": path,
                "NODE": str(node),
                "INTERFACE": world.network.link(node),
                "PYTHONPATH": str(ROOT),
            }
            command = [*world.network.inside(node), "bash", "-c", f"{own_memory} && {shown.code}"]
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | variables | {"OMP_NUM_THREADS": "1"}, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        said = [process.communicate(timeout=HUNG_S) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [out for out, _ in said] == [shown.said, ""]
