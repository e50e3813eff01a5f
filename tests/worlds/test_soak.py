"""The random-rounds driver works, and finds nothing in a few rounds; ``scripts/soak`` plays many."""

import os
import sys
from pathlib import Path

import pytest

from tests.child import run_child

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "how",
    [["--ranks", "4"], ["--ranks", "2", "--threads"], ["--ranks", "3", "--shared"], ["--grid", "2x2", "--threads"]],
    ids=["processes", "threads", "one connection", "grid"],
)
def test_random_rounds_give_what_they_mean(how):
    script = [sys.executable, "-m", "tests.soak", "--rounds", "100", *how]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "JAXTYPING_DISABLE": "1"}
    done = run_child(script, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("100 rounds, 0 wrong, 0 stuck (")
