"""Hosts that are network namespaces: ranks that share no memory and no loopback, joined by links of a known rate.

``python -m tests.hosts FOLDER NODE`` is a host: it takes a ``/dev/shm`` of its own, and starts its ranks, which run the
job that lies in the folder, and leave what came of it there. Parents make links slow, cut them, and count their bytes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PORT = 29743
LIMIT_S = 240


class Setting(NamedTuple):
    """What a rank has to know beside its job."""

    nodes: int
    local: int
    prefix: str


class Hosts:
    """Namespaces in a star, each behind a link of the same rate. Root alone may make them.

    Args:
        nodes, local: hosts, and ranks on each.
        rate: of every link, each way, as ``tc`` writes it.
    """

    def __init__(self, nodes: int, local: int, *, rate: str = "200mbit") -> None:
        self.setting = Setting(nodes, local, f"xd{os.getpid() % 10_000}")
        self._rate = rate
        self._hub = f"{self.setting.prefix}hub"
        self._folder: Path | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def start(self, program: Callable[..., Any], *args: Any) -> None:
        """Runs ``program(group, *args)`` on all ranks of all hosts; ``outcomes`` waits for it."""
        self._folder = Path(tempfile.mkdtemp(prefix="crossdock-hosts-"))
        from tests.world import _dumps  # noqa: PLC0415 - a host imports no torch

        (self._folder / "job").write_bytes(_dumps((program, args)))
        (self._folder / "setting").write_bytes(pickle.dumps(tuple(self.setting)))
        for node in range(self.setting.nodes):
            command = [*self._inside(node), sys.executable, "-m", "tests.hosts", str(self._folder), str(node)]
            env = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "OMP_NUM_THREADS": "1",
            }
            with (self._folder / f"log-{node}").open("wb") as log:
                self._running.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
                )

    def outcomes(self) -> list[Any]:
        """By rank, what its program returned, or the exception that it raised; None of one that left nothing."""
        assert self._folder is not None
        try:
            until = time.monotonic() + LIMIT_S
            for process in self._running:
                process.wait(max(0.1, until - time.monotonic()))
            return [self._outcome(rank) for rank in range(self.setting.nodes * self.setting.local)]
        except subprocess.TimeoutExpired:
            logs = "\n".join(log.read_text() for log in sorted(self._folder.glob("log-*")))
            raise AssertionError(f"the hosts did not end within {LIMIT_S} s:\n{logs}") from None
        finally:
            self._kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        """The outcomes of a program. Raises what the lowest rank raised."""
        self.start(program, *args)
        outcomes = self.outcomes()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def wait_for(self, name: str) -> str:
        """What a rank has left under a name (``leave``), once it has."""
        assert self._folder is not None
        until = time.monotonic() + LIMIT_S
        while not (path := self._folder / name).exists():
            assert time.monotonic() < until, f"nobody left {name}"
            time.sleep(0.01)
        return path.read_text()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank, which has left its number as ``pid-RANK``, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.wait_for(f"pid-{rank}")), number)

    @contextlib.contextmanager
    def link_down(self, node: int) -> Iterator[None]:
        """A host's link is down in the block."""
        link = f"{self.setting.prefix}v{node}"
        _sh(f"ip -n {self._name(node)} link set {link} down")
        try:
            yield
        finally:
            _sh(f"ip -n {self._name(node)} link set {link} up")

    def _outcome(self, rank: int) -> Any:
        assert self._folder is not None
        path = self._folder / f"outcome-{rank}"
        return pickle.loads(path.read_bytes()) if path.exists() else None  # noqa: S301 - our own process

    def _name(self, node: int) -> str:
        return f"{self.setting.prefix}n{node}"

    def _inside(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self._name(node)]

    def _up(self) -> None:
        prefix, hub = self.setting.prefix, self._hub
        _sh(f"ip netns add {hub}")
        _sh(f"ip -n {hub} link add br0 type bridge")
        _sh(f"ip -n {hub} link set br0 up")
        limit = f"tbf rate {self._rate} burst 128kb latency 400ms"
        for node in range(self.setting.nodes):
            name, link, end = self._name(node), f"{prefix}v{node}", f"{prefix}h{node}"
            _sh(f"ip netns add {name}")
            _sh(f"ip -n {name} link set lo up")
            _sh(f"ip link add {link} netns {name} type veth peer name {end} netns {hub}")
            _sh(f"ip -n {hub} link set {end} master br0 up")
            _sh(f"ip -n {name} addr add 10.77.0.{node + 1}/24 dev {link}")
            _sh(f"ip -n {name} link set {link} up")
            _sh(f"tc -n {name} qdisc add dev {link} root {limit}")
            _sh(f"tc -n {hub} qdisc add dev {end} root {limit}")

    def _kill(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def _down(self) -> None:
        self._kill()
        for name in [*map(self._name, range(self.setting.nodes)), self._hub]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def problem() -> str | None:
    """Why there can be no such hosts here; None: there can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc are not installed; apt-get install iproute2"
    name = f"xd{os.getpid() % 10_000}try"
    try:
        _sh(f"ip netns add {name}")
        _sh(f"ip -n {name} link add xdtry type veth peer name xdtry2")
        _sh(f"tc -n {name} qdisc add dev xdtry root tbf rate 1gbit burst 128kb latency 400ms")
    except RuntimeError as error:
        return f"network namespaces are not permitted here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


def leave(name: str, text: str = "") -> None:
    """Of a rank: says something to the parent, who waits for it."""
    path = Path(os.environ["CROSSDOCK_HOSTS_FOLDER"]) / name
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


def sent_bytes() -> int:
    """Of a rank: what its host has sent over its link so far, headers of packets included."""
    link = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text())


def _sh(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _be_a_host(folder: Path, node: int) -> None:
    setting = Setting(*pickle.loads((folder / "setting").read_bytes()))  # noqa: S301 - our own parent
    _sh("mount -t tmpfs tmpfs /dev/shm")  # ip netns exec has given this process mounts of its own
    os.environ |= {
        "CROSSDOCK_HOSTS_FOLDER": str(folder),
        "GLOO_SOCKET_IFNAME": f"{setting.prefix}v{node}",
        "UCX_TLS": "tcp,self",  # else it finds a way around the link
        "UCX_NET_DEVICES": f"{setting.prefix}v{node}",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "NIXL_LOG_LEVEL": "ERROR",
    }
    # Ranks are forks of a host that has imported what they need: that takes seconds.
    program, args = pickle.loads((folder / "job").read_bytes())  # noqa: S301 - our own parent
    ranks = []
    for local in range(setting.local):
        if pid := os.fork():
            ranks.append(pid)
            continue
        try:
            _be_a_rank(folder, setting, node * setting.local + local, lambda group: program(group, *args))
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(1)
    for pid in ranks:
        os.waitpid(pid, 0)


def _be_a_rank(folder: Path, setting: Setting, rank: int, program: Callable[[Any], Any]) -> None:
    import torch.distributed as dist  # noqa: PLC0415 - a parent that makes hosts needs none of this

    from tests.world import _dumps  # noqa: PLC0415

    warnings.simplefilter("error")
    leave(f"pid-{rank}", str(os.getpid()))
    size = setting.nodes * setting.local
    at = f"tcp://10.77.0.1:{PORT}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        outcome = _dumps(program(dist.group.WORLD))
    except BaseException as error:  # noqa: BLE001 - how a rank leaves its program is an outcome too
        error.add_note(f"Raised on rank {rank}:\n{traceback.format_exc()}")
        outcome = _dumps(error)
    (folder / f"part-{rank}").write_bytes(outcome)
    (folder / f"part-{rank}").rename(folder / f"outcome-{rank}")
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    _be_a_host(Path(sys.argv[1]), int(sys.argv[2]))
