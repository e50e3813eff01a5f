"""Ops of ``torch.library`` without torch's dispatcher, where a call is made at once and nobody looks.

To pass an op through the dispatcher takes torch some hundred calls of Python, more than all that a verb does. Whoever
looks at ops needs that: compilers, tensors without contents, modes (selective checkpoints, counters of flops),
transforms, tensors of other classes. Where none of them is, the same function runs, and its gradient is recorded by the
same formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from crossdock.errors import ConfigError, NotSupported

_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize  # noqa: SLF001 - there is no public way to it
_PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors that change nothing in an op."""


class Direct:
    """An op that is called directly where it can be.

    Args:
        op: whose function is called.
        setup, backward: as for ``torch.library.register_autograd``, which is done here; None: it has no gradient.
    """

    def __init__(
        self,
        op: CustomOpDef,
        setup: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.op = op
        self._body: Callable[..., Any] = op._init_fn  # noqa: SLF001 - there is no public way to it
        self._function = None
        if setup is not None and backward is not None:
            op.register_autograd(backward, setup_context=setup)
            self._function = _function(op, setup, backward)

    def __call__(self, *args: Any) -> Any:
        """What the op gives of these arguments.

        Raises:
            ConfigError: in a transform of torch.func, or with tangents of forward-mode gradients.
            NotSupported: in torch.export.
        """
        if torch.compiler.is_compiling():
            if torch.compiler._is_exporting_flag:  # noqa: SLF001 - up to 2.12 Dynamo takes is_exporting() for True
                raise NotSupported(
                    "torch.export cannot have a call that ranks make together: its buffer is of this process and no "
                    "part of a program; use torch.compile"
                )
            return self.op(*args)
        check_no_transform(args, functionalized=True)
        if _are_seen(args):
            return self.op(*args)
        if not torch.is_grad_enabled():
            return self._body(*args)
        return self.op(*args) if self._function is None else self._function.apply(*args)


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode gradients, may be about tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0  # noqa: SLF001 - as above


def check_no_transform(args: Sequence[Any], *, functionalized: bool = False) -> None:
    """Raises ConfigError where torch follows operations through what no call can be followed through.

    Args:
        functionalized: such tensors are allowed: an op that is passed through the dispatcher takes them.
    """
    if not is_transformed():
        return
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()  # noqa: SLF001 - as above
    if interpreter is not None:
        key = interpreter.key()
        if functionalized and key == _FUNCTIONALIZE:
            return
        what = f"torch.func ({key.name.lower()})"
    elif any(forward_ad.unpack_dual(arg).tangent is not None for arg in args if isinstance(arg, Tensor)):  # type: ignore[no-untyped-call]
        what = "forward-mode gradients"
    else:
        return
    raise ConfigError(
        f"{what} cannot follow a call that ranks make together; make it outside, with plain tensors, and for gradients "
        f"use crossdock.autograd, requires_grad_() and backward()"
    )


def _are_seen(args: Sequence[Any]) -> bool:
    """Whether somebody looks at calls of ops, or at an op with such arguments."""
    if torch._C._len_torch_dispatch_stack() or is_transformed():  # noqa: SLF001 - as above
        return True
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.__class__ not in _PLAIN:
                return True
        elif isinstance(arg, (list, tuple)) and any(each.__class__ not in _PLAIN for each in arg):
            return True
    return False


def _function(op: CustomOpDef, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> Any:
    """The op as a function of autograd, for which a list is one argument, without a gradient."""
    body: Callable[..., Any] = op._init_fn  # noqa: SLF001 - as above

    def forward(ctx: Any, *args: Any) -> Any:  # with a setup_context, torch would look at its signature in each call
        result = body(*args)
        setup(ctx, args, result)
        return result

    def of_arguments(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return tuple(None if isinstance(grad, list) else grad for grad in backward(ctx, *grads))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_arguments)}
    return type(op._name, (torch.autograd.Function,), methods)  # noqa: SLF001 - as above
