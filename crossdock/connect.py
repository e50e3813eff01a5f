"""What moves a buffer's rows: the transport, the backend and the consent that belong together on a device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch
import torch.distributed as dist

from crossdock.arena import Arena
from crossdock.backends.base import Backend, Launch, LaunchOptions
from crossdock.backends.cpu.calls import CpuBackend
from crossdock.consent import Consent
from crossdock.errors import BackendUnavailable, ConfigError
from crossdock.spec import Spec
from crossdock.transport import inproc, shm
from crossdock.transport.base import Group, ProcessGroup, Transport, raise_on_all

OLDEST_TRITON = (3, 6)


@dataclass(frozen=True, kw_only=True)
class Connected:
    """A rank's three parts, already connected to those of its peers."""

    transport: Transport
    backend: Backend
    consent: Consent
    launch: Launch | None
    """How kernels are launched; None on CPUs."""


def vet(
    members: Group,
    device: torch.device | str | None,
    spec: Spec,
    launch_options: LaunchOptions,
) -> tuple[torch.device, str | None]:
    """Where rows are moved, and what is wrong with what was asked for; the other ranks are to hear of it."""
    try:
        chosen = choose_device(members, device)
        if isinstance(spec, Spec):  # what else it may be is told later
            launch_options.check(spec, chosen)
    except ConfigError as error:
        return torch.device("cpu"), str(error)
    return chosen, None


def choose_device(members: Group, device: torch.device | str | None) -> torch.device:
    """Where rows are moved: as asked for; else on the current CUDA device if the process group is one for it."""
    if device is None:
        backend = str(dist.get_backend_config(members.process_group)) if isinstance(members, ProcessGroup) else ""
        device = "cuda" if "cuda:nccl" in backend or backend == "nccl" else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no torch device; pass 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={chosen}; rows are moved on 'cpu' or 'cuda'")
    index: int | None = chosen.index
    if chosen.type == "cuda" and index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if chosen.type == "cpu" else chosen


def connect(
    members: Group,
    arena: Arena,
    device: torch.device,
    launch_options: LaunchOptions,
    *,
    number: int,
    timeout_s: float,
) -> Connected:
    """Makes the parts and connects them to the peers'. Collective.

    Args:
        number: of the buffer, the same on all ranks and no other buffer's.
    """
    name = f"crossdock-{number:016x}"
    if device.type == "cpu":
        host = (
            inproc.connect(members, arena)
            if isinstance(members, inproc.ThreadGroup)
            else shm.connect(members, arena, name=name)
        )
        consent = Consent(host, rank=members.rank, num_ranks=members.size, ring=arena.ring)
        backend = CpuBackend(arena, host, consent, buffer_id=number)
        return Connected(transport=host, backend=backend, consent=consent, launch=None)
    raise_on_all(members, cuda_problem(device), BackendUnavailable)
    # Triton is not on every system, and torch's symmetric memory takes a while to import.
    from crossdock.backends.cuda import calls as cuda  # noqa: PLC0415
    from crossdock.transport import symmetric  # noqa: PLC0415

    peers = (
        inproc.connect_on_device(members, arena, device)
        if isinstance(members, inproc.ThreadGroup)
        else symmetric.connect(members, arena, device, name=name)
    )
    parts = cuda.connect(
        peers,
        arena,
        launch_options,
        buffer_id=number,
        timeout_s=timeout_s,
        ranks_on_gpus=members.all_gather(peers.ranks_here),
    )
    members.all_gather(None)  # kernels are loaded: no rank is kept waiting by a peer that compiles
    return Connected(transport=peers, backend=parts.backend, consent=parts.consent, launch=parts.backend.launch)


def cuda_problem(device: torch.device) -> str | None:
    """What a CUDA device lacks for moving rows: CUDA, the device itself, or Triton; None when nothing does."""
    if not torch.cuda.is_available():
        return f"device={device} needs CUDA, and torch.cuda.is_available() is False here; pass device='cpu'"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"device={device} does not exist; this process sees {torch.cuda.device_count()} GPUs"
    if (problem := triton_problem()) is not None:
        return f"device={device} needs {problem}"
    return None


def triton_problem() -> str | None:
    """What is wrong with the Triton that is installed, or that it is not; None when kernels can be compiled by it."""
    allowed = ".".join(map(str, OLDEST_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton {allowed} or newer, which is not installed; pip install triton"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH, or a vendor's under another name
        return None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST_TRITON:
        return f"Triton {allowed} or newer, and {found} is installed; pip install --upgrade triton"
    return None
