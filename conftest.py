"""Where pytest does not look: kernels cannot be imported without Triton, which has releases for Linux alone.

Nor at the programs of tests/release: one is right, the other full of mistakes, and scripts/release shows both to type
checkers.
"""

import importlib.util

collect_ignore_glob = ["tests/release/*"]
if not importlib.util.find_spec("triton"):
    collect_ignore_glob += ["crossdock/backends/cuda/*", "crossdock/cli/bench/write_rows.py"]
