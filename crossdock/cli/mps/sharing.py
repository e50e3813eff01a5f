"""How ranks share the GPUs of a host: a value, decided before anything is started."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from crossdock.errors import ConfigError

CONTROL = "nvidia-cuda-mps-control"
PIPE_DIRECTORY, LOG_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
MOST_PROCESSES = 48
"""That MPS takes on a GPU."""

Kind = Literal["own", "mps", "joined", "turns"]
_WORDS: dict[Kind, str] = {
    "own": "a GPU for each rank",
    "mps": "a GPU shared under MPS",
    "joined": "a GPU shared under an MPS daemon that was there",
    "turns": "a GPU shared by time slices, without MPS",
}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Who runs where. With "mps" a daemon is to be started; "joined" uses the one that the environment names.

    ``num_ranks`` None: as many as come. ``percentage``: of a GPU's SMs, what each rank may use; None: all of them.
    """

    kind: Kind
    num_ranks: int | None
    num_gpus: int
    percentage: float | None

    @property
    def is_concurrent(self) -> bool:
        """Whether all ranks run at once. Else a wait for a peer lasts a time slice, milliseconds."""
        return self.kind != "turns"

    @property
    def warning(self) -> str | None:
        """What must be said beside every time that is measured; None when there is nothing."""
        if self.is_concurrent:
            return None
        ranks = "ranks" if self.num_ranks is None else f"{self.num_ranks} ranks"
        return (
            f"MPS is not there ({CONTROL} is not on PATH), so {ranks} take turns on {self.num_gpus} GPU: every wait "
            f"for a peer lasts milliseconds, and times say nothing about latency or speed"
        )

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What ranks need beside ``environ``, where the user's own choices stand, before they initialise CUDA."""
        variables = {} if "TORCH_SYMM_MEM_DISABLE_MULTICAST" in environ else {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        if self.kind != "own":
            variables["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        if self.percentage is not None:
            variables[PERCENTAGE] = f"{self.percentage:g}"
        return variables

    def __str__(self) -> str:
        part = "" if self.percentage is None else f", {self.percentage:g} % of its SMs for each rank"
        return f"{_WORDS[self.kind]}{part}"


def share_gpus(
    num_ranks: int | None,
    *,
    num_gpus: int,
    percentage: float | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Sharing:
    """Decides how ranks share GPUs, of which rank ``r`` uses number ``r % num_gpus``.

    Args:
        num_ranks: on this host; None when nobody knows, as for a command that starts them itself.
        num_gpus: that torch sees, at least 1.
        percentage: of a GPU's SMs for each rank: at most, and by default, 100 over the ranks of a GPU. More would let
            ranks overlap on SMs, where those that wait can keep out those that are waited for.
        environ: in which MPS may be configured already.

    Raises:
        ConfigError: there are no ranks, or the percentage is not possible.

    >>> share_gpus(8, num_gpus=8, environ={}).kind
    'own'
    >>> print(share_gpus(8, num_gpus=1, environ={"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps"}))
    a GPU shared under an MPS daemon that was there, 12.5 % of its SMs for each rank
    """
    if num_ranks is not None and num_ranks < 1:
        raise ConfigError(f"ranks={num_ranks}; pass a positive number")
    kind = _kind(num_ranks, num_gpus, environ)
    most = 100.0 if num_ranks is None else 100 / math.ceil(num_ranks / num_gpus)
    if percentage is not None:
        if kind in ("own", "turns"):
            raise ConfigError(
                f"percentage={percentage:g} of the SMs wants MPS, and this is {_WORDS[kind]}; leave it out"
                + (f", or put {CONTROL} on PATH" if kind == "turns" else "")
            )
        if not 0 < percentage <= most:
            raise ConfigError(
                f"percentage={percentage:g} of the SMs for each of {num_ranks} ranks on {num_gpus} GPU; pass more than "
                f"0 and at most {most:g}, so that no two ranks need the same SM"
            )
    elif kind in ("mps", "joined") and num_ranks is not None and (kind == "mps" or PERCENTAGE not in environ):
        percentage = most
    return Sharing(kind=kind, num_ranks=num_ranks, num_gpus=num_gpus, percentage=percentage)


def _kind(num_ranks: int | None, num_gpus: int, environ: Mapping[str, str]) -> Kind:
    if num_ranks is not None and num_ranks <= num_gpus:
        return "own"
    if PIPE_DIRECTORY in environ:
        return "joined"
    return "mps" if shutil.which(CONTROL, path=environ.get("PATH")) else "turns"
