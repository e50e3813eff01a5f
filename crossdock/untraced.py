"""Functions that ``torch.compile`` calls as they are: what it compiles ends before such a call and goes on behind it.

Words to peers and rows in shared memory are nothing that a graph of torch operations can have. The ops of
``crossdock.ops`` are; layers are made of them. ``torch.compiler.disable`` does the same, but imports the compiler,
which takes seconds also where nobody compiles, and costs calls of Python.

A function is marked with ``untraced``, and begins with::

    if "torch._dynamo" in sys.modules and (
        torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None
    ):
        return apart(function)(*args, **kwargs)

That is where a compiler looks at what is called now: in a graph, or behind a break of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

__all__ = ["apart", "get_eval_frame_callback", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Marks it as one that a compiler does not look into."""
    _marked.append(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - as torch.compiler.disable does
    return function


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with all that it calls, where no compiler follows. Tuples in what it gives are plain ones."""
    if function not in _kept:
        for each in (*_marked, apart):  # compilers leave the code of all of them alone from now on
            torch._dynamo.decorators.skip(each)  # noqa: SLF001 - there is no public way to it
        _kept[function] = torch.compiler.disable(functools.partial(_plainly, function))  # type: ignore[no-untyped-call]
    return _kept[function]


def _plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it gives; in tuples of classes of their own a compiler would see what lies there, past their methods."""
    result = function(*args, **kwargs)
    if type(result) is tuple:
        return tuple(tuple(part) if isinstance(part, tuple) else part for part in result)
    return result


_marked: list[Callable[..., Any]] = []
_kept: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Not ``functools.cache``, of which the compiler warns."""
