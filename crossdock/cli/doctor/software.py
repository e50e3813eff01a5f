"""Packages: which are there, in which version, and what each enables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

import torch
import torch.distributed as dist

from crossdock.cli.doctor.facts import Fact, Section
from crossdock.connect import OLDEST_TRITON, cuda_problem, triton_problem
from crossdock.version import __version__

_ABSENT = "not installed"


def software() -> Section:
    """What Python can import here."""
    return Section(
        title="Software",
        facts=(
            Fact(name="crossdock", found=__version__, needed="itself"),
            Fact(name="python", found=platform.python_version(), needed="3.10 or newer"),
            Fact(name="torch", found=torch.__version__, needed="2.9 or newer"),
            _gloo(),
            _triton(),
            _compiler(),
            _cuda(),
            _nccl(),
            _unused("nvshmem", _version("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")),
            _unused("nixl", _version("nixl", "nixl-cu13", "nixl-cu12")),
            _cli(),
        ),
    )


def _gloo() -> Fact:
    there = dist.is_available() and dist.is_gloo_available()
    return Fact(
        name="gloo",
        found="in torch" if there else "not in torch",
        needed="ranks that are processes meet through it",
        problem=None if there else "this torch was built without gloo; install one of torch's own releases",
    )


def _triton() -> Fact:
    oldest = ".".join(map(str, OLDEST_TRITON))
    return Fact(
        name="triton",
        found=_version("triton", "pytorch-triton") or _ABSENT,
        needed=f"{oldest} or newer, for rows on GPUs",
        problem=_needs(triton_problem()),
    )


def _compiler() -> Fact:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return Fact(
        name="compiler",
        found=found or "none on PATH",
        needed="Triton builds its launcher with it, for rows on GPUs",
        problem=None if found else "no cc, gcc or clang on PATH; install one (Debian, Ubuntu: apt install gcc)",
    )


def _cuda() -> Fact:
    built = torch.version.cuda or torch.version.hip
    count = torch.cuda.device_count()
    return Fact(
        name="cuda",
        found=f"torch for {'CUDA' if torch.version.cuda else 'ROCm'} {built}, {count} GPUs"
        if built
        else "torch for CPUs",
        needed="rows on GPUs",
        problem=cuda_problem(torch.device("cuda", 0)),
    )


def _nccl() -> Fact:
    there = dist.is_available() and dist.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if there else ""  # type: ignore[no-untyped-call]
    return Fact(
        name="nccl",
        found=f"{version} in torch" if there else "not in torch",
        needed="nothing; bench's baseline where each rank has a GPU",
        problem=None if there else "this torch was built without NCCL; install one for CUDA",
    )


def _unused(name: str, version: str | None) -> Fact:
    """What a later version will use between hosts."""
    return Fact(
        name=name,
        found=version or _ABSENT,
        needed="nothing in this version, which moves rows within one host",
        problem=None if version else f"{name} is not installed",
        note=True,
    )


def _cli() -> Fact:
    names = ("rich", "plotly", "jinja2")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return Fact(
        name="cli",
        found=", ".join(f"{name} {_version(name)}" for name in names if name not in missing) or _ABSENT,
        needed="crossdock demo, bench and load",
        problem=f"{' and '.join(missing)} not installed; pip install 'crossdock[cli]'" if missing else None,
    )


def _needs(problem: str | None) -> str | None:
    return None if problem is None else f"rows on GPUs need {problem}"


def _version(*distributions: str) -> str | None:
    """Of the first that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
