"""Programs that tests start: what they said, and where they hung."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

HUNG_S = 600
"""What has not ended by then has hung. Seconds become minutes where lanes, and other machines, share a core."""
_LAST_WORDS_S = 20


def run_child(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """How a command ended, with what it printed. One that hung, and all that it started, says where each thread is."""
    with subprocess.Popen(
        command,
        env={**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=HUNG_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            try:
                out, err = process.communicate(timeout=_LAST_WORDS_S)
            finally:
                _kill(process)
            raise AssertionError(f"{command} did not end within {HUNG_S} s\n{out}\n{err}") from None
        except BaseException:
            _kill(process)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
