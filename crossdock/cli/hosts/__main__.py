"""A host, as ``Hosts`` starts it, which forks its ranks: ``python -m crossdock.cli.hosts FOLDER NODE``."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path

from crossdock.cli.hosts.world import PORT, Setting, moments_of


def _be_a_host(folder: Path, node: int, setting: Setting) -> None:
    # ip netns exec has given this process mounts of its own, which its ranks share.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    os.environ |= {
        "CROSSDOCK_HOSTS_FOLDER": str(folder),
        "GLOO_SOCKET_IFNAME": setting.links[node],
        "UCX_TLS": "tcp,self",  # else it finds a way around the link
        "UCX_NET_DEVICES": setting.links[node],
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "NIXL_LOG_LEVEL": "ERROR",
    }
    import torch.distributed  # noqa: F401, PLC0415 - ranks are forks of a process that has imported what takes seconds

    import crossdock.cli.world  # noqa: F401, PLC0415

    ranks = []
    for local in range(setting.node_size):
        if pid := os.fork():
            ranks.append(pid)
            continue
        try:
            _be_a_rank(folder, node * setting.node_size + local, setting)
        finally:
            os._exit(1)  # a fork must not go on as its parent
    for pid in ranks:
        os.waitpid(pid, 0)


def _be_a_rank(folder: Path, rank: int, setting: Setting) -> None:
    parent = Client(str(folder / "socket"), "AF_UNIX")
    _say(parent, rank)
    import torch  # noqa: PLC0415 - the host has imported it
    import torch.distributed as dist  # noqa: PLC0415

    from crossdock.cli.line import StartingLine  # noqa: PLC0415
    from crossdock.cli.world import Member  # noqa: PLC0415
    from crossdock.errors import CrossdockError  # noqa: PLC0415

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    if setting.is_strict:
        warnings.simplefilter("error")

    def tell(*progress: object) -> None:
        if rank == 0:
            _say(parent, ("progress", progress))

    try:
        size = setting.num_nodes * setting.node_size
        program, job = pickle.loads((folder / "job").read_bytes())  # noqa: S301 - our own parent's
        dist.init_process_group(
            "gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        line = StartingLine(moments_of(folder), rank)
        said = ("result", program(Member(rank, size, line, tell), job))
    except CrossdockError as error:
        said = ("error", error)
    except BaseException:  # noqa: BLE001 - the parent must show any error
        said = ("error", CrossdockError(f"rank {rank} failed:\n{traceback.format_exc()}"))
    _say(parent, said)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    os._exit(0)


def _say(parent: Connection, value: object) -> None:
    # Not Connection.send, with which torch would send memory in place of values.
    parent.send_bytes(pickle.dumps(value))


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _be_a_host(_folder, int(sys.argv[2]), Setting(*pickle.loads((_folder / "setting").read_bytes())))  # noqa: S301 - our own parent's
