"""A page of docs/ as a program: the kinds of blocks that it may have, and what they print.

python: all of a page's blocks, one after the other, are one program, which runs in a process of its own. One that
    cannot run here (NOT_RUN) is left out of it.
text: follows a python block, and is all that it printed; a python block without one prints nothing.
diagram: a drawing, which nothing prints.
console: commands, each behind "$ ", and below each what it printed; run in the repository's root.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import linecache
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tests.child import run_child

ROOT = Path(__file__).parents[2]
SHOWN = "python that is not run"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

NOT_RUN = {
    "pip install .": "it would change the environment that runs the tests, and wants the network",
    "pip install '.[cli]'": "the same",
    "pip install ./compat-dist": "the same",
    "docker run --shm-size=8g my-image": "there is no docker where the tests run, and no such image",
    "crossdock mps -- torchrun --nproc-per-node 2 examples/cuda_graph.py": "it needs a GPU",
    "crossdock mps -- torchrun --nproc-per-node 2 examples/decode.py": "it needs a GPU",
    "crossdock trace /tmp/crossdock-late -- torchrun --nproc-per-node 4 examples/late_rank.py": "how long ranks wait "
    "differs from run to run; tests/worlds/test_trace.py runs such commands",
    "crossdock trace FOLDER --profile rank0.json --profile 1=other.json": "the same",
    "GLOO_SOCKET_IFNAME=$INTERFACE torchrun --nnodes 2 --node-rank $NODE --nproc-per-node 2 --master-addr 10.77.0.1 "
    "--master-port 29650 examples/torchrun.py": "it takes two hosts; tests/worlds/test_hosts.py runs it on both",
    "crossdock bench --hosts 2x4 --tokens 256 --rate 200mbit": "times differ; tests/worlds/test_bench_hosts.py runs it",
    "crossdock demo --hosts 2x2": "times differ; tests/worlds/test_bench_hosts.py runs it",
    "crossdock doctor": "what it prints depends on the machine; tests/unit/test_doctor.py runs it",
    "torchrun --nproc-per-node 2 -m crossdock doctor --group": "the same",
    "# Picks in Megatron-LM": "it is not installed where the tests run, and wants a GPU",
    "# Picks in vLLM": "the same",
    "# Picks in SGLang": "the same",
    "# Replayed on GPUs": "CUDA graphs need a GPU; examples/cuda_graph.py does the same, and runs on CPUs too",
    "# Events on GPUs": "streams and events need a GPU",
}
"""Commands, and blocks of python by their first line, that are shown and not run, with the reason."""


class Block(NamedTuple):
    """What is between two fences."""

    kind: str
    """The word behind the first fence; ``SHOWN`` for python that is not run."""
    text: str
    line: int
    """Of the page, where the text begins."""


class Shown(NamedTuple):
    """Code or a command as a page shows it."""

    code: str
    line: int
    said: str
    """What it prints, according to the page."""


def blocks_of(text: str) -> list[Block]:
    """All blocks, of whatever kind."""
    return [
        Block(
            kind=SHOWN if m[1] == "python" and m[2].partition("\n")[0] in NOT_RUN else m[1],
            text=m[2],
            line=text.count("\n", 0, m.start(2)) + 1,
        )
        for m in _FENCE.finditer(text)
    ]


def program_of(text: str) -> list[Shown]:
    """The page's python blocks, each with what it prints."""
    program: list[Shown] = []
    before = ""
    for block in blocks_of(text):
        if block.kind == "python":
            program.append(Shown(block.text, block.line, ""))
        elif block.kind == "text" and before == "python":
            program[-1] = program[-1]._replace(said=block.text)
        before = block.kind
    return program


def commands_of(text: str) -> list[Shown]:
    """The commands of a console block, each with what it prints."""
    commands: list[Shown] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.startswith("$ "):
            commands.append(Shown(line[2:].strip(), number, ""))
        elif commands:
            commands[-1] = commands[-1]._replace(said=commands[-1].said + line)
    return commands


@functools.cache
def printed_by(command: str) -> str:
    """What a command of the shell prints to stdout; a page and an example's docstring may show the same one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    done = run_child(["bash", "-c", command], cwd=ROOT, env=env)
    assert done.returncode == 0, f"$ {command}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def printed_by_page(page: Path) -> list[str]:
    """What each python block of a page prints, run in a fresh process."""
    return json.loads(printed_by(f"python -m tests.house.pages {page}"))


def _run(page: Path) -> list[str]:
    names: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for number, (code, line, _) in enumerate(program_of(page.read_text())):
        where = f"{page.name}, block {number} of python"
        linecache.cache[where] = (len(code), None, code.splitlines(keepends=True), where)
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            try:
                exec(compile(code, where, "exec"), names)
            except Exception as error:
                raise RuntimeError(f"{page}: the block that begins on line {line} has failed") from error
        printed.append(heard.getvalue())
    return printed


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(Path(sys.argv[1]))))
