"""A few rounds of the soak with two ranks that take turns on a GPU, without MPS, for NVIDIA's sanitizer to watch::

    compute-sanitizer --tool memcheck --target-processes all python3 -m tests.gpu.memcheck [--ranks 2] [--rounds 24]

Rows are 32 values and tokens 12, so that a round ends in seconds under it. Its exit code says whether a bit was
wrong; the sanitizer's own, with ``--error-exitcode 9``, whether memory was touched that is nobody's.
"""

import argparse
import os
import sys

from tests import soak

PATIENCE_S = 600
"""The sanitizer makes each kernel slower by 10 to 100 times, and patches each when it is loaded."""


def main(arguments: list[str] | None = None) -> int:
    """Plays every Spec, in rounds without trouble."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.memcheck", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # or all of torch's kernels would be patched
    calm = [word for trouble in soak.TROUBLES for word in ("--without", trouble)]
    numbers = {"ranks": options.ranks, "rounds": options.rounds, "seed": options.seed, "watchdog": PATIENCE_S}
    words = [f"--{name}={value}" for name, value in numbers.items()]
    return soak.main(["--device", "cuda", *words, *calm])


if __name__ == "__main__":
    sys.exit(main())
