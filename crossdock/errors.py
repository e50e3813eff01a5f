"""Every error Crossdock raises, and nothing else.

Messages say what is wrong, what was got, what is allowed and what to do, in that order:
``num_experts=250 is not divisible by num_ranks=8; pass a multiple of 8 or pad the expert list``.
"""

from __future__ import annotations


class CrossdockError(Exception):
    """Base of everything the library raises on purpose."""


class ConfigError(CrossdockError, ValueError):
    """An argument, or what several ranks passed together, is not allowed."""


class CapacityError(ConfigError):
    """More rows were routed to a rank (or to one of its experts) than its buffer was given room for."""


class BackendUnavailable(CrossdockError, ImportError):
    """A backend needs something that this machine lacks; the message says what to install."""


class NotSupported(CrossdockError, NotImplementedError):
    """A legal wish that this version cannot fulfil; the message names the way that works."""


class TransportError(CrossdockError, RuntimeError):
    """Reaching the peers failed."""


class PeerTimeout(TransportError):
    """A peer did not do its part before the deadline.

    Attributes:
        rank: the peer that was waited for.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[PeerTimeout], tuple[int, str]]:
        return type(self), (self.rank, str(self))


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
