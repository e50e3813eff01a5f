"""Which physical expert is a copy of which logical one, so that a popular expert can be held by several ranks.

Letters: T tokens, K top-k, E logical experts, V physical experts, P ranks, L = V / P slots of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int, Int64, Real
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.spec import check_experts


class Placement:
    """A logical expert for every physical one: rank ``r`` holds physical experts ``r * L .. (r + 1) * L - 1``.

    The gate chooses logical experts, the buffer's Spec counts physical ones. Weights follow by indexing:
    ``w1[placement.physical_to_logical]`` gives the physical stack of a logical one.

    Args:
        physical_to_logical: [V], every logical expert 0 .. E - 1 at least once.

    Raises:
        ConfigError: it is no such list.

    >>> placement = Placement([0, 1, 0, 2])
    >>> placement.to_physical(torch.tensor([[0, 1], [0, 2], [0, -1]]))
    tensor([[ 0,  1],
            [ 2,  3],
            [ 0, -1]])
    """

    physical_to_logical: Int64[Tensor, "V"]
    num_replicas: Int64[Tensor, "E"]
    """Copies of each logical expert."""
    replicas: Int64[Tensor, "E most"]
    """Each logical expert's physical ones, rising; the last again where it has fewer than the most replicated one."""

    def __init__(self, physical_to_logical: Int[Tensor, "V"] | Sequence[int]) -> None:
        table = torch.as_tensor(physical_to_logical, device="cpu")
        if table.dim() != 1 or table.numel() == 0 or table.is_floating_point() or table.dtype == torch.bool:
            raise ConfigError(
                f"physical_to_logical is {table.dtype} of shape {list(table.shape)}; pass one logical expert's id per "
                f"physical expert, integers [V]"
            )
        table = table.to(torch.int64)
        if int(table.min()) < 0:
            raise ConfigError(f"physical_to_logical has {int(table.min())}; logical experts have ids from 0")
        counts = table.bincount()
        if int(counts.min()) == 0:
            raise ConfigError(
                f"physical_to_logical leaves out logical expert {int(counts.argmin())} of 0..{len(counts) - 1}; every "
                f"one needs a physical expert"
            )
        self.physical_to_logical = table
        self.num_replicas = counts
        starts = counts.cumsum(0) - counts
        nth = torch.arange(int(counts.max()), dtype=torch.int64, device="cpu")
        nth = nth.minimum(counts.unsqueeze(1) - 1)  # [E, most]
        self.replicas = table.argsort(stable=True)[starts.unsqueeze(1) + nth]

    @property
    def num_physical(self) -> int:
        """V, the ``num_experts`` of a Spec."""
        return self.physical_to_logical.numel()

    @property
    def num_logical(self) -> int:
        """E, the ``num_experts`` of a gate."""
        return self.num_replicas.numel()

    def to_physical(self, topk_idx: Int[Tensor, "T K"], *, start: int = 0) -> Int[Tensor, "T K"]:
        """The same picks as physical experts; a token's picks stay distinct, and -1 stays -1.

        Token ``t`` uses replica ``(start + t) % num_replicas`` of each of its experts: the same on every run, and even
        over tokens. With each rank's own number as ``start``, ranks with one token each do not all use replica 0.
        """
        device = topk_idx.device
        num_replicas, replicas = self.num_replicas.to(device), self.replicas.to(device)
        logical = topk_idx.to(torch.int64).clamp_min(0)
        tokens = torch.arange(start, start + topk_idx.shape[0], dtype=torch.int64, device=device).unsqueeze(1)
        physical = replicas[logical, tokens % num_replicas[logical]]
        return torch.where(topk_idx >= 0, physical, -1).to(topk_idx.dtype)

    @classmethod
    def balanced(cls, load: Real[Tensor, "E"] | Sequence[float], *, num_physical: int, num_ranks: int) -> Placement:
        """A placement for a load: replicates the heaviest experts and spreads all over ranks of equal slots.

        Two greedy steps, those of the "global" policy of DeepSeek's EPLB (github.com/deepseek-ai/EPLB), and in both a
        rule of ours against two copies on one rank, of which the second is for nothing:

        1. Every expert gets one copy; each further copy goes to the expert with the largest load per copy, which its
           copies share (of equals the lowest id), among those with fewer copies than there are ranks, if any.
        2. The copies, heaviest first, go each to the rank with the least load that has a slot free (of equals the
           lowest rank), among those without a copy of the same expert, if any.

        Greedy, so no optimum: when few ranks have slots left, the last and lightest copies go where there is room.

        Args:
            load: tokens, or any measure of work, of each logical expert; see `ExpertParallel.take_load`.
            num_physical: V, at least E, a multiple of ``num_ranks``.
            num_ranks: P.

        Raises:
            ConfigError: V is smaller than E or does not divide, or the load is negative or not finite.

        >>> Placement.balanced([6.0, 1.0, 1.0], num_physical=4, num_ranks=2)
        Placement([0, 1, 0, 2])
        """
        loads = torch.as_tensor(load, dtype=torch.float64, device="cpu").tolist()
        _check_load(loads, num_physical)
        check_experts(num_physical, num_ranks)
        copies = [1] * len(loads)
        for _ in range(num_physical - len(loads)):
            heaviest = max(range(len(loads)), key=lambda e: (copies[e] < num_ranks, loads[e] / copies[e], -e))
            copies[heaviest] += 1
        per_copy = [total / n for total, n in zip(loads, copies, strict=True)]
        pending = sorted((-per_copy[e], e) for e in range(len(loads)) for _ in range(copies[e]))
        slots: list[list[int]] = [[] for _ in range(num_ranks)]
        weights = [0.0] * num_ranks
        for _, expert in pending:
            free = [r for r in range(num_ranks) if len(slots[r]) < num_physical // num_ranks]
            rank = min(free, key=lambda r: (expert in slots[r], weights[r], r))
            slots[rank].append(expert)
            weights[rank] += per_copy[expert]
        return cls([expert for held in slots for expert in sorted(held)])

    def logical_load(self, load: Real[Tensor, "V"]) -> Real[Tensor, "E"]:
        """A load per physical expert, as ``buffer.gather_stats`` counts it, summed over each logical one's copies."""
        return load.new_zeros(self.num_logical).index_add(0, self.physical_to_logical.to(load.device), load)

    def __repr__(self) -> str:
        return f"Placement({self.physical_to_logical.tolist()})"


def _check_load(loads: list[float], num_physical: int) -> None:
    if not loads or not all(math.isfinite(load) and load >= 0 for load in loads):
        raise ConfigError(f"load={loads}; pass one finite number >= 0 per logical expert")
    if num_physical < len(loads):
        raise ConfigError(
            f"num_physical={num_physical} is less than the {len(loads)} logical experts; every one needs a place"
        )
