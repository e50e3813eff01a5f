"""GPUs of this host: memory, MPS, which can map which, and the rate of copies between them."""

from __future__ import annotations

import os
import shutil
import time
from itertools import permutations

import torch

from crossdock.cli.doctor.facts import Fact, Links, Section
from crossdock.cli.mps.daemon import check_daemon
from crossdock.cli.mps.sharing import CONTROL, PIPE_DIRECTORY
from crossdock.errors import ConfigError

_COPIED_BYTES = 256 * 2**20
_REPEATS = 5


def gpus() -> Section:
    """Those that torch sees, and how processes could share one."""
    return Section(title="GPUs", facts=(*map(_gpu, range(torch.cuda.device_count())), _mps()))


def links_between_gpus() -> Links | None:
    """Copies between each two GPUs by this one process, and whether one can map the other; None with fewer than two.

    The latency is that of a copy of 8 bytes, from its launch until the host knows that it is done. What a word of a
    kernel takes is measured by ranks (`crossdock.cli.doctor.group`).
    """
    count = torch.cuda.device_count()
    if count < 2:
        return None
    latency: list[list[float | None]] = [[None] * count for _ in range(count)]
    rate: list[list[float | None]] = [[None] * count for _ in range(count)]
    for source, target in permutations(range(count), 2):
        if torch.cuda.can_device_access_peer(source, target):
            latency[source][target] = round(_copy_s(source, target, 8) * 1e6, 1)
            rate[source][target] = round(_COPIED_BYTES / _copy_s(source, target, _COPIED_BYTES) / 1e9, 1)
    return Links(
        transport="copies between GPUs of one process",
        what_latency="us of a copy of 8 bytes, until the host knows; none where one cannot map the other's memory",
        latency_us=latency,
        what_rate=f"GB/s of a copy of {_COPIED_BYTES >> 20} MiB by a copy engine",
        gb_per_s=rate,
    )


def _gpu(index: int) -> Fact:
    properties = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        problem = f"the GPU gives no memory ({str(error).partition(chr(10))[0]}); see nvidia-smi"
        return Fact(name=f"gpu{index}", found=properties.name, needed="a context", problem=problem)
    return Fact(
        name=f"gpu{index}",
        found=f"{properties.name}, {properties.multi_processor_count} SMs, {free / 2**30:.0f} of "
        f"{total / 2**30:.0f} GiB free",
        needed="a segment for each rank; crossdock.Arena tells its bytes",
    )


def _mps() -> Fact:
    needed = "several ranks on one GPU at the same time"
    if PIPE_DIRECTORY in os.environ:
        folder = os.environ[PIPE_DIRECTORY]
        try:
            check_daemon(folder)
        except ConfigError as error:
            return Fact(name="mps", found=f"{PIPE_DIRECTORY}={folder}", needed=needed, problem=str(error))
        return Fact(name="mps", found=f"a daemon at {folder}", needed=needed)
    control = shutil.which(CONTROL)
    return Fact(
        name="mps",
        found=f"{control}; crossdock mps starts it" if control else f"no {CONTROL} on PATH",
        needed=needed,
        problem=None
        if control
        else f"{CONTROL} is not on PATH; it comes with NVIDIA's driver, in its compute utilities",
    )


def _copy_s(source: int, target: int, num_bytes: int) -> float:
    """The median of a few."""
    sent = torch.ones(num_bytes, dtype=torch.uint8, device=f"cuda:{source}")
    received = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{target}")
    seconds = []
    for _ in range(_REPEATS + 1):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        began = time.perf_counter()
        received.copy_(sent, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[_REPEATS // 2]
