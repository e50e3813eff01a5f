"""What a test is told of a program that hangs."""

import sys

import pytest

from tests import child


def test_a_program_that_hangs_says_what_it_printed_and_where_it_is(monkeypatch):
    monkeypatch.setattr(child, "HUNG_S", 1.5)
    program = "import time\ndef hang():\n    time.sleep(100)\nprint('before', flush=True)\nhang()"
    with pytest.raises(AssertionError, match=r"(?s)did not end within 1.5 s.*before.*in hang"):
        child.run_child([sys.executable, "-c", program])
