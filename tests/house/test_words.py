"""One word means one thing (the glossary of docs/concepts.md): words that were once mixed stay apart."""

import re

import pytest

from tests.house.pages import ROOT

CODE = sorted((ROOT / "crossdock").rglob("*.py"))
INSTEAD = {
    r"\bclerk\b": "coordinator",
    r"\bhellos\b": "gathered",
    r"\bwishes\b|\bWishes\b": "LaunchOptions",
    r"\bmulti-?processors?\b": "SM",
    r"\bverdict\b": "go flag",
    r"\bone_kernel\b|\bis_whole\b|\btakes_whole_": "fused",
    r"\bOutgoing\b|\boutgoing\b": "Batch, send_starts",
    r"\bengine=|\bwishes=": "mover, launch_options",
    r"\bwide=(True|False)": "unquantized",
    r"\brecord_bytes\b|\bpush_records\b|\bunpack_records\b": "metadata",
    r"\borigins\b": "src_rows",
    r"\blanding\b": "returned",
}
"""Words that the code must not have, and those that it has in their place."""
ONLY_IN = {
    r"\bhost_failure\b": "backends/cuda",
    r"\breturn_rows\b": "backends/cuda",
    r"\bsend_starts\b": "(backends/cuda|plan.py|backends/cpu)",
}
"""Words of one room."""


@pytest.mark.parametrize("word", INSTEAD)
def test_code_says_it_by_the_glossarys_word(word):
    found = [
        f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
        for path in CODE
        for i, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(word, line) and "multi_processor_count" not in line
    ]
    assert not found, f"say {INSTEAD[word]}: " + "\n".join(found)


@pytest.mark.parametrize("word", ONLY_IN)
def test_words_of_one_room_stay_there(word):
    rooms = [str(path.relative_to(ROOT / "crossdock")) for path in CODE if re.search(word, path.read_text())]
    assert rooms, "a word that nobody uses any more"
    assert [room for room in rooms if not re.match(ONLY_IN[word], room)] == []


def test_every_word_of_the_glossary_is_used():
    page = (ROOT / "docs" / "concepts.md").read_text()
    table = page.partition("| word | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    names = [name for line in table.splitlines() for name in re.findall(r"`(\w{3,})`", line.split("|")[1])]
    assert {"dst_rows", "return_rows", "src_rows"} <= set(names)
    code = "\n".join(path.read_text() for path in CODE)
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
