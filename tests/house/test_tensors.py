"""Every tensor that the library makes names its dtype and its device: what a program has as its default is not ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "crossdock"
MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "sparse_csr_tensor", "tensor", "zeros"),
}
NAMED = {"dtype", "device"}
ELSEWHERE = ("cli/",)
"""Programs of their own, and what runs with the tensors of one."""


def unnamed(source: str) -> list[str]:
    """Calls of torch's makers of tensors without dtype or device.

    >>> unnamed("torch.zeros(2, dtype=torch.int32)")
    ['line 1: torch.zeros without device']
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of = node.func.value
        if isinstance(of, ast.Name) and of.id == "torch" and node.func.attr in MAKERS:
            missing = NAMED - {keyword.arg for keyword in node.keywords}
            if node.func.attr in ("as_tensor", "asarray"):
                missing -= {"dtype"}  # what it is given has one
            if missing:
                found.append(f"line {node.lineno}: torch.{node.func.attr} without {' and '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if not str(path.relative_to(PACKAGE)).startswith(ELSEWHERE)],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_tensor_names_its_dtype_and_its_device(path):
    assert unnamed(path.read_text()) == []


def test_one_that_does_not_is_found():
    assert unnamed("x = torch.zeros(2)\ny = torch.empty(3, device='cpu')") == [
        "line 1: torch.zeros without device and dtype",
        "line 2: torch.empty without dtype",
    ]
    assert unnamed("torch.ones(2, dtype=d, device=e), torch.from_numpy(a), x.new_zeros(3), numpy.zeros(3)") == []
