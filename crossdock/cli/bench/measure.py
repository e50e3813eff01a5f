"""A rank's benchmark on CPUs: compares results, then times. A wrong result ends it untimed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crossdock.cli.bench.cases import Case, bits, open_cases
from crossdock.cli.bench.config import Job
from crossdock.cli.bench.samples import Moved, RankSamples, Sample
from crossdock.cli.line import StartingLine
from crossdock.cli.world import Member
from crossdock.errors import CrossdockError
from crossdock.spec import Spec

WARM_UPS = 2
BLOCK = 5
"""Calls of one kind back to back. If sides alternated after each call, each would run on the other's caches."""
COPIED_BYTES = 64 * 2**20
"""Bytes that each rank copies to find the limit, between two blocks of that size: well beyond the caches."""


class WrongRows(CrossdockError):
    """An operation's result differs from its baseline's."""


def measure(member: Member, job: Job) -> RankSamples:
    """Compares every operation with its baseline, then times both, ``job.repeats`` calls each.

    Blocks of calls of the operation, its baseline and a plain copy by all ranks alternate, so that a slower machine
    slows all three. Ranks start together and each times its own call, which includes waiting for slower ranks. A copy
    does not wait, so its time counts from the common start.

    Raises:
        WrongRows: an operation gave other bits than its baseline.
    """
    copy, copied_bytes = _copy(job.spec)
    with open_cases(job) as cases:
        ours: list[list[float]] = [[] for _ in cases]
        baselines: list[list[float]] = [[] for _ in cases]
        copy_s: list[float] = []
        for case in cases:
            _compare(case, job.spec, member.rank)
        total = WARM_UPS + job.repeats
        while len(copy_s) < total:
            block = range(min(BLOCK, total - len(copy_s)) if copy_s else WARM_UPS)
            for i, case in enumerate(cases):
                baselines[i] += [_timed(member.line, case.baseline()) for _ in block]
                ours[i] += [_timed(member.line, case.ours()) for _ in block]
            copy_s += [_timed(member.line, copy, from_start=True) for _ in block]
            member.tell(len(copy_s), total)
    return RankSamples(
        samples=[_sample(*of_case) for of_case in zip(cases, ours, baselines, strict=True)],
        copies=[Moved(num_bytes=copied_bytes, seconds=copy_s[WARM_UPS:])],
    )


def _copy(spec: Spec) -> tuple[Callable[[], Tensor], int]:
    """A ``copy_`` of one block from ordinary to shared memory, and its bytes.

    One block is the fastest way for a rank to write rows: the C library uses streaming stores. Both blocks have been
    touched before.
    """
    dtype = spec.combine_dtype
    num_rows = max(1, COPIED_BYTES // (spec.hidden * dtype.itemsize))
    source = torch.ones(num_rows, spec.hidden, dtype=dtype)
    destination = torch.zeros_like(source)
    destination.share_memory_()  # type: ignore[no-untyped-call]
    return lambda: destination.copy_(source), source.nbytes


def _timed(line: StartingLine, call: Callable[[], object], *, from_start: bool = False) -> float:
    start = line.wait()
    began = start if from_start else time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - began
    del result  # freed after the clock has been read
    return elapsed


def _compare(case: Case, spec: Spec, rank: int) -> None:
    wanted = [part.clone() for part in bits(case.baseline()(), spec)]
    check_bits(bits(case.ours()(), spec), wanted, what=f"{case.op}, {case.wire}, rank {rank}")


def check_bits(got: Sequence[Tensor], wanted: Sequence[Tensor], *, what: str) -> None:
    """Compares rows of bytes [R, ...], by part (data, scales), with the baseline's.

    Raises:
        WrongRows: shapes or bytes differ.
    """
    for name, mine, theirs in zip(("row", "scales of row"), got, wanted, strict=False):
        if mine.shape != theirs.shape:
            wrong = f"{list(mine.shape)} bytes came, {list(theirs.shape)} with the baseline"
        elif not torch.equal(mine, theirs):
            row = int((mine != theirs).any(dim=1).nonzero()[0])
            wrong = f"{name} {row} of {len(theirs)} is not the baseline's, bit for bit"
        else:
            continue
        raise WrongRows(
            f"{what}: {wrong}; nothing was timed, and no figure of a wrong result is printed: report this with the "
            f"command line"
        )


def _sample(case: Case, ours_s: list[float], baseline_s: list[float]) -> Sample:
    return Sample(
        op=case.op,
        wire=case.wire,
        num_bytes=case.num_bytes,
        link_bytes=case.link_bytes,
        copy_bytes=case.copy_bytes,
        ours_s=ours_s[WARM_UPS:],
        baseline_s=baseline_s[WARM_UPS:],
    )
