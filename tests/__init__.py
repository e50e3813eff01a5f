"""What is true wherever a test runs, in pytest's process and in those that it starts; importing this makes it so."""

import importlib.util
import os

import torch
from jaxtyping import install_import_hook

# Annotations, with the shapes in them, are checked as the code runs, wherever no user's argument comes first: at the
# border a wrong one has an error of its own, which tests are to see. The hook only sees what is imported after it.
CHECKED = ("plan", "arena", "backends.sums")
if importlib.util.find_spec("beartype"):  # a GPU machine may be offline, and lack it
    install_import_hook([f"crossdock.{module}" for module in CHECKED], "beartype.beartype")

# Memory nobody wrote to shows: torch.empty is NaN, or the largest integer. On CUDA, cuBLAS then asks for this variable.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Ranks are threads or processes here, more of them than cores.
torch.set_num_threads(1)
