"""What a process finds around it: every environment variable of Crossdock's own, and cores. None changes a result.

``cli.mps`` reads those of CUDA's MPS.
"""

from __future__ import annotations

import os
from pathlib import Path


def shm_dir() -> Path:
    """``CROSSDOCK_SHM_DIR``: the memory file system that holds the ranks' segments, ``/dev/shm`` by default."""
    return Path(os.environ.get("CROSSDOCK_SHM_DIR", "/dev/shm"))


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
