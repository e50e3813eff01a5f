"""A rank's benchmark on GPUs: compares results, eagerly and in CUDA graphs, then times. Wrong results end it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crossdock.buffer import Buffer
from crossdock.cli.bench.config import Job
from crossdock.cli.bench.cuda_cases import CudaCase, Results, open_cuda_cases, result_bits
from crossdock.cli.bench.limits import COPIED_BYTES, Move, copies, loads, stores, writes
from crossdock.cli.bench.measure import check_bits
from crossdock.cli.bench.samples import Moved, OnGpu, RankSamples, Sample
from crossdock.cli.bench.traffic import traffic
from crossdock.cli.line import StartingLine
from crossdock.cli.world import Member
from crossdock.errors import ConfigError
from crossdock.transport.device import DeviceTransport

CALLS = 10
"""Calls per sample, back to back: in one graph, or issued from Python."""
WARM_UPS = 2
_LEADS = 4
"""Replays before the timed one, so that every host has launched it before the GPUs reach it."""
_TRIPS = 200
"""Trips of a word per sample, back to back."""


def measure_on_gpus(member: Member, job: Job) -> RankSamples:
    """Compares every operation with the baseline on CPU copies, then times ``job.repeats`` batches of CALLS of each.

    All ranks begin a batch together. A sample is the time between two CUDA events on the rank's stream, divided by
    CALLS; it includes waiting for slower ranks. A graph is timed directly behind other replays, the first of which
    absorbs the skew between hosts: they start up to 0.1 ms apart, as long as ten calls of one token take.

    Raises:
        WrongRows: an operation gave other bits than the baseline.
        ConfigError: a sweep asks for more SMs than a rank sees.
    """
    visible = torch.cuda.get_device_properties(member.device).multi_processor_count
    if max(job.sweep_sms, default=0) > visible:
        raise ConfigError(
            f"sweep_sms={','.join(map(str, job.sweep_sms))}, and each rank sees {visible} SMs; pass at most that"
        )
    with open_cuda_cases(member, job) as (cases, sweep, buffer):
        for case in (*cases, *sweep):
            _compare(case, member.rank)
        of_memory, destinations = _ways(member, job)
        ways = (*of_memory, *_link_ways(member, buffer))
        progress = _Progress(member, total=len(cases) + len(sweep) + sum(map(len, ways)))
        copied, written, stored, loaded = (
            [_moved(member.line, way, job.repeats, progress) for way in kind] for kind in ways
        )
        del ways, of_memory  # frees gigabytes
        torch.cuda.empty_cache()
        samples, swept = (
            [_sample(member.line, case, job.repeats, progress) for case in kind] for kind in (cases, sweep)
        )
        trips_s = [
            seconds * CALLS / _TRIPS
            for seconds in _seconds(member.line, lambda: buffer.exchange_words(_TRIPS), job.repeats, leads=True)
        ]
        launch = str(buffer.launch)
    return RankSamples(
        samples=samples,
        copies=copied,
        writes=written,
        stores=stored,
        loads=loaded,
        sweep=swept,
        trips_s=trips_s,
        gpu=OnGpu(visible_sms=visible, launch=launch, destinations=destinations),
    )


@dataclass
class _Progress:
    member: Member
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        self.member.tell(self.done, self.total)


def _ways(member: Member, job: Job) -> tuple[tuple[list[Move], list[Move]], int]:
    """Ways to copy, ways to write, and the destinations of a written row: a token's average in a dispatch."""
    picks = torch.from_numpy(job.topk_idx).view(member.num_ranks, -1, job.spec.num_topk)
    num_sent = sum(traffic(job.spec, picks, rank).out_sent for rank in range(member.num_ranks))
    destinations = max(1, round(num_sent / max(1, len(job.topk_idx))))
    return (copies(member.device), writes(member.device, job.spec.row_bytes(), destinations=destinations)), destinations


def _link_ways(member: Member, buffer: Buffer) -> tuple[list[Move], list[Move]]:
    """Ways to store over the link and to load over it, where ranks do not share a GPU; between calls."""
    if not member.has_nccl:
        return [], []
    transport, arena = buffer.connection.transport, buffer.arena
    assert isinstance(transport, DeviceTransport), "ranks on GPUs"
    there = transport.views[(member.rank + 1) % member.num_ranks][arena.begin : arena.num_bytes][:COPIED_BYTES]
    here = torch.ones_like(there)
    return stores(here, there), loads(here, there)


def _compare(case: CudaCase, rank: int) -> None:
    what = f"{case.op}, {case.wire}, rank {rank}"
    call = case.ready()
    check_bits(result_bits(call(), case.spec), case.wanted, what=what)
    if case.in_graph:
        replay, results = _captured(call)
        replay()
        check_bits(result_bits(results, case.spec), case.wanted, what=f"{what}, call {CALLS} in a graph")
    torch.cuda.synchronize()


def _captured(call: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
    """A graph of CALLS calls as a replay function, and the last call's results, valid after a replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            results = call()
    return graph.replay, results


def _sample(line: StartingLine, case: CudaCase, repeats: int, progress: _Progress) -> Sample:
    call = case.ready()
    call()
    batch: Callable[[], object] = lambda: _in_a_row(call)  # noqa: E731 - a graph takes its place
    if case.in_graph:
        batch, _ = _captured(call)
    ours_s = _seconds(line, batch, repeats, leads=case.in_graph)
    baseline, baseline_s = case.baseline, []
    if baseline is not None:
        baseline_s = _seconds(line, lambda: _in_a_row(baseline), repeats)
    host_s = _host_seconds(line, call, repeats)
    progress.step()
    return Sample(
        op=case.op,
        wire=case.wire,
        num_bytes=case.num_bytes,
        link_bytes=case.link_bytes,
        copy_bytes=case.copy_bytes,
        write_bytes=case.write_bytes,
        ours_s=ours_s,
        baseline_s=baseline_s,
        calls=CALLS,
        num_sms=case.num_sms,
        host_s=host_s,
    )


def _moved(line: StartingLine, move: Move, repeats: int, progress: _Progress) -> Moved:
    seconds = _seconds(line, lambda: _in_a_row(move.run), repeats)
    progress.step()
    return Moved(num_bytes=move.num_bytes, seconds=seconds, how=move.how)


def _host_seconds(line: StartingLine, call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds inside single calls, all ranks' hosts together, nothing queued."""
    samples = []
    for _ in range(WARM_UPS + repeats):
        torch.cuda.synchronize()
        line.wait()
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return samples[WARM_UPS:]


def _in_a_row(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _seconds(line: StartingLine, batch: Callable[[], object], repeats: int, *, leads: bool = False) -> list[float]:
    """Seconds per call of ``repeats`` batches that all ranks begin together; with ``leads`` behind other batches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    samples = []
    for _ in range(WARM_UPS + repeats):
        torch.cuda.synchronize()
        line.wait()
        for _ in range(_LEADS if leads else 0):
            batch()
        begin.record()
        batch()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return samples[WARM_UPS:]
