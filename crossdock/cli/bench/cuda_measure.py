"""What each rank of a benchmark on GPUs does: compare, eagerly and in graphs, then time. Nothing wrong is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from crossdock.cli.bench.config import Job
from crossdock.cli.bench.cuda_cases import CudaCase, Results, open_cuda_cases, result_bits
from crossdock.cli.bench.limits import Move, copies, writes
from crossdock.cli.bench.measure import check_bits
from crossdock.cli.bench.samples import Moved, OnGpu, RankSamples, Sample
from crossdock.cli.bench.traffic import traffic
from crossdock.cli.line import StartingLine
from crossdock.cli.world import Member
from crossdock.errors import ConfigError

CALLS = 10
"""In a row for one sample: in a graph, or one after the other from Python."""
WARM_UPS = 2
_LEADS = 4
"""Replays ahead of the one that is timed; by its turn all hosts have launched it."""
_TRIPS = 200
"""Of a word in a row for one sample."""


def measure_on_gpus(member: Member, job: Job) -> RankSamples:
    """Compares every operation with the baseline on CPU copies, then times ``job.repeats`` batches of CALLS of each.

    All ranks begin a batch together. Its time is that between two CUDA events on the rank's stream, over CALLS; where a
    rank waits for a slow one, that is in its time. A graph is timed right behind other replays, in the first of which
    ranks wait for the one that began last: hosts start them up to 0.1 ms apart, as long as ten calls of a token take.

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
        ways, destinations = _ways(member, job)
        progress = _Progress(member, total=len(cases) + len(sweep) + sum(map(len, ways)))
        copied, written = ([_moved(member.line, way, job.repeats, progress) for way in kind] for kind in ways)
        del ways  # and with them gigabytes
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
    """Those to copy and those to write, and to how many places: those of a token in a dispatch, on average."""
    picks = torch.from_numpy(job.topk_idx).view(member.num_ranks, -1, job.spec.num_topk)
    num_sent = sum(traffic(job.spec, picks, rank).out_sent for rank in range(member.num_ranks))
    destinations = max(1, round(num_sent / max(1, len(job.topk_idx))))
    return (copies(member.device), writes(member.device, job.spec.row_bytes(), destinations=destinations)), destinations


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
    """A graph of CALLS calls, and the results of the last, there when it has been replayed."""
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
    )


def _moved(line: StartingLine, move: Move, repeats: int, progress: _Progress) -> Moved:
    seconds = _seconds(line, lambda: _in_a_row(move.run), repeats)
    progress.step()
    return Moved(num_bytes=move.num_bytes, seconds=seconds, how=move.how)


def _in_a_row(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _seconds(line: StartingLine, batch: Callable[[], object], repeats: int, *, leads: bool = False) -> list[float]:
    """Of each call in a batch, for ``repeats`` batches that all ranks begin together, or right behind others."""
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
