"""How long calls take, as DeepEP's test programs measure it; they import it from ``deep_ep.utils.testing``."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

_MIN_S = 1e-9
"""Programs divide by times."""


def bench(
    fn: Callable[[], Any], num_warmups: int = 5, num_tests: int = 20, post_fn: Callable[[], Any] | None = None, **_: Any
) -> tuple[float, float, float]:
    """Mean, shortest and longest time of a call, in seconds of the device, or of the host where there is none."""
    for _warm_up in range(num_warmups):
        fn()
    times = []
    for _test in range(num_tests):
        times.append(_time(fn))
        if post_fn is not None:
            post_fn()
    kept = times[1:] or times
    return statistics.fmean(kept), min(kept), max(kept)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | Sequence[str],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
    **_: Any,
) -> Any:
    """The time of a call, in seconds, for each name that is given; never 0.

    Kernels have other names here than in DeepEP, so that the whole call stands for each: a tuple with as many times as
    names for several; and where two kernels are asked for per period, each name has a list of two halves of it.

    Args:
        barrier: called before each call, where all ranks are to begin together.
        trace_path: a file for torch's profiler to write.
    """
    meet = (
        barrier if barrier is not None else dist.barrier if barrier_comm_profiling and dist.is_initialized() else None
    )
    quiet = _silence() if suppress_kineto_output else nullcontext()
    with quiet, _profiled(trace_path):
        times = []
        for _test in range(num_tests):
            if meet is not None:
                meet()
            times.append(_time(fn))
    mean = statistics.fmean(times[1:] or times)
    each: Any = mean
    if num_kernels_per_period > 1:
        each = [mean / num_kernels_per_period] * num_kernels_per_period
    return each if isinstance(kernel_names, str) else tuple(each for _name in kernel_names)


def _time(fn: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        fn()
        return max(time.perf_counter() - began, _MIN_S)
    begin, end = (torch.cuda.Event(enable_timing=True) for _end in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return max(float(begin.elapsed_time(end)) / 1e3, _MIN_S)


@contextmanager
def _profiled(path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(path)


@contextmanager
def _silence() -> Iterator[None]:
    """What is printed meanwhile, also by libraries, is not seen."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
