"""Plans on the device: all tables of one lie in one allocation, and are cut out of it when somebody asks.

Letters: T tokens here, J rows of a token, K top-k, R rows, C rows of a receive slot, L local experts, P ranks, N
segments, W counts, M max_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from crossdock.arena import Arena
from crossdock.backends.cuda.kernels.groups import Places
from crossdock.backends.cuda.kernels.plan import HOST_STAMP, SCALARS
from crossdock.extent import Extent
from crossdock.plan import Plan

_ALIGNED_BYTES = 128
"""Tables of fixed size begin at whole cache lines."""


class Part(NamedTuple):
    """A tensor in an allocation: its first byte, its shape and type."""

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of it."""
        num: int = math.prod(self.shape)
        return num * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """How the memory of a buffer's plans is divided, as ``kernels.tables`` reads it."""

    places: Places
    """Where tables of fixed size begin."""
    end: int
    """Where those of T tokens begin."""
    fixed: dict[str, Part]
    """These tables, by name."""
    num_columns: int
    """Rows of a token, at most."""
    num_pairs: int
    """Pairs of a token, at most; 0 where plans have none."""
    num_topk: int
    num_counts: int

    @classmethod
    def of(cls, arena: Arena, *, num_pairs: int) -> PlanShape:
        """The same for all plans of a buffer."""
        spec, num_ranks = arena.spec, arena.topology.num_ranks
        num_local, num_counts = spec.num_local_experts(num_ranks), spec.num_counts(arena.topology)
        num_segments = num_local if spec.layout.per_pick else 1
        partial_rows = (num_ranks * spec.max_tokens if num_pairs else 0, spec.num_topk)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "counts": ((num_ranks, num_counts), torch.int64),
            "scalars": ((SCALARS.value,), torch.int32),
            "num_tokens_per_expert": ((num_local,), torch.int32),
            "segment_starts": ((num_segments + 1,), torch.int32),
            "incoming": ((3, num_segments * num_ranks), torch.int32),
            "pair_incoming": ((3, num_ranks if num_pairs else 0), torch.int32),
            "partial_rows": (partial_rows, torch.int32),
        }
        fixed, end = {}, 0
        for name, (shape, dtype) in shapes.items():
            fixed[name] = Part(end, shape, dtype)
            end += -(-fixed[name].num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return cls(
            places=Places(*(part.first for part in fixed.values()), end),  # type: ignore[call-arg]
            end=end,
            fixed=fixed,
            num_columns=spec.num_topk if spec.layout.per_pick else min(spec.num_topk, num_ranks),
            num_pairs=num_pairs,
            num_topk=spec.num_topk,
            num_counts=num_counts,
        )

    def num_words(self, num_tokens: int) -> int:
        """Words of 4 bytes of a plan of so many tokens."""
        num_bytes = 8 * self.num_topk + 12 * (self.num_columns + self.num_pairs)
        return (self.end + num_tokens * num_bytes) // 4

    def part(self, name: str, num_tokens: int) -> Part:
        """Where one of the tables lies in a plan of so many tokens.

        Raises:
            KeyError: there is none of that name.
        """
        if name in self.fixed:
            return self.fixed[name]
        num_columns, num_pairs = self.num_columns, self.num_pairs
        first = self.end
        for other, width, dtype in (
            ("dst_rows", num_columns, torch.int64),
            ("topk_idx", self.num_topk, torch.int64),
            ("pair_dst_rows", num_pairs, torch.int64),
            ("return_rows", num_columns, torch.int32),
            ("pair_return_rows", num_pairs, torch.int32),
        ):
            part = Part(first, (num_tokens, width), dtype)
            if name == other:
                return part
            first += part.num_bytes
        raise KeyError(name)


_LOOKS = 1024
"""Looks at host memory for one at the device, which takes microseconds."""


class HostStamp:
    """Whether the host counts of a dispatch are there: the kernel that writes them stamps them last."""

    def __init__(self, told: npt.NDArray[np.int64], is_done: Callable[[], bool]) -> None:
        self._told = told
        self._is_done = is_done
        self._num_looks = 0

    def query(self) -> bool:
        """Whether they are there; now and then looks whether the device is done, which raises what went wrong there."""
        self._num_looks += 1
        if self._told[HOST_STAMP.value]:
            return True
        return self._num_looks % _LOOKS == 0 and self._is_done()


@dataclass(eq=False)
class HostCounts:
    """What the host is told of a fresh dispatch."""

    row: Int64[Tensor, "words"]
    """In host memory; see ``kernels.plan``."""
    told: npt.NDArray[np.int64]
    """The same memory, to be read: that takes a tenth of the time of asking the tensor."""
    is_captured: bool
    """Whether a graph writes it, at each replay."""
    tells: bool = False
    """Whether the host waits for how many rows come; else it is only told of an overflow."""
    number: int = 0
    """Of the dispatch whose host counts these are now, among those that had any."""
    stamp: int = 0
    """That of the plan whose host counts these are now."""
    extent: Extent | None = None
    """That of the same plan; None where nobody has had them yet."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DevicePlan(Plan):
    """A plan whose rows are moved by kernels, and whose tables lie in ``memory``. Made by ``of``."""

    memory: Int32[Tensor, "words"]
    address: int
    """Where it begins."""
    shape: PlanShape
    host_counts: HostCounts | None
    """None when the host knows already."""
    too_many: int = 0
    """This rank's tokens, as its word tells them, where they are more than the dispatch might have: none was sent."""
    num_pairs: int | None = None
    """Pairs that came here, where the host was told."""
    told_tokens: list[int] | None = None
    """Picks of each local expert, where the host was told."""
    src_idx: Int32[Tensor, "R"] | None = None
    """Of plans that were made again: then nothing has to travel beside rows."""
    local_idx: Int32[Tensor, "R K"] | None = None

    @classmethod
    def of(cls, **fields: Any) -> DevicePlan:
        """One with such fields; tables among them stand for those in memory."""
        plan = cls.__new__(cls)
        plan.__dict__.update(fields)
        return plan

    @property
    def num_tokens_per_expert_list(self) -> list[int] | None:
        """See Plan."""
        return self.told_tokens

    @property
    def num_partial_rows(self) -> int:
        """See Plan. Where the host was not told, those for which there is room."""
        if not self.shape.num_pairs:
            return 0
        return self.shape.part("partial_rows", 0).shape[0] if self.num_pairs is None else self.num_pairs

    def changed(self, **fields: Any) -> DevicePlan:
        """The same with other fields."""
        return DevicePlan.of(**(self.__dict__ | fields))

    def table(self, name: str) -> Tensor:
        """One of the tables in memory, by its name; see ``kernels.tables``."""
        part = self.shape.part(name, self.num_tokens)
        words = self.memory[part.first // 4 : (part.first + part.num_bytes) // 4]
        return words.view(part.dtype).view(part.shape)

    if not TYPE_CHECKING:

        @property
        def partial_rows(self) -> Tensor | None:
            """See Plan. A copy: what an operator of torch gives may not share memory."""
            if "partial_rows" not in self.__dict__:
                rows = self.table("partial_rows")[: self.num_pairs].clone() if self.shape.num_pairs else None
                self.__dict__["partial_rows"] = rows
            return self.__dict__["partial_rows"]

        def __getattr__(self, name: str) -> Any:
            """A table is cut out when it is first asked for."""
            if name.startswith("__") or name == "shape":
                raise AttributeError(name)
            try:
                table = self.__dict__[name] = self.table(name)
            except KeyError:
                raise AttributeError(f"{type(self).__name__} has no {name!r}") from None
            return table
