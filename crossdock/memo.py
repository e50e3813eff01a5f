"""Plans by the tensors that they were made from, so that what is given the same tensors again makes no plan again.

A ``torch.library`` op is given a plan as its tensors. A step has five such ops, and makes one plan.
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
    """A buffer's plans, each for as long as the tensors that it was made from.

    One of these, the **token**, is empty, and no plan holds it: ``local_idx`` where a row is one pick, else
    ``partial_rows``. Its storage says which plan is meant, and when nobody can ask for it any more: autograd's saved
    tensors, a compiled graph, a checkpoint or the caller's ``SavedPlan`` keep it, all in the same way. The other
    tensors are compared by address, which a plan that holds them keeps taken, and by shape; those that decide the
    plan also by version. So what was copied or changed in place is new, as everything is once a rank is masked.

    What a CUDA graph gives lies in the same memory at each replay and has no version to tell. So in a capture only
    plans are kept whose tensors it makes too, and only those are found there: a replay writes both.

    Threads may share it: backward passes run on others than forward ones.
    """

    def __init__(self, spec: Spec) -> None:
        self._token = PlanTensors._fields.index("local_idx" if spec.layout.per_pick else "partial_rows")
        self._entries: dict[int, _Entry] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tensors: PlanTensors, masked: tuple[int, ...], *, is_capturing: bool) -> Plan | None:
        """The plan that was kept for these tensors since those ranks were masked, or None."""
        if (token := self._token_of(tensors)) is None:
            return None
        with self._lock:
            entry = self._entries.get(token)
        if entry is None or entry.plan.masked != masked or (is_capturing and not entry.is_captured):
            return None
        return entry.plan if entry.key == _key(tensors) else None

    def keep(self, tensors: PlanTensors, plan: Plan, *, is_capturing: bool) -> None:
        """Keeps the plan of a dispatch, which has just made the tensors too."""
        self._put(tensors, plan, is_captured=is_capturing)

    def keep_remade(self, tensors: PlanTensors, plan: Plan, *, is_capturing: bool) -> None:
        """Keeps a plan that was made of tensors from elsewhere, if these cannot change but with their version."""
        token = self._token_of(tensors)
        entry = None if token is None else self._entries.get(token)
        if not is_capturing and (entry is None or not entry.is_captured):
            self._put(tensors, plan, is_captured=False)

    def clear(self) -> None:
        """Forgets all of them."""
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
        del gone  # outside of the lock: whatever else is freed with them may come back here

    def _token_of(self, tensors: PlanTensors) -> int | None:
        """What names the token's storage; None where there is none, or changes in place leave no trace."""
        token = tensors[self._token]
        if token.numel() or any(tensor.is_inference() for tensor in tensors):
            return None
        storage: int = token.untyped_storage()._cdata  # noqa: SLF001 - torch's own name for a storage
        return storage


def _key(tensors: PlanTensors) -> tuple[Any, ...]:
    versions = tensors.topk_idx._version, tensors.counts._version  # noqa: SLF001 - there is no other way to ask
    return (*versions, *map(_place, tensors))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
