"""Ranks of one host: segments mapped side by side, words as atomics. Shared by threads (inproc) and processes (shm)."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from crossdock.arena import REASON_BYTES, Control
from crossdock.errors import BackendUnavailable, NotSupported, TransportError
from crossdock.transport.base import Group, raise_on_all
from crossdock.transport.segments import Segments

_ACQUIRE, _RELEASE = 2, 3
_YIELDS = 2000
"""Polls that yield the core before a waiting rank starts to sleep: about two milliseconds."""
_NAP_S = 100e-6

Load = Callable[[int], int]
Store = Callable[[int, int], None]


def missing_atomics(machine: str) -> str | None:
    """What ranks that are processes lack on a machine without libatomic, named as ``platform.machine()`` does."""
    if machine in ("x86_64", "AMD64"):
        return None
    return (
        f"ranks of several processes need C11 atomics, and libatomic.so.1 was not found on this {machine} machine; "
        f"install it (Debian, Ubuntu: libatomic1; Fedora: libatomic)"
    )


def atomics(*, between_processes: bool) -> tuple[Load, Store]:
    """Load-acquire and store-release of the 8 bytes at an address.

    libatomic's where there is one. Without it, plain aligned accesses: on x86-64 they have that order in hardware; for
    threads of one process the interpreter's lock gives it anywhere.
    """
    try:
        lib = ctypes.CDLL("libatomic.so.1")
    except OSError:
        if between_processes and (problem := missing_atomics(platform.machine())):
            raise BackendUnavailable(problem) from None

        def plain_store(address: int, value: int) -> None:
            ctypes.c_int64.from_address(address).value = value

        return lambda address: ctypes.c_int64.from_address(address).value, plain_store
    load, store = lib.__getattr__("__atomic_load_8"), lib.__getattr__("__atomic_store_8")
    load.argtypes, load.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int64
    store.argtypes, store.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), None
    return lambda address: load(address, _ACQUIRE), lambda address, value: store(address, value, _RELEASE)


class HostTransport:
    """A rank among ranks whose segments this process can load from and store to.

    Args:
        segments: all ranks'.
        control: the words that each of them begins with.
        is_alive: tells whether a peer still exists.
        close: what to let go of.
        first: the rank whose segment is the first of them; other ranks than theirs are not reached here.
    """

    def __init__(
        self,
        segments: Segments,
        control: Control,
        *,
        rank: int,
        between_processes: bool,
        is_alive: Callable[[int], bool],
        close: Callable[[], None],
        first: int = 0,
    ) -> None:
        self.rank = rank
        self.first = first
        self.num_ranks = control.topology.num_ranks
        self.segments = segments
        self.is_alive = is_alive
        self.close = close
        self._load, self._store = atomics(between_processes=between_processes)
        self._words = segments.side_by_side()
        at, stride = self._words.memory.data_ptr(), self._words.stride
        self._segments = {first + i: at + i * stride for i in range(segments.num_ranks)}
        self.linger_s = 0.0
        self._control = control
        boxes = [name for name in control.regions if name != "counts"]
        self._offsets = {name: control[name].offset for name in boxes}
        self._num_bytes = {name: control[name].num_bytes for name in boxes}
        self._yield: Callable[[], object] = getattr(ctypes.CDLL(None), "sched_yield", os.sched_yield)

    @property
    def segment(self) -> Tensor:
        """See Transport."""
        return self.segments.side_by_side().segment(self.rank - self.first, self.segments.num_bytes)

    def post(self, peer: int, box: str, index: int, value: int) -> None:
        """See Mailbox."""
        self._store(self._segments[peer] + self._offsets[box] + 8 * (index * self.num_ranks + self.rank), value)

    def load(self, box: str, index: int, sender: int) -> int:
        """See Mailbox."""
        return self._load(self._segments[self.rank] + self._offsets[box] + 8 * (index * self.num_ranks + sender))

    def leave(self, box: str, index: int, sender: int, value: int) -> None:
        """Writes into this rank's own box what a sender that maps no memory here has posted by a message."""
        self._store(self._segments[self.rank] + self._offsets[box] + 8 * (index * self.num_ranks + sender), value)

    def leave_reason(self, sender: int, text: bytes) -> None:
        """The same of a reason."""
        ctypes.memmove(self._reason(self.rank, sender), text[:REASON_BYTES].ljust(REASON_BYTES, b"\0"), REASON_BYTES)

    def write_reason(self, peer: int, text: bytes) -> None:
        """See Mailbox."""
        text = text[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
        ctypes.memmove(self._reason(peer, self.rank), text, REASON_BYTES)

    def read_reason(self, sender: int) -> bytes:
        """See Mailbox."""
        return ctypes.string_at(self._reason(self.rank, sender), REASON_BYTES)

    def forget(self, box: str) -> None:
        """See Mailbox."""
        ctypes.memset(self._segments[self.rank] + self._offsets[box], 0, self._num_bytes[box])

    def mask(self, ranks: Sequence[int]) -> None:
        """See Transport."""
        self._control.forget_senders(self.segment, ranks)

    def grow(self, group: Group, num_bytes: int) -> bool:
        """See Transport. What was mapped before stays so: it is the same memory."""
        try:
            raise_on_all(group, self.segments.allocate(self.rank - self.first, num_bytes), TransportError)
        except TransportError:
            self.segments.cut(self.rank - self.first)
            raise
        self.segments.grew(num_bytes)
        return False

    def release(self, group: Group, first: int) -> bool:
        """See Transport."""
        raise_on_all(group, self.segments.punch(self.rank - self.first, first), NotSupported)
        return False

    def reacquire(self, group: Group) -> bool:
        """See Transport."""
        raise_on_all(group, self.segments.allocate(self.rank - self.first, self.segments.num_bytes), TransportError)
        return False

    def idle(self, num_polls: int) -> None:
        """Yields the core at first: there are often more ranks than cores, and 7 us beat 4 ms. Then sleeps."""
        if num_polls < _YIELDS:
            self._yield()
        else:
            time.sleep(_NAP_S)

    def _reason(self, at: int, sender: int) -> int:
        return self._segments[at] + self._offsets["reasons"] + sender * REASON_BYTES
