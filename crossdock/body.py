"""Which bytes behind a connection's control words belong to which Spec, and whose calls have used them last."""

from __future__ import annotations

from weakref import ref

from crossdock.arena import PAGE, Arena
from crossdock.errors import ConfigError
from crossdock.pending import CallQueue
from crossdock.slots import ReceiveSlots


class Share:
    """Bytes that the slots of one or several Specs lie over. The calls of one Spec use them at a time."""

    def __init__(self) -> None:
        self.user: ReceiveSlots | None = None
        """Those of the last call."""
        self._all: list[ref[ReceiveSlots]] = []

    def add(self, slots: ReceiveSlots) -> None:
        """These lie here too."""
        self._all = [known for known in self._all if known() is not None]
        self._all.append(ref(slots))

    def take(self, slots: ReceiveSlots, queue: CallQueue) -> None:
        """From now on these are in use: what other Specs' calls do here is finished, and their rows are stale.

        Peers write here only once this rank's word has told them that it is in the call, so after all that.

        Raises:
            ConfigError: rows would be overwritten of a dispatch that was started and not waited for.
        """
        for other in filter(None, (known() for known in self._all)):
            if other is not slots:
                other.vacate(slots.begin, slots.end, queue)
        queue.drain()
        queue.check_room(slots)
        self.user, slots.is_settled = slots, False

    def vacate(self, queue: CallQueue) -> None:
        """All rows here are stale.

        Raises:
            ConfigError: some are of a dispatch that was started and not waited for.
        """
        for slots in filter(None, (known() for known in self._all)):
            slots.vacate(slots.begin, slots.end, queue)


class Body:
    """The bytes of a segment behind the control words: from the front those that Specs share, from the back others.

    Where a Spec lies follows from what was laid before, so ranks lay the same in the same order.
    """

    def __init__(self, first: int, num_bytes: int) -> None:
        self.first = first
        self.num_bytes = num_bytes
        self.shared = Share()
        self._shares = [ref(self.shared)]
        self._shared_end = first
        self._apart: dict[int, int] = {}
        """Where each range that is one Spec's alone begins, and where it ends."""

    @property
    def end(self) -> int:
        """Bytes of the segment."""
        return self.first + self.num_bytes

    def place(self, arena: Arena, *, exclusive: bool) -> tuple[Arena, Share]:
        """The Spec's arena where it lies here, and with whom it shares these bytes.

        Raises:
            ConfigError: there is no room for it.
        """
        need = arena.num_bytes - self.first
        if not exclusive:
            room = min(self._apart, default=self.end) - self.first
            if need > room:
                raise self._no_room(arena, need, room, "that Specs share")
            self._shared_end = max(self._shared_end, self.first + need)
            return arena, self.shared
        for begin, end in reversed(self._gaps()):
            if (placed := _last_in(arena, need, begin, end)) is not None:
                self._apart[placed.begin] = placed.num_bytes
                share = Share()
                self._shares = [*(known for known in self._shares if known() is not None), ref(share)]
                return placed, share
        room = max(end - begin for begin, end in self._gaps())
        raise self._no_room(arena, need, room, "that no other Spec lies in")

    def leave(self, arena: Arena) -> None:
        """A Spec that lay apart is not used any more."""
        self._apart.pop(arena.begin, None)

    def vacate(self, queue: CallQueue) -> None:
        """All rows of all Specs are stale; none may be of a dispatch that was not waited for."""
        for share in filter(None, (known() for known in self._shares)):
            share.vacate(queue)

    def grew(self, num_bytes: int) -> None:
        """There are so many now."""
        self.num_bytes = num_bytes

    def _gaps(self) -> list[tuple[int, int]]:
        """Ranges that nobody lies in, from front to back."""
        begin, gaps = self._shared_end, []
        for other in sorted(self._apart):
            gaps.append((begin, other))
            begin = self._apart[other]
        return [*gaps, (begin, self.end)]

    def _no_room(self, arena: Arena, need: int, room: int, which: str) -> ConfigError:
        return ConfigError(
            f"the Spec needs {need:,} bytes, and the connection has {room:,} {which} (of {self.num_bytes:,}); make "
            f"Connection(num_bytes=) larger, call connection.reserve() on all ranks, or pass a smaller max_tokens or "
            f"capacity= ({arena.spec.max_tokens} tokens now)"
        )


def _last_in(arena: Arena, num_bytes: int, begin: int, end: int) -> Arena | None:
    """The arena as far back as it fits between two places; None: it does not. Whole rows take a little more room."""
    first = (end - num_bytes) // PAGE * PAGE
    while first >= begin:
        if (excess := (placed := arena.moved_to(first)).num_bytes - end) <= 0:
            return placed
        first -= -(-excess // PAGE) * PAGE
    return None
