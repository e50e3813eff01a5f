"""What connects ranks on a device: the transport and the consent that belong together, and backends over them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from crossdock import cost
from crossdock.arena import Arena, Control
from crossdock.backends.base import Backend, LaunchOptions
from crossdock.backends.cpu.calls import CpuBackend
from crossdock.backends.nodes.calls import NodesBackend
from crossdock.backends.nodes.consent import NodesConsent
from crossdock.consent import Consent
from crossdock.errors import BackendUnavailable, ConfigError, NotSupported
from crossdock.spec import Spec, Topology
from crossdock.transport import inproc, shm
from crossdock.transport.base import Group, NodeGroup, ProcessGroup, Transport, raise_on_all
from crossdock.transport.host import HostTransport
from crossdock.transport.nodes import NodesTransport
from crossdock.transport.rail import Engine

OLDEST_TRITON = (3, 6)


class Lay(Protocol):
    """Makes a backend for a Spec over segments that are mapped. Local."""

    def __call__(self, arena: Arena, launch_options: LaunchOptions, *, buffer_id: int) -> Backend:
        """See ``crossdock.Buffer``."""


@dataclass(frozen=True, kw_only=True)
class Connected:
    """A rank's parts that are the same for all Specs, already connected to those of its peers."""

    transport: Transport
    consent: Consent
    lay: Lay


def check_support(spec: Spec, device: torch.device, topology: Topology, *, over_rail: bool) -> None:
    """Raises NotSupported for what no backend of the device does; the same on all ranks."""
    if spec.is_staged and over_rail:
        raise NotSupported(
            f"{spec.layout} between nodes: rows are staged among ranks that share memory; pass staged=False"
        )
    if over_rail and device.type == "cuda":
        raise NotSupported("ranks of several nodes move rows on CPUs only, and device='cuda' was asked for")
    if over_rail and spec.reduce != "node":
        by_pick = spec.reduce == "token" and spec.layout.per_pick
        rows = spec.num_topk if by_pick else cost.ranks_per_token(spec, topology.num_ranks)
        nodes = cost.ranks_per_token(spec, topology.num_nodes)
        raise NotSupported(
            f"reduce={spec.reduce!r} between nodes would bring {rows:.2f} rows of a token home, and reduce='node' "
            f"brings {nodes:.2f}, one from each of {topology.num_nodes} nodes with a pick: pass reduce='node'"
        )
    if device.type == "cuda" and spec.reduce == "node":
        raise NotSupported(
            "reduce='node' is summed on CPUs only, and device='cuda' was asked for; pass reduce='rank' or 'token', or "
            "device='cpu'"
        )


def choose_device(members: Group, device: torch.device | str | None) -> torch.device:
    """Where rows are moved: as asked for; else on the current CUDA device if the process group is one for it."""
    if device is None:
        backend = str(dist.get_backend_config(members.process_group)) if isinstance(members, ProcessGroup) else ""
        device = "cuda" if "cuda:nccl" in backend or backend == "nccl" else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is no torch device; pass 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={chosen}; rows are moved on 'cpu' or 'cuda'")
    index: int | None = chosen.index
    if chosen.type == "cuda" and index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if chosen.type == "cpu" else chosen


def connect(
    members: Group,
    control: Control,
    num_bytes: int,
    device: torch.device,
    *,
    number: int,
    timeout_s: float,
    row_bytes: int = 1,
    consent_type: type[Consent] = Consent,
    nodes_consent_type: type[NodesConsent] = NodesConsent,
    rail_engine: Engine | None = None,
) -> Connected:
    """Makes the parts and connects them to the peers'. Collective.

    Args:
        num_bytes: of each rank's segment.
        number: of the connection, the same on all ranks and no other's.
        row_bytes: of the rows that are expected on CPUs, if that is known.
        consent_type: of ranks whose hosts give the words.
        nodes_consent_type: of ranks of several nodes.
        rail_engine: makes the rail, where there are several nodes that share no memory.
    """
    name = f"crossdock-{number:016x}"
    if rail_engine is not None:
        mates = NodeGroup(members, control.topology.node_size)
        host = _connect_host(mates, control, num_bytes, name=name, row_bytes=row_bytes)
        nodes = NodesTransport(host, rail_engine.connect(members, control.topology), control, rail_engine.box)
        words = nodes_consent_type(nodes, ring=control.ring)
        return Connected(transport=nodes, consent=words, lay=partial(NodesBackend, nodes, words))
    if device.type == "cpu":
        host = _connect_host(members, control, num_bytes, name=name, row_bytes=row_bytes)
        consent = consent_type(host, rank=members.rank, num_ranks=members.size, ring=control.ring)
        return Connected(transport=host, consent=consent, lay=partial(CpuBackend, host, consent))
    raise_on_all(members, cuda_problem(device), BackendUnavailable)
    # Triton is not on every system, and torch's symmetric memory takes a while to import.
    from crossdock.backends.cuda.calls import CudaCalls  # noqa: PLC0415
    from crossdock.transport import symmetric  # noqa: PLC0415

    peers = (
        inproc.connect_on_device(members, control, num_bytes, device)
        if isinstance(members, inproc.ThreadGroup)
        else symmetric.connect(members, control, num_bytes, device, name=name)
    )
    calls = CudaCalls(peers, control, timeout_s=timeout_s, ranks_on_gpus=members.all_gather(peers.ranks_here))
    return Connected(transport=peers, consent=calls.consent, lay=calls.lay)


def _connect_host(group: Group, control: Control, num_bytes: int, *, name: str, row_bytes: int) -> HostTransport:
    """Maps the memory of ranks of one host, threads or processes. Collective."""
    if isinstance(group, inproc.ThreadGroup) or (
        isinstance(group, NodeGroup) and isinstance(group.whole, inproc.ThreadGroup)
    ):
        return inproc.connect(group, control, num_bytes, row_bytes=row_bytes)
    return shm.connect(group, control, num_bytes, name=name, row_bytes=row_bytes)


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
