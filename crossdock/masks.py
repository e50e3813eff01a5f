"""Ranks that are left out for good: who wants whom masked, and what that makes of picks and plans.

Letters: T tokens here, K top-k, E experts, L local experts, P ranks, W counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int, Int64
from torch import Tensor

from crossdock.errors import ConfigError

_RANKS_PER_WORD = 31
"""Two bits each, and the sign stays clear."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What one rank says when some are to be masked."""

    wanted: frozenset[int]
    """All ranks that are to be masked from now on, with those that are already."""
    gone: frozenset[int]
    """Those of them that it sees to be gone."""

    def words(self, num_ranks: int) -> list[int]:
        """As ``num_words`` integers that are not negative.

        >>> Proposal(wanted=frozenset({0, 32}), gone=frozenset({32})).words(33) == [1, 2 + (2 << 31)]
        True
        """
        return [
            sum(
                ((rank in self.wanted) | (rank in self.gone) << _RANKS_PER_WORD) << rank - first
                for rank in range(first, min(first + _RANKS_PER_WORD, num_ranks))
            )
            for first in range(0, num_ranks, _RANKS_PER_WORD)
        ]

    @staticmethod
    def of(words: Sequence[int]) -> Proposal:
        """The proposal from its words."""

        def ranks(shift: int) -> frozenset[int]:
            return frozenset(
                at * _RANKS_PER_WORD + bit
                for at, word in enumerate(words)
                for bit in range(_RANKS_PER_WORD)
                if word >> shift + bit & 1
            )

        return Proposal(wanted=ranks(0), gone=ranks(_RANKS_PER_WORD))


def num_words(num_ranks: int) -> int:
    """Words of a proposal."""
    return -(-num_ranks // _RANKS_PER_WORD)


def find_disagreement(proposals: Mapping[int, Proposal]) -> ConfigError | None:
    """Why nobody is masked by what the ranks propose; None: it is agreed on."""
    first, *others = sorted(proposals)
    for rank in others:
        if proposals[rank].wanted != proposals[first].wanted:
            return ConfigError(
                f"ranks do not agree on who is masked: rank {first} wants {listed(proposals[first].wanted)}, rank "
                f"{rank} wants {listed(proposals[rank].wanted)}; nobody was masked: call mask() with the same ranks on "
                f"all that are left"
            )
    for rank in sorted(proposals):
        if alive := proposals[rank].wanted - proposals[rank].gone:
            return ConfigError(
                f"{listed(alive)} cannot be masked: rank {rank} sees neither a process that has ended there nor a "
                f"buffer that was closed, so the others could still be written to; nobody was masked: end that process "
                f"first, or go on with it"
            )
    return None


def drop_picks(topk_idx: Int[Tensor, "T K"], masked: Iterable[int], *, num_local: int) -> Int[Tensor, "T K"]:
    """The picks with -1 in place of the experts of masked ranks.

    >>> import torch
    >>> drop_picks(torch.tensor([[0, 3], [2, -1]]), (1,), num_local=2).tolist()
    [[0, -1], [-1, -1]]
    """
    homes = topk_idx.div(num_local, rounding_mode="floor")
    for rank in masked:
        topk_idx = topk_idx.masked_fill(homes == rank, -1)
    return topk_idx


def has_rows_of(counts: Int64[Tensor, "P W"], masked: Sequence[int], *, num_local: int) -> bool:
    """Whether by these counts masked ranks send rows, or get some."""
    experts = [rank * num_local + local for rank in masked for local in range(num_local)]
    return bool(counts[list(masked)].any()) or bool(counts[:, experts].any())


def made_before(masked: Sequence[int]) -> ConfigError:
    """The error of a plan that still has rows of masked ranks."""
    return ConfigError(
        f"the plan is older than the mask of {listed(masked)}, and has rows from there or for there; dispatch "
        f"topk_idx again, and use recv.plan of that"
    )


def listed(ranks: Iterable[int]) -> str:
    """Ranks in words.

    >>> listed([2]), listed({3, 1}), listed([])
    ('rank 2', 'ranks 1, 3', 'no rank')
    """
    numbers = sorted(ranks)
    if not numbers:
        return "no rank"
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
