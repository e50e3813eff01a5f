"""What an example's docstring says that it prints is what it prints."""

import ast
import importlib.util
import textwrap

import pytest

from tests.house.pages import NOT_RUN, ROOT, commands_of, printed_by

NEEDED = {"hugging_face.py": "transformers"}
"""What an example imports that the suite does without."""
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_prints_what_its_docstring_shows(example):
    package = NEEDED.get(example.name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install 'crossdock[examples]' (Python 3.11 or newer)")
    lines = ast.get_docstring(ast.parse(example.read_text())).splitlines(keepends=True)
    commands = commands_of(textwrap.dedent("".join(line for line in lines if line.startswith("    "))))
    assert commands, f"{example.name}: its docstring shows no command, indented and behind '$ '"
    for command, _, said in commands:
        assert command.endswith(f" examples/{example.name}")
        assert (said if command in NOT_RUN else printed_by(command)) == said
