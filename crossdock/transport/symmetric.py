"""Ranks that are processes on GPUs of one scale-up domain: torch symmetric memory, every segment mapped by every rank.

Several ranks may share one GPU; then use a process group that allows it, such as gloo's.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import _symmetric_memory as symmetric_memory

from crossdock import _env
from crossdock.arena import Control
from crossdock.errors import NotSupported, TransportError
from crossdock.transport.base import Group, ProcessGroup, raise_on_all
from crossdock.transport.device import DeviceTransport
from crossdock.transport.presence import Presence
from crossdock.transport.segments import unlink

_c10d: Any = _distributed_c10d
"""What torch's own Python makes process groups of, in all versions; their types have changed."""
_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


def connect(group: Group, control: Control, num_bytes: int, device: torch.device, *, name: str) -> DeviceTransport:
    """Allocates this rank's segment on its device and maps everybody's. Collective.

    Args:
        num_bytes: of each segment.
        name: what the file is called by which peers see that this process lives; no other buffer's.

    Raises:
        TransportError: a rank's segment could not be allocated; all ranks raise.
        NotSupported: a rank cannot map another's segment, so they are of no one scale-up domain; all ranks raise.
    """
    torch.cuda.set_device(device)
    ours = str(torch.cuda.get_device_properties(device).uuid)
    ranks_here = Counter(group.all_gather(ours))
    if max(ranks_here.values()) > 1:
        os.environ.setdefault(_OVERLAPPING, "1")  # torch looks there when ranks meet, and refuses without it
    names = (f"{name}-{i}" for i in itertools.count())

    def map_segments(num_bytes: int) -> list[torch.Tensor]:
        return _map(group, num_bytes, device, next(names))

    views = map_segments(num_bytes)
    presence = Presence(group, _env.shm_dir() / f"{name}-{group.rank}")
    transport = DeviceTransport(
        views,
        control,
        map_segments=map_segments,
        rank=group.rank,
        ranks_here=ranks_here[ours],
        is_alive=presence.is_alive,
        close=presence.close,
    )
    group.all_gather(None)  # nobody writes to a segment that its owner has still to zero
    return transport


def _map(group: Group, num_bytes: int, device: torch.device, name: str) -> list[torch.Tensor]:
    """A new segment of this rank's, zeroed, and everybody's. Collective.

    Args:
        name: no other segment's.

    Raises:
        TransportError, NotSupported: see ``connect``.
    """
    segment, problem = None, None
    try:
        segment = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        segment.zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        problem = (
            f"cannot allocate its segment of {num_bytes:,} bytes on {device} ({_first_line(error)}); pass a "
            f"smaller max_tokens or capacity=, or free memory"
        )
    raise_on_all(group, problem, TransportError)
    assert segment is not None
    store_path = _env.shm_dir() / f"{name}-store"
    views: list[torch.Tensor] = []
    try:
        handle = _rendezvous(group, segment, name, store_path)
        views = [
            segment if rank == group.rank else handle.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(group.size)
        ]
    except RuntimeError as error:
        problem = (
            f"cannot map the segments of its peers ({_first_line(error)}): GPUs must be of one scale-up domain "
            f"(NVLink, or one GPU that processes share)"
        )
    try:
        raise_on_all(group, problem, NotSupported)
    finally:
        unlink(store_path)  # everybody has read it by now
    return views


def _rendezvous(group: Group, segment: torch.Tensor, name: str, store_path: Path) -> Any:
    """Maps everybody's segments, through whatever group there is. Collective."""
    if isinstance(group, ProcessGroup):
        of_torch = group.process_group or dist.distributed_c10d._get_default_group()
        return symmetric_memory.rendezvous(segment, of_torch)
    with as_torchs(group, name, store_path) as store:
        try:
            return _c10d._SymmetricMemory.rendezvous(segment, name)
        except RuntimeError as error:
            if "no group info" not in str(error):
                raise
            # Before it looked for process groups, torch wanted to be told; nothing has been exchanged by then.
            _c10d._SymmetricMemory.set_group_info(name, group.rank, group.size, store)
            return _c10d._SymmetricMemory.rendezvous(segment, name)


@contextmanager
def as_torchs(group: Group, name: str, path: Path) -> Iterator[Any]:
    """A process group of torch's with that name, of the ranks of any group, until it ends; gives its store.

    It has no backend, and moves nothing: who asks for it gets rank, size and store.

    Args:
        path: of the store, a file that the ranks share.
    """
    store = _c10d.FileStore(str(path), group.size)
    made = _c10d.ProcessGroup(store, group.rank, group.size)
    made._set_group_name(name)
    _c10d._register_process_group(name, made)
    try:
        yield store
    finally:
        _c10d._unregister_process_group(name)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
