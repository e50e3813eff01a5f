"""The fingerprint of a machine: hardware and software versions that belong to a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from crossdock._env import num_cores
from crossdock.version import __version__


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPUs of a machine, and the versions of driver, CUDA and Triton."""

    name: str
    count: int
    """GPUs that torch sees."""
    memory_gib: float
    """Memory of each GPU."""
    driver: str
    """Version of the kernel module; "unknown" without nvidia-smi."""
    cuda: str
    """Version of the CUDA toolkit that torch was built with."""
    triton: str | None

    def __str__(self) -> str:
        number = "" if self.count == 1 else f"{self.count} × "
        return (
            f"{number}{self.name}, {self.memory_gib:.0f} GiB, driver {self.driver}, CUDA {self.cuda}, "
            f"Triton {self.triton or 'not installed'}"
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The fingerprint in every line of results."""

    cpu: str
    cores: int
    """Cores that this process may run on."""
    memory_gib: float
    os: str
    python: str
    torch: str
    crossdock: str
    gpu: Gpu | None = None
    """None if no GPU was used."""

    def __str__(self) -> str:
        gpu = "" if self.gpu is None else f"{self.gpu}; "
        return (
            f"{gpu}{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, {self.os}, "
            f"Python {self.python}, torch {self.torch}, crossdock {self.crossdock}"
        )


def this_machine(*, with_gpu: bool = False) -> Machine:
    """The machine of this process, with its GPUs if ``with_gpu``, which initialises CUDA."""
    return Machine(
        cpu=_cpu_model(),
        cores=num_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        crossdock=__version__,
        gpu=_gpu() if with_gpu else None,
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _gpu() -> Gpu:
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        count=torch.cuda.device_count(),
        memory_gib=round(properties.total_memory / 2**30, 1),
        driver=_driver(),
        cuda=torch.version.cuda or "none",
        triton=_version("triton"),
    )


def _driver() -> str:
    if (smi := shutil.which("nvidia-smi")) is None:
        return "unknown"
    asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "unknown"
    return said.stdout.strip() if said.returncode == 0 else "unknown"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
