"""The seam: what a backend may ask of whatever connects the ranks, and how ranks find each other at set-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from crossdock.consent import Mailbox
from crossdock.errors import ConfigError, CrossdockError, TransportError
from crossdock.fields import is_integer

Value = TypeVar("Value")


class Transport(Mailbox, Protocol):
    """A rank's connection to its peers: everybody's memory, and the mailbox words that guard it."""

    rank: int
    num_ranks: int
    linger_s: float
    """How long after a rank has gone what it wrote may still come in."""

    @property
    def segment(self) -> Tensor:
        """uint8: this rank's segment, which begins with the control words."""
        raise NotImplementedError

    def idle(self, num_polls: int) -> None:
        """Gives the core away for a moment, after ``num_polls`` polls that found nothing."""

    def is_alive(self, peer: int) -> bool:
        """False when the peer is known to be gone for good."""

    def mask(self, ranks: Sequence[int]) -> None:
        """These ranks are gone for good: what they have left here counts for nothing. Nothing of ours is running."""

    def grow(self, group: Group, num_bytes: int) -> bool:
        """Makes all ranks' segments larger. Collective; no call is under way on any rank, nor what one has issued.

        Gives whether ``segment`` lies elsewhere now, the same on all ranks; else what lies in it stays where it is.

        Raises:
            TransportError: a rank has no room; on all ranks, and all segments are as large as before.
        """
        raise NotImplementedError

    def release(self, group: Group, first: int) -> bool:
        """Gives back the memory of all segments from that byte on. Collective; as for ``grow``.

        Gives whether ``segment`` lies elsewhere now, and ends there; else its addresses stay.

        Raises:
            NotSupported: it cannot be given back here; on all ranks.
        """
        raise NotImplementedError

    def reacquire(self, group: Group) -> bool:
        """Takes it again; what was in it is gone. Collective. Gives whether ``segment`` lies elsewhere now.

        Raises:
            TransportError: a rank has no room; on all ranks.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the peers, without a word to them; tensors that were handed out stay valid."""


@runtime_checkable
class Group(Protocol):
    """Ranks that know each other, as far as a ``Buffer`` needs it to be set up: any object with these three will do.

    Rows and words do not go through it: after set-up a buffer calls it in ``gather_stats`` only.

    >>> class Alone:
    ...     rank, size = 0, 1
    ...
    ...     def all_gather(self, value):
    ...         return [value]
    >>> isinstance(Alone(), Group)
    True
    """

    rank: int
    """0 to size - 1."""
    size: int

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank: whatever can be pickled. Collective, and returns once all have given theirs."""


def group_of(given: dist.ProcessGroup | DeviceMesh | Group | None) -> Group:
    """What ranks were given to meet by, as a Group.

    Raises:
        ConfigError: it is none.
    """
    if given is None or isinstance(given, DeviceMesh) or _is_torchs(given):
        return ProcessGroup(given)  # type: ignore[arg-type]
    if not isinstance(given, Group):
        raise ConfigError(
            f"group is a {type(given).__name__}; pass a group of torch.distributed, a 1-D DeviceMesh, None for the "
            f"default group, a ThreadGroup, or any object with rank, size and all_gather (crossdock.Group)"
        )
    rank: object = given.rank
    size: object = given.size
    if not is_integer(rank, least=0) or not is_integer(size, least=1) or given.rank >= given.size:
        raise ConfigError(
            f"the group, a {type(given).__name__}, has rank={rank!r} and size={size!r}; give it integers, the rank "
            f"from 0 to size - 1 (crossdock.Group)"
        )
    return given


def _is_torchs(given: object) -> bool:
    """Whether that is a process group, or what torch gives for one to a process that is no member."""
    if not dist.is_available():
        return False
    return isinstance(given, dist.ProcessGroup) or given is dist.GroupMember.NON_GROUP_MEMBER


class ProcessGroup:
    """A torch.distributed process group, or that of a 1-D mesh, as a Group; any backend that gathers Python objects."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "group=None means torch.distributed's default group, which is not initialised; call "
                "torch.distributed.init_process_group first, or use crossdock.run_local(program, num_ranks) for ranks "
                "that are threads"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ConfigError(
                    f"the DeviceMesh has dimensions {group.mesh_dim_names or group.ndim}; pass the one along which "
                    f"experts are spread, such as mesh['ep']"
                )
            if group.get_coordinate() is None:
                raise _no_member(f"the DeviceMesh {group}")
            group = group.get_group()
        self.process_group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise _no_member("the group")
        self.size = dist.get_world_size(group)

    def all_gather(self, value: Value) -> list[Value]:
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values


def _no_member(of_what: str) -> ConfigError:
    return ConfigError(
        f"this process, global rank {dist.get_rank()}, is not a member of {of_what}; only its members make a Buffer "
        f"with it: pass the group that this process belongs to"
    )


class NodeGroup:
    """The ranks of this rank's node, as a Group; what they do together, all nodes do.

    Args:
        whole: the ranks of all nodes.
        node_size: U.
    """

    def __init__(self, whole: Group, node_size: int) -> None:
        self.whole = whole
        self.first = whole.rank // node_size * node_size
        """The rank of the node's first rank among all."""
        self.rank = whole.rank - self.first
        self.size = node_size

    def all_gather(self, value: Value) -> list[Value]:
        """The node's values; those of other nodes meet at the same time."""
        return self.whole.all_gather(value)[self.first : self.first + self.size]


def raise_on_all(group: Group, problem: str | None, error: type[CrossdockError]) -> None:
    """Raises on all ranks, of all nodes, when any of them has a problem. Collective."""
    whole = group.whole if isinstance(group, NodeGroup) else group
    for rank, theirs in enumerate(whole.all_gather(problem)):
        if theirs is not None:
            raise error(f"rank {rank}: {theirs}")


@contextmanager
def all_or_none(group: Group) -> Iterator[None]:
    """What fails in the block on one rank fails on all. Collective at the block's end, which no rank leaves alone.

    Raises:
        TransportError: it failed on another rank; that one raises its own error.
    """
    try:
        yield
    except Exception as error:
        group.all_gather(f"{type(error).__name__}: {error}")
        raise
    raise_on_all(group, None, TransportError)
