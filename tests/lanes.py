"""Lanes: pytest processes side by side that share out the modules of one run, because most tests leave a core idle.

``pytest -p tests.lanes --lane=FOLDER`` is one. Each lane collects everything, and runs a module if it is the first to
leave the module's name in the folder. ``scripts/test`` starts them.

Not ``--lane FOLDER``: before it knows our options, pytest takes a path that stands by itself for a test's, and looks
for its settings beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = (
    "tests/unit/test_cuda_code.py",
    "tests/worlds/test_interrupts.py",
    "tests/worlds/test_nodes.py",
    "tests/worlds/test_cuda_interpreted.py",
    "tests/worlds/test_compiled.py",
    "tests/worlds/test_hosts.py",
    "tests/house/test_examples.py",
    "tests/house/test_docs.py",
    "tests/worlds/test_autograd.py",
    "tests/worlds/test_bench.py",
    "tests/worlds/test_demo.py",
    "tests/worlds/test_dispatch.py",
    "tests/worlds/test_combine.py",
)
"""Modules of about a minute, longest first: they are taken first, so that lanes end together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", type=Path, metavar="FOLDER", help="run what no other lane with this folder has taken")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own loop, over this lane's share."""
    folder = session.config.getoption("lane")
    if folder is not None and session.config.inipath is None:
        raise pytest.UsageError(f"a lane without the project's settings; say --lane={folder}, with an equals sign")
    if folder is None or session.config.option.collectonly or session.testsfailed:
        return None
    share = taken(session.items, folder)
    item = next(share, None)
    while item is not None:
        item_behind = next(share, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=item_behind)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = item_behind
    return True


def taken(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """The items of modules that nobody has taken yet; each is taken when its first item is asked for."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    longest = [name for name in LONGEST if name in modules]
    for name in dict.fromkeys([*longest, *modules]):
        try:
            (folder / name.replace("/", "-")).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from modules[name]
