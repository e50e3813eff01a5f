"""Recorded picks: an ``.npy`` array ``[T, K]`` of one step, or ``[steps, T, K]``, of the tokens of all ranks.

Letters: S steps, T tokens of all ranks in a step, K top-k, E experts, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from crossdock.errors import ConfigError
from crossdock.routing import check_picks

Picks = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Picks, and over how many experts and ranks they go.

    Rank ``r`` brings tokens ``r * T / P`` to ``(r + 1) * T / P - 1`` of a step, rounded down.
    """

    picks: Picks
    """[S, T, K], -1 where there is no pick."""
    num_experts: int
    num_ranks: int

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """[T]: the rank that brings each token.

        >>> Recording(picks=np.zeros((1, 5, 1), np.int32), num_experts=2, num_ranks=2).sources.tolist()
        [0, 0, 1, 1, 1]
        """
        ends = [self.picks.shape[1] * (rank + 1) // self.num_ranks for rank in range(self.num_ranks)]
        return np.searchsorted(ends, np.arange(self.picks.shape[1]), side="right")

    @property
    def max_tokens(self) -> int:
        """The most tokens that a rank brings."""
        return int(np.bincount(self.sources, minlength=self.num_ranks).max())


def read(path: Path, *, num_experts: int | None, num_ranks: int) -> Recording:
    """Reads and checks a recording; nothing in the file is executed.

    Args:
        path: of the file.
        num_experts: E; None: as many as the largest pick needs, in a multiple of the ranks.
        num_ranks: P.

    Raises:
        ConfigError: the file cannot be read or is no such array, or its picks do not fit.
    """
    if num_ranks < 1:
        raise ConfigError(f"ranks={num_ranks}; pass a positive number")
    picks = _array(path)
    if num_experts is None:
        num_experts = max(num_ranks, -(-(int(picks.max()) + 1) // num_ranks) * num_ranks)
    if num_experts < 1:
        raise ConfigError(f"experts={num_experts}; pass a positive number")
    if num_experts % num_ranks:
        raise ConfigError(
            f"experts={num_experts} is not divisible by ranks={num_ranks}; pass ranks that hold the same number each"
        )
    try:
        check_picks(torch.from_numpy(picks.reshape(-1, picks.shape[2])), num_experts=num_experts)
    except ConfigError as error:
        raise ConfigError(f"{path}, tokens of all steps one after the other: {error}") from error
    return Recording(picks=picks, num_experts=num_experts, num_ranks=num_ranks)


def _array(path: Path) -> Picks:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as an .npy array ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (2, 3) or not array.size:
        what = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise ConfigError(
            f"{path} holds {what}; pass integers of shape [tokens, picks] or [steps, tokens, picks], with at least one"
        )
    if int(array.max()) >= 2**31 or int(array.min()) < -1:
        raise ConfigError(f"{path} has picks from {array.min()} to {array.max()}; experts are from 0, -1 is no pick")
    return array.astype(np.int32).reshape(-1, *array.shape[-2:])
