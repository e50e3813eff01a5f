"""Where pytest does not look: kernels cannot be imported without Triton, which has releases for Linux alone."""

import importlib.util

collect_ignore_glob = (
    [] if importlib.util.find_spec("triton") else ["crossdock/backends/cuda/*", "crossdock/cli/bench/write_rows.py"]
)
