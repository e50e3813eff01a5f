"""Ranks whose memory this GPU can load from and store to: segments by address, words as small copies.

Kernels give and read the words of a call themselves. What goes through here is what the host says: flags, reasons, that
a rank has left. It is slow (some ten microseconds a word) and rare.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crossdock.arena import REASON_BYTES, Control
from crossdock.transport.base import Group

_YIELDS = 20000
"""Polls that yield the core before a waiting rank starts to sleep: about twenty milliseconds."""
_NAP_S = 100e-6
_LINGER_S = 0.5
"""A process that was killed may end before its last kernel does."""


class DeviceTransport:
    """A rank among ranks whose segments kernels on this device can reach.

    Args:
        views: every rank's segment, uint8, as this device maps it.
        map_segments: makes others, zeroed, of so many bytes each. Collective; raises TransportError on all ranks where
            one has no room.
        control: the words that each segment begins with.
        ranks_here: how many ranks share this device.
        is_alive: tells whether a peer still exists.
        close: what to let go of.
    """

    def __init__(
        self,
        views: Sequence[Tensor],
        control: Control,
        *,
        map_segments: Callable[[int], Sequence[Tensor]],
        rank: int,
        ranks_here: int,
        is_alive: Callable[[int], bool],
        close: Callable[[], None],
    ) -> None:
        self.rank = rank
        self.num_ranks = control.topology.num_ranks
        self.ranks_here = ranks_here
        self.shares_sms = False
        """Whether kernels of the ranks on this device compete for the same SMs, as those of threads do."""
        self.views = views
        self.segment = views[rank]
        self.device = self.segment.device
        self.is_alive = is_alive
        self.close = close
        self.segments = _addresses(views).to(self.device)
        """int64 ``[P]``: where each rank's segment is mapped here. Kernels look here, those of graphs too."""
        self.linger_s = _LINGER_S
        self._control = control
        self._map_segments = map_segments
        self._num_released = 0
        self.stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        """Beside kernels that wait: what the host says and asks goes through it."""
        self._staged = torch.empty(REASON_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        torch.cuda.synchronize(self.device)

    def post(self, peer: int, box: str, index: int, value: int) -> None:
        """See Mailbox."""
        self._staged[:8].view(torch.int64).fill_(value)
        self._copy(self._entry(peer, box, index, self.rank), self._staged[:8])

    def load(self, box: str, index: int, sender: int) -> int:
        """See Mailbox."""
        self._copy(self._staged[:8], self._entry(self.rank, box, index, sender))
        return int(self._staged[:8].view(torch.int64))

    def write_reason(self, peer: int, text: bytes) -> None:
        """See Mailbox."""
        text = text[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
        self._staged.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._copy(self._control.view(self.views[peer], "reasons")[self.rank], self._staged)

    def read_reason(self, sender: int) -> bytes:
        """See Mailbox."""
        self._copy(self._staged, self._control.view(self.segment, "reasons")[sender])
        return self._staged.numpy().tobytes()

    def forget(self, box: str) -> None:
        """See Mailbox."""
        with torch.cuda.stream(self.stream):
            self._control.view(self.segment, box).zero_()
        self.stream.synchronize()

    def mask(self, ranks: Sequence[int]) -> None:
        """See Transport. In place of their segments kernels are given this rank's own, graphs that exist already too.

        What they tell those ranks they then tell this one: it stands in for them.
        """
        with torch.cuda.stream(self.stream):
            self._control.forget_senders(self.segment, ranks)
            for rank in ranks:
                self.segments[rank].copy_(self.segments[self.rank])
        self.stream.synchronize()

    def grow(self, group: Group, num_bytes: int) -> bool:
        """See Transport. Symmetric memory has one size: another segment takes this one's place, and what lies in it."""
        self._move(group, num_bytes)
        return True

    def release(self, group: Group, first: int) -> bool:
        """See Transport. A segment of control words alone takes this one's place."""
        num_bytes = self.segment.numel()
        self._move(group, first)
        self._num_released = num_bytes
        return True

    def reacquire(self, group: Group) -> bool:
        """See Transport."""
        self._move(group, self._num_released)
        return True

    def _move(self, group: Group, num_bytes: int) -> None:
        """All ranks get other segments, which begin with what theirs had. For a moment there are both."""
        views = self._map_segments(num_bytes)
        kept = min(num_bytes, self.segment.numel())
        with torch.cuda.stream(self.stream):
            views[self.rank][:kept].copy_(self.segment[:kept])
            self.segments.copy_(_addresses(views))
        self.stream.synchronize()
        self.views, self.segment = views, views[self.rank]
        group.all_gather(None)  # nobody's next call writes where this rank has still to copy

    def idle(self, num_polls: int) -> None:
        """Yields the core at first, then sleeps."""
        if num_polls < _YIELDS:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)

    def _entry(self, at: int, box: str, index: int, sender: int) -> Tensor:
        first = self._control[box].offset + 8 * (index * self.num_ranks + sender)
        return self.views[at][first : first + 8]

    def _copy(self, destination: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
        self.stream.synchronize()


def _addresses(views: Sequence[Tensor]) -> Tensor:
    return torch.tensor([view.data_ptr() for view in views], dtype=torch.int64, device="cpu")
