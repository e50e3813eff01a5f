"""Hosts that are network namespaces (``crossdock.cli.hosts``), for programs of tests: ``program(group, *args)``."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from crossdock import PeerFailed, PeerTimeout
from crossdock.cli import hosts
from crossdock.cli.hosts import problem, sent_bytes
from crossdock.cli.world import Member
from tests.child import HUNG_S
from tests.world import _dumps as dumps

__all__ = ["Hosts", "leave", "problem", "sent_bytes"]


class Hosts:
    """Hosts whose ranks are told apart by what they leave, and which parents may hurt.

    Args:
        nodes, local: hosts, and ranks on each.
        rate: of every link, each way, as ``tc`` writes it.
    """

    def __init__(self, nodes: int, local: int, *, rate: str = "200mbit") -> None:
        self._hosts = hosts.Hosts(nodes, local, rate=rate, is_strict=True)
        self.network = self._hosts.network

    def __enter__(self) -> Hosts:
        self._hosts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hosts.__exit__()

    def start(self, program: Callable[..., Any], *args: Any) -> None:
        """Runs ``program(group, *args)`` on all ranks of all hosts; ``outcomes`` waits for it."""
        self._hosts.start(_run, dumps((program, args)))

    def outcomes(self, of: Collection[int] | None = None) -> list[Any]:
        """By rank, what its program returned, or the error that it raised; None of one that died."""
        found = self._hosts.outcomes(of=of, limit_s=HUNG_S)
        return [None if outcome is None else outcome.error or pickle.loads(outcome.value) for outcome in found]  # noqa: S301 - our own

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        """The outcomes of a program. Raises what the lowest rank raised whose failure was its own."""
        self.start(program, *args)
        outcomes = self.outcomes()
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, (PeerFailed, PeerTimeout)))
        return outcomes

    def wait_for(self, name: str) -> str:
        """What a rank has left under a name (``leave``), once it has."""
        until = time.monotonic() + HUNG_S
        while not (path := self._hosts.folder / name).exists():
            assert time.monotonic() < until, f"nobody left {name}"
            time.sleep(0.01)
        return path.read_text()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.wait_for(f"pid-{rank}")), number)


def leave(name: str, text: str = "") -> None:
    """Of a rank: says something to the parent, who waits for it."""
    path = Path(os.environ["CROSSDOCK_HOSTS_FOLDER"]) / name
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


def _run(member: Member, job: bytes) -> bytes:
    program, args = pickle.loads(job)  # noqa: S301 - our own parent's
    leave(f"pid-{member.rank}", str(os.getpid()))
    return dumps(program(dist.group.WORLD, *args))
