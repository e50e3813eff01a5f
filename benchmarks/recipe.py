"""The picks and rows that every library gets, and the results that dispatch and combine must give.

Every rank draws the rows of all ranks, so the expected rows are known without communication. The experts of rank r
multiply by ``2**-r``: every sum is exact in float32, in any order, and follows from the token's own row.

Letters: P ranks, T tokens of a rank, K top-k, H hidden, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossdock import Fp8, Quantized
from crossdock.cli.bench.cases import draw_rows, parts_of
from crossdock.cli.bench.config import Job
from crossdock.cli.bench.measure import WrongRows, check_bits
from crossdock.cli.world import Member
from crossdock.errors import ConfigError

MAX_RANKS = 8
"""With more ranks the sums would not be exact in float32."""


class Turn(NamedTuple):
    """A timed call, and the untimed calls before and after it if calls must alternate."""

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None

    @property
    def alternates(self) -> bool:
        """Whether other calls must run between two timed ones."""
        return self.before is not None or self.after is not None

    def run(self) -> Any:
        """Runs ``before``, the call and ``after``; returns the call's result."""
        if self.before is not None:
            self.before()
        result = self.call()
        if self.after is not None:
            self.after()
        return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation of one library.

    ready: prepares the operation, untimed, and returns the timed turn.
    check: raises WrongRows unless a result is right.
    checked: returns the result to check, after ``ready``; None: the result of the turn.
    in_graph: whether the call can be captured in a CUDA graph.
    waits: whether the call waits for the device or for peers, and its host time includes that wait.
    """

    op: str
    ready: Callable[[], Turn]
    check: Callable[[Any], None]
    checked: Callable[[], Any] | None = None
    in_graph: bool = True
    waits: bool = False


class Recipe:
    """The picks and rows of one rank on its device, and the results expected there."""

    def __init__(self, member: Member, job: Job, device: torch.device) -> None:
        if member.num_ranks > MAX_RANKS:
            raise ConfigError(f"ranks={member.num_ranks}; sums are known exactly for at most {MAX_RANKS}")
        self.job, self.spec, self.device = job, job.spec, device
        self.rank, self.num_ranks = member.rank, member.num_ranks
        picks = torch.from_numpy(job.topk_idx).view(self.num_ranks, -1, self.spec.num_topk)
        self.num_tokens = picks.shape[1]
        drawn = [draw_rows(self.spec, self.num_tokens, seed=job.seed + rank) for rank in range(self.num_ranks)]
        self.unquantised, own = drawn[self.rank]
        self.unquantised, self.parts = self.unquantised.to(device), tuple(part.to(device) for part in parts_of(own))
        self.x = Quantized(*self.parts) if len(self.parts) == 2 else self.parts[0]
        self.topk_idx = picks[self.rank].to(device)
        weights = torch.tensor([2.0 ** -(k % 4) for k in range(self.spec.num_topk)], device=device)
        self.weights = weights.repeat(self.num_tokens, 1)
        ranks = self.topk_idx // self.spec.num_local_experts(self.num_ranks)  # -1 for no pick
        self._hits = (ranks.unsqueeze(2) == torch.arange(self.num_ranks, device=device)).float()  # [T, K, P]
        self._wanted = [self._received(picks, part) for part in zip(*(parts_of(x) for _, x in drawn), strict=True)]
        self.num_rows = len(self._wanted[0])

    def _received(self, picks: Tensor, of_ranks: Sequence[Tensor]) -> Tensor:
        """The rows that this rank must receive, as bytes: by expert if a row is one pick, then by source and token."""
        num_local = self.spec.num_local_experts(self.num_ranks)
        experts = torch.arange(self.rank * num_local, (self.rank + 1) * num_local)
        groups = torch.split(experts, 1 if self.spec.layout.per_pick else num_local)
        hits = [torch.isin(picks, group).any(dim=2) for group in groups]  # [P, T] each
        rows = [part.view(torch.uint8)[hit[rank]] for hit in hits for rank, part in enumerate(of_ranks)]
        return torch.cat(rows).to(self.device)

    def values(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows in the combine dtype, dequantised if the wire is FP8: the experts' inputs."""
        wire, dtype = self.spec.wire, self.spec.combine_dtype
        return wire.dequantize(Quantized(*parts), dtype) if isinstance(wire, Fp8) else parts[0]

    def outputs(self, parts: Sequence[Tensor]) -> Tensor:
        """The outputs of this rank's experts; padding rows have any values."""
        return self.values(parts) * 2.0**-self.rank

    def check_rows(self, parts: Sequence[Tensor], *, is_ordered: bool = True, tolerance: float = 0.0) -> None:
        """Raises WrongRows unless these are the expected rows, bit for bit, in the layout's order or in any order.

        With a tolerance, for libraries with a cast of their own, only the number of rows is checked; the sums are
        checked by ``check_sums``.
        """
        what, got = f"rank {self.rank}", [part.contiguous().view(torch.uint8) for part in parts]
        if len(got[0]) != self.num_rows:
            raise WrongRows(f"{what}: {len(got[0])} rows came, and {self.num_rows} is right")
        if not tolerance:
            arrange = (lambda rows: rows) if is_ordered else _sorted
            check_bits(arrange(got), arrange(self._wanted), what=what)

    def check_sums(self, out: Tensor, *, is_weighted: bool = False, tolerance: float = 0.0) -> None:
        """Raises WrongRows unless ``out`` is the sum of the experts' outputs by token."""
        scales = torch.tensor([2.0**-rank for rank in range(self.num_ranks)], device=self.device)
        times = (self._times(self.weights if is_weighted else None) * scales).sum(dim=1)
        self._check_multiple(out, self.values(self.parts), times, "sums", tolerance)

    def check_step(self, result: tuple[Tensor, Tensor], grad: Tensor) -> None:
        """Raises WrongRows unless the result is output and gradient of a step with identity experts."""
        times = self._times().sum(dim=1)
        for name, got, rows in zip(("output", "gradient"), result, (self.values(self.parts), grad), strict=True):
            self._check_multiple(got, rows, times, name)

    def _times(self, weights: Tensor | None = None) -> Tensor:
        """The factor of each rank's row in each token's sum, [T, P]: a number of rows, or a sum of weights."""
        hits = self._hits if weights is None else self._hits * weights.unsqueeze(2)
        return hits.sum(dim=1) if self.spec.layout.per_pick else hits.amax(dim=1)

    def _check_multiple(self, got: Tensor, rows: Tensor, times: Tensor, name: str, tolerance: float = 0.0) -> None:
        wanted = (rows.float() * times.unsqueeze(1)).to(got.dtype)
        _check_values(got, wanted, what=f"rank {self.rank}, {name}", tolerance=tolerance)


def _sorted(parts: Sequence[Tensor]) -> list[Tensor]:
    """Rows of bytes in an order that depends on their bytes alone."""
    words = parts[0].view(torch.int64)
    factors = torch.randint(2**62, (words.shape[1],), generator=torch.Generator().manual_seed(0)).to(words.device)
    order = (words * factors).sum(dim=1).argsort()
    return [part[order] for part in parts]


def _check_values(got: Tensor, wanted: Tensor, *, what: str, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise WrongRows(f"{what}: shape {list(got.shape)} came, and {list(wanted.shape)} is right")
    is_right = torch.isclose(got.float(), wanted.float(), rtol=tolerance, atol=tolerance * 0.1)
    if not is_right.all():
        at = tuple((~is_right).nonzero()[0].tolist())
        raise WrongRows(f"{what}: {float(got[at])} at {list(at)}, and {float(wanted[at])} is right")
