"""What stands behind the tensors of a handle, found by their memory: also by other tensors over it."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")
_FEW = 64
"""Values that are kept before those whose tensors are gone are looked for."""


class ByStorage(Generic[Value]):
    """Values by the storage of a tensor; an entry lives as long as the storage does."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, Value]] = {}
        self._most = _FEW

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, tensor: Tensor, value: Value) -> None:
        """From now on ``find`` gives the value, of any tensor over the same memory."""
        storage = tensor.untyped_storage()
        if len(self._entries) >= self._most:
            self._entries = {key: entry for key, entry in self._entries.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self._most = 2 * len(self._entries) + _FEW
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._entries[storage._cdata] = ref, value  # noqa: SLF001 - the identity that StorageWeakRef uses

    def find(self, tensor: Tensor) -> Value | None:
        """The value that was kept with this tensor's memory."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)  # noqa: SLF001 - as above
        return None if entry is None or entry[0].expired() else entry[1]  # type: ignore[no-untyped-call]
