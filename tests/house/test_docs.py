"""What the pages of docs/ show is what happens."""

import importlib.util
import re
import sys

import pytest

import crossdock
from tests.house.pages import NOT_RUN, ROOT, SHOWN, blocks_of, commands_of, printed_by, printed_by_page, program_of

NOT_PROGRAMS = {
    "testing.md": "shows how to run the tests themselves, and rounds that take hours",
    "performance.md": "shows figures of one machine",
    "log.md": "tells of experiments that are over",
}
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in NOT_PROGRAMS)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_page_has_only_blocks_that_are_run(page):
    text = page.read_text()
    before = ""
    num_fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert num_fences == 2 * len(blocks_of(text)), f"{page.name}: a fence is indented, or not closed"
    for kind, body, line in blocks_of(text):
        where = f"{page.name}, line {line}"
        kinds = ("python", SHOWN, "text", "diagram", "console")
        assert kind in kinds, f"{where}: a block of kind {kind!r} is not run by anything"
        if kind == SHOWN:
            compile(body, where, "exec")
        assert kind != "text" or before == "python", f"{where}: this output follows no python block"
        assert kind != "console" or body.startswith("$ "), f"{where}: a console block begins with a command"
        before = kind


@pages
def test_page_is_a_program_that_prints_what_the_page_shows(page):
    program = program_of(page.read_text())
    for shown, printed in zip(program, printed_by_page(page) if program else [], strict=True):
        assert printed == shown.said, f"{page.name}, the block that begins on line {shown.line}"


@pages
def test_commands_of_a_page_print_what_the_page_shows(page):
    for block in blocks_of(page.read_text()):
        if block.kind == "console":
            for command, _, said in commands_of(block.text):
                assert (said if command in NOT_RUN else printed_by(command)) == said, f"{page.name}: {command}"


@pytest.mark.parametrize("shown", NOT_RUN)
def test_what_is_not_run_is_shown_somewhere(shown):
    fence = "```python\n" if shown.startswith("#") else "$ "
    assert any(f"{fence}{shown}\n" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in [
        *re.findall(r"\]\(([^)#]+)[^)]*\)", text),
        *re.findall(r"^```\{include\} (.+)$", text, re.MULTILINE),
    ]:
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_in_the_reference():
    shown = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
    names = {*crossdock.__all__, *crossdock.nn.__all__} - {"__version__", "autograd"}
    assert [
        name for name in sorted(names) if not re.search(rf"^\.\. auto\w+:: (\S+\.)?{name}$", shown, re.MULTILINE)
    ] == []


def test_figures_are_those_that_their_program_draws():
    """What a layout looks like is taken from rows that have arrived; the rest from its lists."""
    at = ROOT / "docs" / "figures" / "draw.py"
    spec = importlib.util.spec_from_file_location("draw", at)
    draw = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = draw  # its dataclasses look there
    spec.loader.exec_module(draw)
    drawn = {name: drawing.svg() for name, drawing in draw.figures()}
    assert drawn == {path.name: path.read_text() for path in at.parent.glob("*.svg")}
