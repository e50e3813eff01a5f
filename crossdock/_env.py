"""Every environment variable of Crossdock's own; ``cli.mps`` reads those of CUDA's MPS. None changes a result."""

from __future__ import annotations

import os
from pathlib import Path


def shm_dir() -> Path:
    """``CROSSDOCK_SHM_DIR``: the memory file system that holds the ranks' segments, ``/dev/shm`` by default."""
    return Path(os.environ.get("CROSSDOCK_SHM_DIR", "/dev/shm"))
