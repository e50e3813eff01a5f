"""What the operating system gives: memory that processes share, limits, the network, namespaces, variables."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from crossdock import _env
from crossdock.arena import Arena
from crossdock.cli.demo.model import Shape
from crossdock.cli.demo.rank import training_spec
from crossdock.cli.doctor.facts import Fact, Section
from crossdock.spec import Topology
from crossdock.transport import shm
from crossdock.transport.host import missing_atomics
from crossdock.transport.segments import unlink

_DEMO_RANKS, _DEMO_SEQUENCES = 4, 4
_FILES_PER_PEER = 4
"""A segment, and sockets of gloo; some to spare."""
_FILES_ALONE = 256
"""Python, torch and its libraries."""
_LARGEST_HOST = 64
"""Ranks."""
_NAMESPACES = ("ipc", "mnt", "net", "pid", "user")
_PREFIXES = (
    "CROSSDOCK_",
    "GLOO_",
    "UCX_",
    "NCCL_",
    "NVSHMEM_",
    "CUDA_",
    "TORCH_SYMM_MEM_",
    "OMP_NUM_THREADS",
    "TRITON_",
)


def host() -> Section:
    """What processes of this host have between them."""
    return Section(
        title="Host",
        facts=(_shm(), _atomics(), _open_files(), _locked_memory(), _threads(), *network(os.environ), _namespaces()),
    )


def variables(environ: Mapping[str, str]) -> Section:
    """Variables that change how ranks meet or run, those that are set.

    >>> variables({"GLOO_SOCKET_IFNAME": "lo", "HOME": "/root"}).facts[0].found
    'lo'
    """
    names = sorted(name for name in environ if name.startswith(_PREFIXES))
    return Section(
        title="Variables that are set",
        facts=tuple(Fact(name=name, found=environ[name], needed="", note=True) for name in names),
    )


def namespaces() -> dict[str, str]:
    """The kernel's names of the namespaces that this process is in; empty where it has none.

    Processes in different ``mnt`` or ``pid`` namespaces may not see the same ``/dev/shm``, or each other.
    """
    found = {}
    for name in _NAMESPACES:
        try:
            found[name] = str(Path(f"/proc/self/ns/{name}").readlink())
        except OSError:
            continue
    return found


def network(environ: Mapping[str, str]) -> tuple[Fact, ...]:
    """How gloo finds an address for this host."""
    interfaces = [name for _, name in socket.if_nameindex()]
    chosen = environ.get("GLOO_SOCKET_IFNAME")
    problem = None
    if chosen is not None and not set(chosen.split(",")) <= set(interfaces):
        problem = (
            f"GLOO_SOCKET_IFNAME={chosen} names no interface of this host; unset it, or set it to one of "
            f"{', '.join(interfaces)}"
        )
    name = socket.gethostname()
    if chosen is None:
        try:
            found = f"{name} is {socket.gethostbyname(name)}"
        except OSError:
            found = f"{name} has no address"
            problem = (
                f"gloo looks up the host's name, {name}, which has no address here; set GLOO_SOCKET_IFNAME to one of "
                f"{', '.join(interfaces)}"
            )
    else:
        found = f"GLOO_SOCKET_IFNAME={chosen}"
    return (Fact(name="network", found=found, needed="an address at which processes meet", problem=problem),)


def _shm() -> Fact:
    """Tries to allocate what the demo's ranks take, with the function that allocates their segments."""
    folder = _env.shm_dir()
    spec = training_spec(Shape(), _DEMO_SEQUENCES * Shape().context)
    num_bytes = _DEMO_RANKS * Arena(spec, Topology(num_ranks=_DEMO_RANKS)).num_bytes
    path, fds = folder / f"crossdock-doctor-{os.getpid()}", list[int]()
    try:
        problem = shm.allocate(path, num_bytes, fds)
    finally:
        unlink(path)
        for fd in fds:
            os.close(fd)
    try:
        usage = shutil.disk_usage(folder)
        found = f"{folder}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    except OSError:
        found = f"{folder} is not there"
    return Fact(
        name="shm",
        found=found,
        needed=f"a segment for each process; the demo's {_DEMO_RANKS} take {num_bytes / 2**20:,.0f} MiB",
        problem=problem,
    )


def _atomics() -> Fact:
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        there = False
    else:
        there = True
    return Fact(
        name="atomics",
        found="libatomic.so.1" if there else f"no libatomic.so.1 ({platform.machine()})",
        needed="words between processes; x86-64 does without it",
        problem=None if there else missing_atomics(platform.machine()),
    )


def _open_files() -> Fact:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_ALONE + _FILES_PER_PEER * _LARGEST_HOST
    enough = soft == resource.RLIM_INFINITY or soft >= needed
    return Fact(
        name="files",
        found=f"{_limit(soft)} open files, {_limit(hard)} at most",
        needed=f"{needed:,} for {_LARGEST_HOST} ranks: {_FILES_PER_PEER} for each peer of a buffer, and {_FILES_ALONE}",
        problem=None
        if enough
        else f"{soft:,} files may be open, {needed:,} are needed for {_LARGEST_HOST} ranks; ulimit -n {needed}",
    )


def _locked_memory() -> Fact:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Fact(
        name="memlock",
        found="unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 2**10:,} KiB",
        needed="nothing in this version; RDMA between hosts wants it unlimited",
        note=True,
    )


def _threads() -> Fact:
    cores, threads = _env.num_cores(), torch.get_num_threads()
    return Fact(
        name="threads",
        found=f"{cores} cores, {threads} threads of torch in a process",
        needed="cores divided by the ranks of this host (OMP_NUM_THREADS)",
        note=True,
    )


def _namespaces() -> Fact:
    """Whether this user can make network namespaces, in which one host plays several."""
    problem = "ip and unshare are not both on PATH; install iproute2 and util-linux"
    if shutil.which("ip") and (unshare := shutil.which("unshare")):
        done = subprocess.run([unshare, "--net", "true"], capture_output=True, text=True, timeout=20, check=False)
        problem = f"unshare --net: {done.stderr.strip()}; it takes root" if done.returncode else ""
    return Fact(
        name="namespaces",
        found="network namespaces can be made" if not problem else "network namespaces cannot be made",
        needed="nothing; tests of several hosts on one",
        problem=problem or None,
        note=True,
    )


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number:,}"
