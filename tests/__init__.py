"""Settings of every process that runs tests, pytest's and its children's; importing this package applies them."""

import importlib.util
import os

# A server whose forks are ranks has one thread. numpy's library would start others as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from jaxtyping import install_import_hook

# Annotations and their shapes are checked at run time, in modules that take no user's arguments: elsewhere wrong
# arguments raise errors that tests check. The hook applies to modules imported after it.
CHECKED = ("plan", "arena", "backends.sums")
if importlib.util.find_spec("beartype"):  # a GPU machine may be offline and have no beartype
    install_import_hook([f"crossdock.{module}" for module in CHECKED], "beartype.beartype")

# Uninitialised memory is NaN, or the largest integer, so that reads of it show. cuBLAS then needs this variable.
# torch.use_deterministic_algorithms tells torch's compiler too, and imports it: two seconds in every process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch._C._set_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Tests run more ranks, as threads or processes, than there are cores.
torch.set_num_threads(1)
