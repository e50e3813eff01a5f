"""What programs may pass is what signatures.txt says, and is there to be found."""

import inspect
import weakref
from pathlib import Path

import pytest

from crossdock.compat import deep_ep

LINES = [
    line for line in (Path(__file__).parent / "signatures.txt").read_text().splitlines() if line and line[0] != "#"
]


def found(path):
    """The signature of a name in deep_ep, without annotations."""
    value = deep_ep
    for part in path.split("."):
        value = getattr(value, part)
    signature = inspect.signature(value)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition("(")[0])
def test_a_signature_is_what_programs_expect(line):
    path, parenthesis, rest = line.partition("(")
    assert found(path) == parenthesis + rest


@pytest.mark.parametrize("name", ["Buffer", "ElasticBuffer", "EPBuffer", "EPHandle", "EventHandle", "EventOverlap"])
def test_classes_are_pythons_own(name):
    cls = getattr(deep_ep, name)
    assert isinstance(cls, type)
    made = cls.__new__(cls)
    assert weakref.ref(made)() is made
    with pytest.raises(TypeError, match="no_such_keyword"):
        cls(no_such_keyword=1)
