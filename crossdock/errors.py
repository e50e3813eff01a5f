"""Every error Crossdock raises, and nothing else.

Messages say what is wrong, what was got, what is allowed and what to do, in that order:
``num_experts=250 is not divisible by num_ranks=8; pass a multiple of 8 or pad the expert list``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal


class CrossdockError(Exception):
    """Base of everything the library raises on purpose."""


class ConfigError(CrossdockError, ValueError):
    """An argument, or what several ranks passed together, is not allowed."""


class CapacityError(ConfigError):
    """There is not room for a call: too many rows for a rank (or one of its experts), or a rank with too many tokens.

    The same on all ranks, so that all can make room together.

    Attributes:
        num_rows: the most rows that were routed to a rank (Padded: to an expert); None where tokens were too many.
        num_tokens: the most tokens that a rank brought; None where rows were too many.
    """

    def __init__(self, message: str, *, num_rows: int | None = None, num_tokens: int | None = None) -> None:
        super().__init__(message)
        self.num_rows = num_rows
        self.num_tokens = num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), num_rows=self.num_rows, num_tokens=self.num_tokens), (str(self),)


class BackendUnavailable(CrossdockError, ImportError):
    """A backend needs something that this machine lacks; the message says what to install."""


class NotSupported(CrossdockError, NotImplementedError):
    """A legal wish that this version cannot fulfil; the message names the way that works."""


class TransportError(CrossdockError, RuntimeError):
    """Reaching the peers failed."""


class PeerTimeout(TransportError):
    """A peer did not do its part before the deadline.

    Attributes:
        rank: the peer that was waited for; among several nodes, the one whom all that wait, wait for in the end.
        hop: the axis over which it was missed, ``"scale_up"`` within a node or ``"scale_out"`` between nodes; None
            where all ranks are of one scale-up domain.
    """

    def __init__(self, rank: int, message: str, hop: Literal["scale_up", "scale_out"] | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.hop = hop

    def __reduce__(self) -> tuple[type[PeerTimeout], tuple[Any, ...]]:
        return type(self), (self.rank, str(self), self.hop)


class PeerFailed(TransportError):
    """A peer gave up a call that this rank takes part in.

    Attributes:
        rank: the peer that gave up.
        reason: what it said, usually the message of its own exception.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed this call: {reason}")
        self.rank = rank
        self.reason = reason

    def __reduce__(self) -> tuple[type[PeerFailed], tuple[int, str]]:
        return type(self), (self.rank, self.reason)
