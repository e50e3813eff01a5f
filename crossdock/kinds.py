"""Kinds of calls: what decides how a call is checked and issued, whatever its numbers of tokens and rows.

A call whose kind has succeeded before is a *prepared* one: what its kind decides is not checked again. Backends have
kinds of their own, of what they launch. Nothing of a kind says how many tokens or rows there are: a prefill
brings other ones every time.

Letters: T tokens here, K top-k, H hidden, R rows received.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as _num_dispatch_modes
from torch._C._functorch import peek_interpreter_stack as _top_transform
from torch.autograd import forward_ad

from crossdock.consent import Word
from crossdock.extent import Extent
from crossdock.plan import Plan
from crossdock.wire import Quantized

Kind = TypeVar("Kind")
Key = tuple[Hashable, ...]
NUM_CALL_KINDS = 256
"""Kinds of calls that a buffer keeps, of those that have succeeded: their calls are prepared ones."""
_NUM_LAUNCHES = 8
"""Kinds of launches that are kept with each: a cached dispatch has them by its plan's extent."""


class CallKind:
    """One kind of call of one buffer."""

    __slots__ = ("extent", "launches", "takes_picks_as_given", "words")

    def __init__(self, extent: Extent | None = None) -> None:
        self.extent = extent
        """Of a fresh dispatch: what it uses of a receive slot."""
        self.launches: Kinds[Any] = Kinds(_NUM_LAUNCHES)
        """What the backend launches for it, by what decides that beside the kind."""
        self.takes_picks_as_given = False
        """Whether ``topk_idx`` is int64 without gaps, and so goes to the backend as it is."""
        self.words: dict[tuple[int, int], Word] = {}
        """This rank's words, by slot and output slot, where they say nothing of the plan."""


class Kinds(dict[Hashable, Kind]):
    """Kinds by what decides them, as many as there is room for: each more takes the place of the oldest.

    >>> kinds = Kinds(most=2)
    >>> [kinds.keep(name, name.upper()) for name in ("a", "b", "c")], kinds
    (['A', 'B', 'C'], {'b': 'B', 'c': 'C'})
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def keep(self, key: Hashable, kind: Kind) -> Kind:
        """Remembers a kind, and gives it."""
        if len(self) >= self._most:
            del self[next(iter(self))]
        self[key] = kind
        return kind


def key_of(options: Key, tensors: Sequence[Any]) -> Key | None:
    """What a call's kind depends on: options, and dtypes, devices, trailing shapes, strides, alignments of its tensors.

    None for a call that is never prepared: with a tensor that wants a gradient, or that is more than a plain tensor
    (fake, functional, distributed, sparse), or under a mode or transform of torch's that sees all operations.

    Args:
        options: hashable, the verb first.
        tensors: tensors, ``Quantized``, plans, or None.
    """
    if _num_dispatch_modes() or _top_transform() is not None or forward_ad._current_level >= 0:  # noqa: SLF001 - see direct
        return None
    parts: list[Hashable] = [options]
    for given in tensors:
        if given.__class__ is Tensor:
            if given.is_neg() or given.dtype.is_complex or (given.requires_grad and torch.is_grad_enabled()):
                return None
            try:
                parts += ((given.dtype, given.device, given.shape[1:], given.stride(), given.data_ptr() & 15),)
            except RuntimeError:  # sparse, nested, batched: there is no such memory
                return None
        elif given is None:
            parts += (None,)
        elif given.__class__ is Quantized:
            if (part := key_of((), given)) is None:
                return None
            parts += (part,)
        elif isinstance(given, Plan):
            parts += (Plan,)
        else:
            return None
    return tuple(parts)
