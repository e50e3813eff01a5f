"""Crossdock's environment variables, and the cores of this process. Neither changes a result.

``cli.mps`` reads the variables of CUDA's MPS.
"""

from __future__ import annotations

import os
from pathlib import Path

TRACE = "CROSSDOCK_TRACE"


def shm_dir() -> Path:
    """Directory of the ranks' segments, on a memory file system: ``CROSSDOCK_SHM_DIR``, or ``/dev/shm``."""
    return Path(os.environ.get("CROSSDOCK_SHM_DIR") or "/dev/shm")


def trace_folder() -> str | None:
    """Folder for traces of buffers that were not given one: ``CROSSDOCK_TRACE``."""
    return os.environ.get(TRACE) or None


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
