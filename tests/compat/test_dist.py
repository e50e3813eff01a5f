"""The distribution that provides the import name: by a finder behind all others, so that nobody is shadowed."""

import os
import sys
import textwrap
from pathlib import Path

from tests.child import run_child

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "compat-dist" / "src"


def run(program, *paths):
    """In a Python that has read the distribution's .pth, as one does that has it installed."""
    begin = (SOURCE / "crossdock_deep_ep.pth").read_text()
    env = os.environ | {"PYTHONPATH": ":".join(map(str, (*paths, SOURCE, ROOT)))}
    done = run_child([sys.executable, "-c", begin + textwrap.dedent(program)], env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_name_is_found_and_imports_nothing_before_it_is_asked_for():
    assert run("""
        import importlib.util, sys
        assert importlib.util.find_spec("deep_ep") is not None
        assert importlib.util.find_spec("deep_epp") is None
        assert "torch" not in sys.modules
        from deep_ep.utils.math import align
        import deep_ep, deep_ep_cpp
        from deep_ep_v2 import EPBuffer
        from crossdock.compat import install
        assert install() is deep_ep and deep_ep.EPBuffer is EPBuffer
        print(deep_ep.__name__, align(3, 4))
    """) == ["crossdock.compat.deep_ep", "4"]


def test_install_knows_its_own_finder():
    assert run("""
        from crossdock.compat import install
        print(install().__name__)
    """) == ["crossdock.compat.deep_ep"]


def test_one_that_is_installed_is_found_first(tmp_path):
    (tmp_path / "deep_ep.py").write_text("is_real = True\n")
    assert run("import deep_ep\nprint(deep_ep.is_real)", tmp_path) == ["True"]


def test_without_crossdock_there_is_no_such_name():
    assert run("""
        import importlib.util, sys
        sys.modules["crossdock"] = None
        print(importlib.util.find_spec("deep_ep"))
    """) == ["None"]


def test_the_script_says_what_each_program_gave(tmp_path):
    tests = tmp_path / "tests" / "elastic"
    tests.mkdir(parents=True)
    (tests / "test_barrier.py").write_text(
        "import deep_ep\nimport sys\nassert deep_ep.ElasticBuffer\nassert sys.argv[1:] == ['--num-processes', '3']\n"
    )
    (tests / "test_ep.py").write_text("import deep_ep\ndeep_ep.EngramBuffer()\n")
    env = os.environ | {"PYTHON": sys.executable, "RANKS": "3"}
    done = run_child([ROOT / "scripts" / "deep-ep-tests", tmp_path], env=env)
    said = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "passed in" in said["elastic/test_barrier"]
    assert "EngramBuffer is not supported" in said["elastic/test_ep"]
    assert "not in this checkout" in said["legacy/test_intranode"]
    assert done.returncode == 1
    done = run_child([ROOT / "scripts" / "deep-ep-tests"], env=env)
    assert done.returncode == 2
    assert "name the folder" in done.stderr
