"""All that is to be known of a machine with GPUs, in parts that resume: ``python -m benchmarks.parts --out FOLDER``.

A part is a command with a log in FOLDER, and ends within ten minutes on a bare machine, compiling included. The most
valuable come first; those that are done, at this commit, are not done again. So it may be called until all is done,
with ``--seconds`` for the time that there is, and ``TRITON_CACHE_DIR`` in FOLDER to compile nothing twice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdock.cli.mps import num_visible_gpus
from crossdock.cli.mps.sharing import MOST_PROCESSES
from crossdock.errors import BackendUnavailable

ROOT = Path(__file__).parents[1]
_LIMIT_S = 570.0
_BENCH_LIMIT_S = 240.0
_LEAST_S = 30.0
"""A part is not begun with less time than that."""
_SEED = 2001
_SWEEP = "4,8,16,20,24,32,48,64,132"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command; ended after ``limit_s`` seconds."""

    name: str
    command: tuple[str, ...]
    limit_s: float = _LIMIT_S


def parts_of(num_gpus: int, num_ranks: int, out: str) -> list[Part]:
    """The parts for so many ranks on so many GPUs, the most valuable first; results go to files in ``out``."""
    sizes = ("--hidden=7168", "--experts=256", "--topk=8")
    bench = (sys.executable, "-m", "crossdock", "bench", "--device=cuda", f"--ranks={num_ranks}", *sizes)
    peers = (sys.executable, "-m", "benchmarks.peers", "--device=cuda", f"--ranks={num_ranks}", *sizes)
    at_once = ("-n", str(_num_tests_at_once(num_gpus))) if importlib.util.find_spec("xdist") else ()

    def benched(name: str, tokens: int, *arguments: str) -> Part:
        command = (*bench, f"--tokens={tokens}", *arguments, f"--json={out}/bench.jsonl")
        return Part(name=name, command=command, limit_s=_BENCH_LIMIT_S)

    def compared(tokens: int) -> Part:
        return Part(name=f"peers-{tokens}", command=(*peers, f"--tokens={tokens}", f"--out={out}/peers.jsonl"))

    soak = ("scripts/soak", "--device", "cuda", f"--ranks={num_ranks}", "--same-sms", f"--seed={_SEED}")
    few = [("compact", "bf16", "rank"), ("padded", "fp8", "token"), ("compact", "fp8", "rank"),
           ("padded", "bf16", "token"), ("compact", "bf16", "token"), ("expanded", "bf16", "token")]  # fmt: skip
    many = [("compact", "fp8", "rank"), ("expanded", "bf16", "rank"), ("expanded", "fp8", "rank"),
            ("compact", "bf16", "token"), ("expanded", "bf16", "token")]  # fmt: skip
    return [
        Part(name="doctor", command=(sys.executable, "-m", "crossdock", "doctor", "--need", "cuda"), limit_s=60),
        Part(name="tests", command=("scripts/test-gpu", *at_once)),
        benched("bench-4096-compact-bf16-rank", 4096, "--reduce=rank", f"--sweep-sms={_SWEEP}"),
        *(
            benched(
                f"bench-128-{layout}-{wire}-{reduce}", 128, f"--layout={layout}", f"--wire={wire}", f"--reduce={reduce}"
            )
            for layout, wire, reduce in few
        ),
        Part(name="rounds", command=(*soak, "--rounds=1000000", f"--seconds={_LIMIT_S - 90:.0f}")),
        compared(4096),
        compared(128),
        *(
            benched(
                f"bench-4096-{layout}-{wire}-{reduce}",
                4096,
                f"--layout={layout}",
                f"--wire={wire}",
                f"--reduce={reduce}",
            )
            for layout, wire, reduce in many
        ),
        *([benched("bench-4096-copied", 4096, "--reduce=rank", "--mover=copy")] if num_gpus >= num_ranks else []),
        Part(name="rounds-shared", command=(*soak, "--shared", "--rounds=1000000", f"--seconds={_LIMIT_S - 90:.0f}")),
    ]


def _num_tests_at_once(num_gpus: int) -> int:
    """As many as MPS takes; a test has eight ranks at most, which compile kernels on cores of their own."""
    return max(1, min(MOST_PROCESSES * num_gpus // 8, (os.cpu_count() or 1) // 3))


def play(parts: Sequence[Part], out: Path, *, until_s: float) -> list[str]:
    """Plays those that are not done, as long as there is time; how each ended, which is printed too.

    Args:
        until_s: when all has to be over, by ``time.monotonic``.
    """
    said = []
    for part in parts:
        said.append(f"{part.name}: {_play(part, out, until_s - time.monotonic())}")
        _say(said[-1])
    return said


def _play(part: Part, out: Path, left_s: float) -> str:
    done, commit = out / f"{part.name}.done", _commit()
    if done.exists() and done.read_text() == commit:
        return "done before"
    if left_s < min(_LEAST_S, part.limit_s):
        return "not begun, no time is left"
    limit_s = min(part.limit_s, left_s)
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after {limit_s:.0f} s"
        finally:
            _end(process)
    if status:
        _say("".join(log.read_text().splitlines(keepends=True)[-20:]))
        return f"failed (exit status {status})"
    done.write_text(commit)
    return "done"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: asked first, or MPS would outlive it."""
    for number, wait_s in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _commit() -> str:
    """What is measured; a copy that is no checkout of git has none."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def table(path: Path) -> Iterator[str]:
    """A line for each operation of bench that has been written."""
    yield f"{'tokens':>6} {'layout':9} {'wire':5} {'reduce':6} {'SMs':>4} {'us':>8} {'limit':>6}  operation"
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        limit = f"{line['limit_us'] / line['median_us']:.0%}" if line["limit_us"] else ""
        yield (
            f"{line['tokens']:6} {line['layout']:9} {line['wire']:5} {line['reduce']:6} {line['num_sms'] or '':>4} "
            f"{line['median_us']:8.1f} {limit:>6}  {line['op']}"
        )


def main() -> int:
    """Plays and prints. Returns 1 if there is no GPU, or a part failed or is not done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for logs and results")
    parser.add_argument("--ranks", type=int, help="processes; without: a GPU each, at least two")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="that there are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    args = parser.parse_args()
    try:
        num_gpus = num_visible_gpus()
    except BackendUnavailable as error:
        sys.stderr.write(f"benchmarks.parts: error: {error}\n")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    parts = parts_of(num_gpus, args.ranks or max(2, num_gpus), str(args.out.resolve()))
    chosen = [part for part in parts if not args.only or part.name in args.only]
    said = play(chosen, args.out, until_s=time.monotonic() + args.seconds)
    _say("\n".join(table(args.out / "bench.jsonl")))
    return 0 if all(": done" in line for line in said) else 1


if __name__ == "__main__":
    sys.exit(main())
