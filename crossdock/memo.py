"""Plans by the tensors that determine them, so that the same tensors give the same plan without remaking it.

A ``torch.library`` op takes a plan as tensors. A training step has five such ops, and makes one plan.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from crossdock.backends.base import PlanTensors
from crossdock.plan import Plan
from crossdock.spec import Spec


class _Entry(NamedTuple):
    token: StorageWeakRef
    key: tuple[Any, ...]
    plan: Plan
    is_captured: bool


class PlanMemo:
    """A buffer's plans by ``PlanTensors``; each entry lives as long as one of these tensors.

    That tensor, the **token**, is empty, and no plan holds it: ``local_idx`` where a row is one pick, else
    ``partial_rows``. Its storage is the key of the entry, which is dropped once the storage is freed. Autograd's saved
    tensors, a compiled graph, a checkpoint and the caller's ``SavedPlan`` all keep it alive. The other tensors must
    match in address (the plan holds them, so that no other tensor gets it), shape and strides; ``topk_idx`` and
    ``counts``, which determine the plan, also in version. Tensors that were copied or changed in place are therefore
    not found, and no plan is found after a further rank has been masked.

    A captured CUDA graph writes its tensors in place at each replay, without a new version. A capture therefore finds
    only plans whose tensors the capture itself makes: a replay then writes plan and tensors alike.

    Thread-safe: backward passes run on other threads than forward passes.
    """

    def __init__(self, spec: Spec) -> None:
        self._token = PlanTensors._fields.index("local_idx" if spec.layout.per_pick else "partial_rows")
        self._entries: dict[int, _Entry] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tensors: PlanTensors, masked: tuple[int, ...], *, is_capturing: bool) -> Plan | None:
        """The plan kept for these tensors if it was made with the same masked ranks, else None."""
        if (token := self._token_of(tensors)) is None:
            return None
        with self._lock:
            entry = self._entries.get(token)
        if entry is None or entry.plan.masked != masked or (is_capturing and not entry.is_captured):
            return None
        return entry.plan if entry.key == _key(tensors) else None

    def keep(self, tensors: PlanTensors, plan: Plan, *, is_capturing: bool) -> None:
        """Keeps the plan of a dispatch by the tensors that the same dispatch has made."""
        self._put(tensors, plan, is_captured=is_capturing)

    def keep_remade(self, tensors: PlanTensors, plan: Plan, *, is_capturing: bool) -> None:
        """Keeps a plan remade from tensors, unless these may change without a new version (captured graphs)."""
        token = self._token_of(tensors)
        entry = None if token is None else self._entries.get(token)
        if not is_capturing and (entry is None or not entry.is_captured):
            self._put(tensors, plan, is_captured=False)

    def clear(self) -> None:
        """Removes all plans."""
        with self._lock:
            self._entries.clear()

    def _put(self, tensors: PlanTensors, plan: Plan, *, is_captured: bool) -> None:
        if (token := self._token_of(tensors)) is None:
            return
        ref = StorageWeakRef(tensors[self._token].untyped_storage())  # type: ignore[no-untyped-call]
        entry = _Entry(ref, _key(tensors), plan, is_captured)
        with self._lock:
            dead = [key for key, kept in self._entries.items() if kept.token.expired()]  # type: ignore[no-untyped-call]
            gone = [self._entries.pop(key) for key in dead]
            self._entries[token] = entry
        del gone  # outside of the lock: destructors that run now may call this object

    def _token_of(self, tensors: PlanTensors) -> int | None:
        """The identity of the token's storage. None if the token is not empty, or any is an inference tensor."""
        token = tensors[self._token]
        if token.numel() or any(tensor.is_inference() for tensor in tensors):
            return None
        storage: int = token.untyped_storage()._cdata  # noqa: SLF001 - the identity that StorageWeakRef uses
        return storage


def _key(tensors: PlanTensors) -> tuple[Any, ...]:
    versions = tensors.topk_idx._version, tensors.counts._version  # noqa: SLF001 - there is no other way to ask
    return (*versions, *map(_place, tensors))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
