"""What the README shows is what happens."""

import ast

from tests.house.pages import ROOT, blocks_of, printed_by


def test_readme_program_prints_what_the_readme_shows():
    """It is the first example, which is run as it stands."""
    blocks = blocks_of((ROOT / "README.md").read_text())
    (at,) = [i for i, block in enumerate(blocks) if block.kind == "python"]
    program, shown = blocks[at].text, blocks[at + 1].text
    source = (ROOT / "examples" / "eight_lines.py").read_text()
    docstring = ast.parse(source).body[0]
    assert "".join(source.splitlines(keepends=True)[docstring.end_lineno :]).strip() == program.strip()
    assert printed_by("python examples/eight_lines.py") == shown
