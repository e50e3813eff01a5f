"""A program on all ranks of all hosts: started together, heard over sockets of files, and ended together.

``python -m crossdock.cli.hosts FOLDER NODE`` is a host: it takes a ``/dev/shm`` of its own and starts its ranks, which
run the job that lies in the folder.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from ctypes import c_double
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from crossdock.cli.hosts.network import Network
from crossdock.cli.line import shared_moments
from crossdock.cli.signals import deferred, ends_raised
from crossdock.cli.world import Member, RankDied, first_cause
from crossdock.errors import CrossdockError

Job = TypeVar("Job")
Result = TypeVar("Result")
PORT = 29743
_ROOT = Path(__file__).parents[3]
_MEET_S = 120.0
"""Seconds in which all ranks have to come up."""
_GRACE_S = 0.5


class Setting(NamedTuple):
    """What a rank has to know beside its job."""

    num_nodes: int
    node_size: int
    links: tuple[str, ...]
    """Names of the hosts' interfaces."""
    is_strict: bool
    """Warnings are errors, as under the tests."""


class Outcome(NamedTuple):
    """How a rank's program ended: with a value, or with an error."""

    value: Any
    error: CrossdockError | None = None


class Hosts:
    """Hosts and their network, on which one program after the other can run.

    Args:
        nodes, local: hosts, and ranks on each.
        rate: of every link, each way, as ``tc`` writes it.
        is_strict: warnings in ranks are errors.

    Raises:
        BackendUnavailable: there can be no network namespaces here.
    """

    def __init__(self, nodes: int, local: int, *, rate: str = "200mbit", is_strict: bool = False) -> None:
        self.network = Network(nodes, rate=rate)
        links = tuple(self.network.link(node) for node in range(nodes))
        self._setting = Setting(nodes, local, links, is_strict)
        self.folder = Path()
        self._running: list[subprocess.Popen[bytes]] = []
        self._peers: dict[int, Connection] = {}
        self._listener: Listener | None = None

    @property
    def num_ranks(self) -> int:
        """P."""
        return self._setting.num_nodes * self._setting.node_size

    def __enter__(self) -> Hosts:
        self.network.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            self.network.__exit__()

    def start(self, program: Callable[[Member, Job], Result], job: Job) -> None:
        """Starts ``program(member, job)`` on all ranks; both are pickled, so the program is a function of a module.

        Raises:
            RankDied: a rank did not come up.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="crossdock-hosts-"))
        (self.folder / "job").write_bytes(pickle.dumps((program, job)))
        (self.folder / "setting").write_bytes(pickle.dumps(tuple(self._setting)))
        (self.folder / "moments").write_bytes(bytes(shared_moments(self.num_ranks, _array)))
        self._listener = Listener(str(self.folder / "socket"), "AF_UNIX", backlog=self.num_ranks)
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for node in range(self._setting.num_nodes):
            command = [sys.executable, "-m", "crossdock.cli.hosts", str(self.folder), str(node)]
            with (self.folder / f"log-{node}").open("wb") as log, deferred():
                self._running.append(
                    subprocess.Popen(
                        [*self.network.inside(node), *command], env=env, stdout=log, stderr=log, start_new_session=True
                    )
                )
        self._meet()

    def outcomes(
        self, on_progress: Callable[..., None] = lambda *_: None, *, of: Collection[int] | None = None,
        limit_s: float | None = None, stops_at_errors: bool = False,
    ) -> list[Outcome | None]:  # fmt: skip
        """By rank, how its program ended; None of one that died, or that was not waited for. Ends all ranks.

        Args:
            on_progress: called with what rank 0 tells.
            of: ranks to wait for; None: all.
            limit_s: seconds to wait.
            stops_at_errors: whether to wait for others only for a moment once a rank has failed.

        Raises:
            RankDied: they did not end in time.
        """
        ranks = set(range(self.num_ranks) if of is None else of)
        try:
            return self._collect(on_progress, ranks, limit_s, stops_at_errors=stops_at_errors)
        finally:
            self._end()

    def run(
        self, program: Callable[[Member, Job], Result], job: Job, on_progress: Callable[..., None] = lambda *_: None
    ) -> list[Any]:
        """The results of a program by rank.

        Raises:
            CrossdockError: a rank's error; if several failed, one that is not about a peer.
            RankDied: a rank ended without a result.
        """
        self.start(program, job)
        found = self.outcomes(on_progress, stops_at_errors=True)
        errors = [outcome.error for outcome in found if outcome is not None and outcome.error is not None]
        dead = [rank for rank, outcome in enumerate(found) if outcome is None]
        if errors:
            raise first_cause(errors)
        if dead:
            raise RankDied(
                f"the process of rank {dead[0]} ended before it had a result; SIGKILL is often the system running out "
                f"of memory: pass fewer tokens or ranks"
            )
        return [outcome.value for outcome in found if outcome is not None]

    def _meet(self) -> None:
        assert self._listener is not None
        until = time.monotonic() + _MEET_S
        listening = self._listener._listener._socket  # type: ignore[attr-defined]  # noqa: SLF001 - to wait with a limit
        while len(self._peers) < self.num_ranks:
            gone = [process for process in self._running if process.poll() is not None]
            if gone or time.monotonic() > until:
                said = self._logs()
                self._end()
                raise RankDied(f"the ranks of a host did not come up; {said}")
            if wait([listening], 0.2):
                peer = self._listener.accept()
                self._peers[pickle.loads(peer.recv_bytes())] = peer  # noqa: S301 - our own processes

    def _collect(
        self, on_progress: Callable[..., None], ranks: set[int], limit_s: float | None, *, stops_at_errors: bool
    ) -> list[Outcome | None]:
        until = float("inf") if limit_s is None else time.monotonic() + limit_s
        found: list[Outcome | None] = [None] * self.num_ranks
        running = {peer: rank for rank, peer in self._peers.items() if rank in ranks}
        while running:
            left_s = until - time.monotonic()
            if left_s <= 0:
                if stops_at_errors:
                    break
                raise RankDied(f"ranks {sorted(running.values())} did not end within {limit_s} s; {self._logs()}")
            for peer in wait(list(running), None if left_s == float("inf") else left_s):
                assert isinstance(peer, Connection)
                try:
                    kind, value = pickle.loads(peer.recv_bytes())  # noqa: S301 - our own processes
                except (EOFError, OSError):
                    kind, value = "died", None
                if kind == "progress":
                    on_progress(*value)
                    continue
                rank = running.pop(peer)
                found[rank] = {"result": Outcome(value), "error": Outcome(None, value), "died": None}[kind]
                if stops_at_errors and kind != "result":
                    until = min(until, time.monotonic() + _GRACE_S)
        return found

    def _logs(self) -> str:
        """What the hosts have printed, the last of it."""
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(self.folder.glob("log-*"))]
        said = "\n".join(text[-2000:] for text in texts if text)
        return f"they said:\n{said}" if said else "they said nothing: of a killed process the kernel's log knows why"

    def _end(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            shutil.rmtree(self.folder, ignore_errors=True)


def run_hosts(
    program: Callable[[Member, Job], Result],
    job: Job,
    *,
    grid: tuple[int, int],
    rate: str,
    on_progress: Callable[..., None],
) -> list[Result]:
    """Runs ``program(member, job)`` on hosts of their own and returns the results by rank, as ``run_world`` does.

    Raises:
        CrossdockError: a rank failed, or there can be no network namespaces here.
    """
    with ends_raised(), Hosts(*grid, rate=rate) as hosts:
        return hosts.run(program, job, on_progress)


def moments_of(folder: Path) -> Any:
    """The memory of the starting line, which ranks of all hosts share: one machine has one clock."""
    with (folder / "moments").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    return (c_double * (len(memory) // 8)).from_buffer(memory)


def _array(_: type[c_double], length: int) -> Any:
    return (c_double * length)()
