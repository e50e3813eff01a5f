"""Between each two ranks: how long a word takes, and how fast bytes go, while all other ranks wait.

Letters: P ranks. All functions are collective.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import combinations, count

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.arena import Arena
from crossdock.buffer import Buffer
from crossdock.cli.doctor.facts import Links
from crossdock.errors import CrossdockError, PeerTimeout
from crossdock.spec import Spec, Topology
from crossdock.transport import shm
from crossdock.transport.base import ProcessGroup
from crossdock.transport.host import HostTransport
from crossdock.wire import Fp32

_TRIPS, _REPEATS = 50, 5
_COPIED_BYTES = 4 * 2**20
_DEADLINE_S = 30.0
_BOX, _WORD = "words", 0
_NOT_MEASURED = float("nan")

Turns = tuple[bool, bool]
"""Which of the two halves of a round trip this rank sends in."""


def by_messages(what: str, device: torch.device) -> Links:
    """Through the default group's send and recv: gloo's of CPU tensors, NCCL's of CUDA tensors."""
    word, block = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (8, _COPIED_BYTES))

    def measure(peer: int, turns: Turns) -> tuple[float, float]:
        def trip(sent: Tensor) -> None:
            for is_mine in turns:
                dist.send(sent, peer) if is_mine else dist.recv(sent, peer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return _median_s(lambda: trip(word), _TRIPS) / 2, _median_s(lambda: trip(block), 1) / 2

    return _between_all(
        measure,
        transport=what,
        what_latency="us of a message of 8 bytes, one way",
        what_rate=f"GB/s of messages of {_COPIED_BYTES >> 20} MiB",
    )


def by_shared_memory() -> Links:
    """Through mapped segments, as a Buffer's words and rows go between processes.

    Raises:
        NotSupported: ranks are not processes of one host that share a memory file system.
        TransportError: it has no room.
    """
    group = ProcessGroup(None)
    spec = Spec(num_experts=group.size, num_topk=1, hidden=1024, max_tokens=_COPIED_BYTES // 4096, wire=Fp32())
    arena = Arena(spec, Topology(num_ranks=group.size))
    number = group.all_gather(int.from_bytes(os.urandom(6), "little"))[0]
    transport = shm.connect(group, arena.control_words, arena.num_bytes, name=f"crossdock-doctor-{number:x}")
    mapped = transport.segments.side_by_side()
    segments = [mapped.segment(rank, arena.num_bytes) for rank in range(group.size)]
    own = torch.ones(_COPIED_BYTES, dtype=torch.uint8)

    def measure(peer: int, turns: Turns) -> tuple[float, float]:
        sequences = count(1)

        def trip() -> None:
            sequence = next(sequences)
            for is_mine in turns:
                if is_mine:
                    transport.post(peer, _BOX, _WORD, sequence)
                else:
                    _await_word(transport, peer, sequence)

        place = arena.view(segments[peer], "data").view(torch.uint8).view(-1)[:_COPIED_BYTES]
        return _median_s(trip, _TRIPS) / 2, _median_s(lambda: place.copy_(own), 1)

    try:
        return _between_all(
            measure,
            transport="shared memory",
            what_latency="us of a word, one way",
            what_rate=f"GB/s that are stored in a peer's segment, {_COPIED_BYTES >> 20} MiB at a time; both at once",
        )
    finally:
        transport.close()


def by_kernels(device: torch.device) -> Links:
    """Words by a kernel, through segments that GPUs map. Each two ranks make a buffer of their own for it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = {pair: dist.new_group(list(pair)) for pair in combinations(range(size), 2)}  # all ranks make all groups
    spec = Spec(num_experts=2, num_topk=1, hidden=64, max_tokens=8, wire=Fp32())

    def measure(peer: int, _turns: Turns) -> tuple[float, float]:
        with Buffer(pairs[min(rank, peer), max(rank, peer)], spec, device=device) as buffer:
            return _median_s(lambda: _finish(lambda: buffer.exchange_words(_TRIPS), device), 1) / _TRIPS, _NOT_MEASURED

    return _between_all(
        measure,
        transport="kernels on GPUs",
        what_latency="us of a word that a kernel posts and a peer's kernel awaits, one way",
        what_rate="",
    )


def _finish(run: Callable[[], object], device: torch.device) -> None:
    run()
    torch.cuda.synchronize(device)


def _await_word(transport: HostTransport, peer: int, sequence: int) -> None:
    deadline, num_polls = time.monotonic() + _DEADLINE_S, 0
    while transport.load(_BOX, _WORD, peer) != sequence:
        transport.idle(num_polls)
        num_polls += 1
        if time.monotonic() > deadline:
            raise PeerTimeout(peer, f"rank {peer} answered no word within {_DEADLINE_S:.0f} s")


def _between_all(
    measure: Callable[[int, Turns], tuple[float, float]], *, transport: str, what_latency: str, what_rate: str
) -> Links:
    """``measure(peer, turns)`` by both ranks of each pair in turn; it gives seconds of a word and of the block."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = [(_NOT_MEASURED, _NOT_MEASURED)] * size
    failed: CrossdockError | RuntimeError | None = None
    for low, high in combinations(range(size), 2):
        if rank in (low, high) and failed is None:
            peer = high if rank == low else low
            try:
                found[peer] = measure(peer, (rank == low, rank == high))
            except (CrossdockError, RuntimeError) as error:
                failed = error  # the others are awaited all the same: no rank may miss a barrier
        dist.barrier()
    if failed is not None:
        raise failed
    return _gathered(found, transport=transport, what_latency=what_latency, what_rate=what_rate)


def _gathered(found: list[tuple[float, float]], *, transport: str, what_latency: str, what_rate: str) -> Links:
    rows = ProcessGroup(None).all_gather(found)
    return Links(
        transport=transport,
        what_latency=what_latency,
        latency_us=[[_rounded(word_s * 1e6) for word_s, _ in row] for row in rows],
        what_rate=what_rate,
        gb_per_s=[[_rounded(_COPIED_BYTES / block_s / 1e9) for _, block_s in row] for row in rows] if what_rate else [],
    )


def _median_s(trip: Callable[[], object], num_trips: int) -> float:
    """Seconds of a trip: the median of some rows of trips, after one that is not counted."""
    return statistics.median(list(_timed(trip, num_trips))[1:])


def _timed(trip: Callable[[], object], num_trips: int) -> Iterator[float]:
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        for _ in range(num_trips):
            trip()
        yield (time.perf_counter() - began) / num_trips


def _rounded(value: float) -> float | None:
    return None if value != value else float(f"{value:.3g}")  # noqa: PLR0124 - NaN
