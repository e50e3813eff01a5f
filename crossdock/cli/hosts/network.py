"""Network namespaces in a star: a bridge in a namespace of its own, and a slow link from there to each host."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from crossdock.errors import BackendUnavailable, ConfigError

_RATE = re.compile(r"\d+(\.\d+)?[kmg]bit")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


class Network:
    """Hosts behind links of the same rate; made when the block begins, and gone when it ends.

    Host ``n`` has the address ``10.77.0.(n + 1)``; nothing outside can be reached, and networks that exist at the same
    time do not see each other.

    Args:
        num_nodes: hosts.
        rate: of every link, each way, as ``tc`` writes it: ``200mbit``.

    Raises:
        ConfigError: the rate is none.
        BackendUnavailable: there can be no namespaces here (``problem``).
    """

    def __init__(self, num_nodes: int, *, rate: str = "200mbit") -> None:
        bits_per_s(rate)
        self.num_nodes = num_nodes
        self.rate = rate
        self._prefix = f"xd{os.getpid() % 10_000}"

    def __enter__(self) -> Network:
        if why := problem():
            raise BackendUnavailable(f"hosts are network namespaces of this machine, and {why}")
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def inside(self, node: int) -> list[str]:
        """What a command begins with that is to run on a host."""
        return ["ip", "netns", "exec", self._name(node)]

    def link(self, node: int) -> str:
        """The name of a host's interface."""
        return f"{self._prefix}v{node}"

    @staticmethod
    def address(node: int) -> str:
        """The address of a host."""
        return f"10.77.0.{node + 1}"

    def set_rate(self, node: int, rate: str) -> None:
        """Changes the rate of one host's link, each way."""
        for name, device in self._ends(node):
            _sh(f"tc -n {name} qdisc replace dev {device} root {_bucket(rate)}")

    @contextlib.contextmanager
    def link_down(self, node: int) -> Iterator[None]:
        """A host's link is down in the block."""
        _sh(f"ip -n {self._name(node)} link set {self.link(node)} down")
        try:
            yield
        finally:
            _sh(f"ip -n {self._name(node)} link set {self.link(node)} up")

    @property
    def _hub(self) -> str:
        return f"{self._prefix}hub"

    def _name(self, node: int) -> str:
        return f"{self._prefix}n{node}"

    def _ends(self, node: int) -> list[tuple[str, str]]:
        """Namespace and interface of a link's two ends; each limits what it sends."""
        return [(self._name(node), self.link(node)), (self._hub, f"{self._prefix}h{node}")]

    def _up(self) -> None:
        hub = self._hub
        _sh(f"ip netns add {hub}")
        _sh(f"ip -n {hub} link add br0 type bridge")
        _sh(f"ip -n {hub} link set br0 up")
        for node in range(self.num_nodes):
            (name, link), (_, end) = self._ends(node)
            _sh(f"ip netns add {name}")
            _sh(f"ip -n {name} link set lo up")
            _sh(f"ip link add {link} netns {name} type veth peer name {end} netns {hub}")
            _sh(f"ip -n {hub} link set {end} master br0 up")
            _sh(f"ip -n {name} addr add {self.address(node)}/24 dev {link}")
            _sh(f"ip -n {name} link set {link} up")
            self.set_rate(node, self.rate)

    def _down(self) -> None:
        for name in [*map(self._name, range(self.num_nodes)), self._hub]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def problem() -> str | None:
    """Why there can be no such hosts here, and what to do; None: there can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has none; run this on Linux"
    if missing := [name for name in ("ip", "tc", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} cannot be found; apt-get install iproute2 mount"
    name = f"xd{os.getpid() % 10_000}try"
    try:
        _sh(f"ip netns add {name}")
        _sh(f"ip -n {name} link add xdtry type veth peer name xdtry2")
        _sh(f"tc -n {name} qdisc add dev xdtry root {_bucket('1gbit')}")
    except BackendUnavailable as error:
        return f"they are not permitted here ({error}); run this as root, in a container with --privileged"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


def parse_grid(text: str) -> tuple[int, int]:
    """Hosts and ranks on each, from the command line's ``2x4``.

    Raises:
        ConfigError: it is no such pair.

    >>> parse_grid("2x4")
    (2, 4)
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)", text)
    nodes, local = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not 1 <= nodes <= 64 or local < 1:
        raise ConfigError(f"hosts={text!r}; pass hosts (1 to 64) and ranks on each, such as 2x4")
    return nodes, local


def bits_per_s(rate: str) -> float:
    """A rate as ``tc`` writes it, in bits per second.

    Raises:
        ConfigError: it is none.

    >>> bits_per_s("200mbit")
    200000000.0
    """
    if not _RATE.fullmatch(rate):
        raise ConfigError(f"rate={rate!r}; pass a number with kbit, mbit or gbit, such as 200mbit or 1gbit")
    return float(rate[:-4]) * _UNITS[rate[-4]]


def sent_bytes() -> int:
    """Of a rank: what its host has sent over its link so far, headers of packets included."""
    link = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text(encoding="ascii"))


def _bucket(rate: str) -> str:
    """A token bucket: what ``tc`` limits a link with."""
    return f"tbf rate {rate} burst 128kb latency 400ms"


def _sh(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise BackendUnavailable(f"{command}: {done.stderr.strip()}")
