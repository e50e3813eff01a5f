"""Which experts each token goes to: reference gates, and the loads that tests and benchmarks route with.

Letters: ``T`` tokens, ``K`` picks per token (top-k), ``E`` experts.

A load is one call's ``topk_idx``, drawn from a `torch.Generator` on that generator's device; the same seed gives the
same bits. Ranks that share a load draw it whole, for all ranks' tokens, and each takes its own slice: with a seed per
rank, every rank would have favourites of its own, and together they would be balanced again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, Real
from torch import Tensor

from crossdock.errors import ConfigError

_open_memmap: Callable[..., npt.NDArray[Any]] = np.lib.format.open_memmap  # NumPy 2.2, Python 3.10's last, has no type


class Routing(NamedTuple):
    """What a gate decides: each token's experts, best first, and what their outputs are multiplied with."""

    topk_idx: Int64[Tensor, "T K"]
    topk_weights: Float32[Tensor, "T K"]


def softmax_topk(logits: Float[Tensor, "T E"], num_topk: int, *, renormalize: bool | None = None) -> Routing:
    """The ``num_topk`` likeliest experts of each token, weighted by their softmax probability.

    The softmax runs in float32 over all experts. Of equal experts the one with the lowest id wins.

    Args:
        logits: one row of scores per token, ``[T, E]``, any float type.
        num_topk: picks per token, 1 to E.
        renormalize: divide a token's weights by their sum, so that they add up to 1; None: where there are several
            picks (the weight of one would be the constant 1, and its gradient 0).

    Raises:
        ConfigError: ``logits`` is no float matrix, or ``num_topk`` is out of reach.

    >>> softmax_topk(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 3)
    Routing(topk_idx=tensor([[1, 3, 2]]), topk_weights=tensor([[0.4223, 0.4223, 0.1554]]))
    """
    num_experts = _num_experts_of(logits)
    _check_num_topk(num_topk, num_experts)
    scores = logits.float().softmax(dim=-1)
    topk_idx = _best_first(scores, num_topk)
    topk_weights = scores.gather(1, topk_idx)
    return Routing(topk_idx, _weights(topk_weights, renormalize=renormalize))


def group_limited_topk(
    logits: Float[Tensor, "T E"],
    num_topk: int,
    *,
    num_groups: int,
    num_topk_groups: int,
    bias: Float[Tensor, "E"] | None = None,
    scale: float = 1.0,
    renormalize: bool | None = None,
) -> Routing:
    """DeepSeek-V3's gate: the best experts out of each token's best groups, so that a token visits few nodes.

    Experts score ``sigmoid(logits)`` in float32. What decides is the biased score, ``score + bias``: a group counts as
    much as its two best experts together (its only one, if it has one), the best ``num_topk_groups`` groups stay, and
    the best ``num_topk`` of their experts are picked. The bias balances the load and has no part in the weights, which
    are the picks' plain scores, divided by their sum and multiplied with ``scale``. Of equals, the lowest id wins,
    among groups as among experts.

    Experts of the other groups are no candidates at all. (Masked with a score of 0, they would beat every candidate
    whose bias makes it negative.)

    Source: DeepSeek-V3 technical report, arXiv 2412.19437, section 2.1.2, and the inference code published with that
    model. The report sums ``num_topk / num_topk_groups`` experts per group; that is 2 in that model, and 2 is what its
    code has.

    Args:
        logits: one row of scores per token, ``[T, E]``, any float type.
        num_topk: picks per token, at most the experts of ``num_topk_groups`` groups.
        num_groups: how many groups the experts form, by consecutive ids; a divisor of E.
        num_topk_groups: how many groups a token may visit.
        bias: added to the scores for the choice alone, ``[E]``.
        scale: what a token's weights add up to when they are renormalised.
        renormalize: divide a token's weights by their sum before scaling; None: where there are several picks. If all
            its scores are 0, its weights are 0.

    Raises:
        ConfigError: the sizes do not fit together, or ``scale`` is not a positive number.

    >>> logits = torch.tensor([[9.0, -9.0, 1.0, 1.0]])  # the best expert is in group 0, the better pair is group 1
    >>> group_limited_topk(logits, 2, num_groups=2, num_topk_groups=1)
    Routing(topk_idx=tensor([[2, 3]]), topk_weights=tensor([[0.5000, 0.5000]]))
    """
    num_experts = _num_experts_of(logits)
    _check_groups(num_experts, num_topk, num_groups=num_groups, num_topk_groups=num_topk_groups)
    if bias is not None and tuple(bias.shape) != (num_experts,):
        raise ConfigError(f"bias has shape {list(bias.shape)}; pass one value per expert, shape [{num_experts}]")
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale={scale} is not a positive, finite number; pass 1.0 to leave the weights as they are")

    group_size = num_experts // num_groups
    scores = logits.float().sigmoid()
    biased = scores if bias is None else scores + bias.float()
    group_scores = biased.reshape(-1, num_groups, group_size).topk(min(2, group_size)).values.sum(dim=-1)
    groups = _best_first(group_scores, num_topk_groups).sort().values  # ascending, so that candidate order is id order
    members = torch.arange(group_size, dtype=torch.int64, device=logits.device)
    candidates = (groups.unsqueeze(-1) * group_size + members).flatten(1)  # [T, num_topk_groups * group_size]
    topk_idx = candidates.gather(1, _best_first(biased.gather(1, candidates), num_topk))
    topk_weights = scores.gather(1, topk_idx)
    return Routing(topk_idx, _weights(topk_weights, renormalize=renormalize) * scale)


def balance_loss(
    logits: Float[Tensor, "T E"],
    topk_idx: Int[Tensor, "T K"],
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    num_tokens_per_expert: Real[Tensor, "E"] | None = None,
) -> Float32[Tensor, ""]:
    """The auxiliary loss that balances experts: ``E * sum_e f_e * P_e``, 1 where all are used alike.

    ``f_e`` is the share of picks that went to expert ``e``, a constant; ``P_e`` the mean of its score over these
    tokens, through which the gradient goes. To be multiplied with a small factor (0.01 in the first source, 0.0001 in
    the second) and added to the loss.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, there for one pick; with K picks the share is of
    all of them, as in DeepSeek-V3, arXiv 2412.19437, equations 17 to 20, whose scores are sigmoids divided by their
    sum. For shares of all ranks' tokens: "Demons in the Detail", arXiv 2501.11873.

    Args:
        logits: one row of scores per token, any float type; float32 inside.
        topk_idx: the picks; -1 counts for none.
        score: how the gate makes a score of a logit. Sigmoids are divided by their sum over experts.
        num_tokens_per_expert: picks of each expert, of all ranks or of several calls; None: those of ``topk_idx``.

    Raises:
        ConfigError: the shapes do not fit together, or the score is unknown.

    >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    >>> balance_loss(logits, torch.tensor([[0], [1]]))
    tensor(1.)
    >>> balance_loss(logits[:1], torch.tensor([[0]]))  # all to one of two
    tensor(2.)
    """
    num_experts = _num_experts_of(logits)
    if score not in ("softmax", "sigmoid"):
        raise ConfigError(f"score={score!r}; pass 'softmax' or 'sigmoid'")
    if topk_idx.ndim != 2 or topk_idx.shape[0] != logits.shape[0]:
        raise ConfigError(f"topk_idx is {_described(topk_idx)}; pass the picks of these tokens, [{logits.shape[0]}, K]")
    if num_tokens_per_expert is None:
        picks = topk_idx.reshape(-1).to(torch.int64)
        ones = (picks >= 0).to(torch.float32)
        counts = ones.new_zeros(num_experts).scatter_add(0, picks.clamp_min(0), ones)
    elif tuple(num_tokens_per_expert.shape) != (num_experts,):
        raise ConfigError(
            f"num_tokens_per_expert has shape {list(num_tokens_per_expert.shape)}; pass one count per expert, "
            f"[{num_experts}]"
        )
    else:
        counts = num_tokens_per_expert.to(logits.device, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float().softmax(dim=-1) if score == "softmax" else logits.float().sigmoid()
        if score == "sigmoid":
            scores = _normalized(scores)
        means = scores.sum(dim=0) / max(1, logits.shape[0])  # [E]
        return num_experts * (counts.detach() / counts.sum().clamp_min(1.0) * means).sum()


def z_loss(logits: Float[Tensor, "T E"]) -> Float32[Tensor, ""]:
    """The auxiliary loss that keeps a gate's logits small: the mean of ``logsumexp(logits) ** 2`` over tokens.

    To be multiplied with a small factor (0.001 in the source) and added to the loss. 0 for no tokens.

    Source: ST-MoE, arXiv 2202.08906, equation 5.

    >>> z_loss(torch.zeros(2, 1)), z_loss(torch.full((1, 1), -3.0))
    (tensor(0.), tensor(9.))
    """
    _num_experts_of(logits)
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().logsumexp(dim=-1).square().sum() / max(1, logits.shape[0])


def uniform_load(
    num_tokens: int, num_experts: int, *, num_topk: int, generator: torch.Generator
) -> Int64[Tensor, "T K"]:
    """Distinct picks, every expert as likely as any other.

    >>> uniform_load(2, 4, num_topk=4, generator=torch.Generator().manual_seed(0)).sort().values
    tensor([[0, 1, 2, 3],
            [0, 1, 2, 3]])
    """
    _check_sizes(num_tokens, num_experts, num_topk)
    return _draw(_equal(num_experts, generator), num_tokens, num_topk, generator)


def zipf_load(
    num_tokens: int, num_experts: int, *, num_topk: int, generator: torch.Generator, exponent: float = 1.0
) -> Int64[Tensor, "T K"]:
    """Distinct picks from a few popular experts and many rare ones: the r-th most popular weighs ``r ** -exponent``.

    Which expert is how popular is the first thing drawn from ``generator``. A token's picks are drawn one after the
    other, each by the weights of the experts that are left. An ``exponent`` of 0 is `uniform_load`'s distribution; 1 is
    Zipf's law.

    >>> load = zipf_load(1000, 16, num_topk=2, generator=torch.Generator().manual_seed(0), exponent=2.0)
    >>> counts = load.flatten().bincount(minlength=16).sort(descending=True).values
    >>> bool(counts[0] > 3 * counts[3])
    True
    """
    _check_sizes(num_tokens, num_experts, num_topk)
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ConfigError(
            f"exponent={exponent} is not a finite number >= 0; pass 0 for equal popularity, 1 for Zipf's law"
        )
    popularity = torch.randperm(
        num_experts, generator=generator, dtype=torch.int64, device=generator.device
    )  # rank, from 0, of each expert
    return _draw(-exponent * (popularity + 1).to(torch.float32).log(), num_tokens, num_topk, generator)


def hot_expert_load(
    num_tokens: int, num_experts: int, *, num_topk: int, generator: torch.Generator, hot_expert: int = 0
) -> Int64[Tensor, "T K"]:
    """Every token picks ``hot_expert`` first, and then others, distinct and equally likely.

    >>> hot_expert_load(3, 2, num_topk=2, generator=torch.Generator().manual_seed(0), hot_expert=1)
    tensor([[1, 0],
            [1, 0],
            [1, 0]])
    """
    _check_sizes(num_tokens, num_experts, num_topk)
    if not 0 <= hot_expert < num_experts:
        raise ConfigError(
            f"hot_expert={hot_expert} is not within 0..{num_experts - 1}; pass one of num_experts={num_experts}"
        )
    others = _draw(_equal(num_experts - 1, generator), num_tokens, num_topk - 1, generator)
    hot = others.new_full((num_tokens, 1), hot_expert)
    return torch.cat([hot, others + (others >= hot_expert)], dim=1)


def record_load(path: str | os.PathLike[str], topk_idx: Int[Tensor, "T K"]) -> None:
    """Writes one call's routing, as a model made it, to a file for `recorded_load`.

    The format is NumPy's ``.npy``: one int32 array ``[T, K]``, -1 where there is no pick. ``path`` is used as it is, no
    suffix is added, and a file that is there is replaced.

    Raises:
        ConfigError: ``topk_idx`` is no integer matrix, has a value below -1, or names an expert twice for one token.
    """
    if topk_idx.ndim != 2 or topk_idx.is_floating_point() or topk_idx.is_complex() or topk_idx.dtype == torch.bool:
        raise ConfigError(f"topk_idx is {_described(topk_idx)}; pass an integer tensor of shape [tokens, picks]")
    _check_picks(topk_idx, "topk_idx", num_experts=2**31)
    with Path(path).open("wb") as file:
        np.save(file, topk_idx.to("cpu", torch.int32).numpy(), allow_pickle=False)


def recorded_load(
    path: str | os.PathLike[str], num_tokens: int, *, num_experts: int, num_topk: int
) -> Int64[Tensor, "T K"]:
    """The first ``num_tokens`` rows of a recorded routing, which starts over from its first row if it has fewer.

    The file is an ``.npy`` array of integers of any width, ``[tokens, num_topk]``, -1 where there is no pick;
    `record_load` writes one. Only the rows that are asked for are read and checked, and nothing in the file is ever
    executed.

    Raises:
        ConfigError: the file is no such array, or its picks do not fit ``num_experts`` and ``num_topk``.
        OSError: it cannot be opened.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
    ...     record_load(file.name, torch.tensor([[0, 1], [3, -1]]))
    ...     recorded_load(file.name, 3, num_experts=4, num_topk=2)
    tensor([[ 0,  1],
            [ 3, -1],
            [ 0,  1]])
    """
    _check_sizes(num_tokens, num_experts, num_topk)
    try:
        recording = _open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} is no readable .npy array ({error}); write it with crossdock.routing.record_load"
        ) from error
    if recording.ndim != 2 or recording.dtype.kind not in "iu":
        raise ConfigError(
            f"{path} holds {recording.dtype} of shape {list(recording.shape)}; "
            "it must hold integers of shape [tokens, picks], as crossdock.routing.record_load writes them"
        )
    num_recorded, recorded_topk = recording.shape
    if recorded_topk != num_topk:
        raise ConfigError(
            f"{path} has {recorded_topk} picks per token, not num_topk={num_topk}; pass num_topk={recorded_topk}"
        )
    if num_recorded == 0 and num_tokens > 0:
        raise ConfigError(f"{path} has no tokens to repeat for num_tokens={num_tokens}; record at least one")
    rows = recording[np.arange(num_tokens) % max(num_recorded, 1)]
    topk_idx = torch.from_numpy(rows.astype(np.int64))
    _check_picks(topk_idx, str(path), num_experts=num_experts)
    return topk_idx


def _best_first(scores: Float[Tensor, "T N"], num_best: int) -> Int64[Tensor, "T num_best"]:
    """Columns of the largest values, falling; of equal ones the lower column first (`torch.topk` leaves that open)."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :num_best]


def _weights(scores: Float[Tensor, "T K"], *, renormalize: bool | None) -> Float[Tensor, "T K"]:
    """Of picks with these scores; None: renormalised where there are several."""
    return _normalized(scores) if renormalize or (renormalize is None and scores.shape[1] > 1) else scores


def _normalized(weights: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _equal(num_experts: int, generator: torch.Generator) -> Float32[Tensor, "E"]:
    """The logarithms of equal weights."""
    return torch.zeros(num_experts, dtype=torch.float32, device=generator.device)


def _draw(
    log_weights: Float[Tensor, "E"], num_tokens: int, num_topk: int, generator: torch.Generator
) -> Int64[Tensor, "T K"]:
    """Draws without replacement, by a race: expert ``e`` arrives after an exponential time of rate ``weight[e]``.

    The order of arrival is the order of successive draws by weight (Efraimidis and Spirakis, 2006). In logarithms,
    because a steep Zipf law leaves the range of float32.
    """
    shape = (num_tokens, log_weights.shape[0])
    waits = torch.empty(shape, dtype=torch.float32, device=generator.device).exponential_(generator=generator)
    return _best_first(log_weights - waits.log(), num_topk)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def _num_experts_of(logits: Float[Tensor, "T E"]) -> int:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ConfigError(f"logits is {_described(logits)}; pass a float tensor of shape [tokens, experts]")
    return logits.shape[1]


def _check_num_topk(num_topk: int, num_experts: int) -> None:
    if not 1 <= num_topk <= num_experts:
        raise ConfigError(
            f"num_topk={num_topk} is not within 1..{num_experts}; a token has num_experts={num_experts} to pick from"
        )


def _check_sizes(num_tokens: int, num_experts: int, num_topk: int) -> None:
    if num_tokens < 0:
        raise ConfigError(f"num_tokens={num_tokens} is negative; pass 0 or more")
    _check_num_topk(num_topk, num_experts)


def _check_groups(num_experts: int, num_topk: int, *, num_groups: int, num_topk_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups != 0:
        raise ConfigError(f"num_groups={num_groups} does not divide num_experts={num_experts}; pass a divisor of it")
    if not 1 <= num_topk_groups <= num_groups:
        raise ConfigError(
            f"num_topk_groups={num_topk_groups} is not within 1..{num_groups}; pass at most num_groups={num_groups}"
        )
    group_size = num_experts // num_groups
    reach = num_topk_groups * group_size
    if not 1 <= num_topk <= reach:
        raise ConfigError(
            f"num_topk={num_topk} is not within 1..{reach}, the experts of num_topk_groups={num_topk_groups} "
            f"groups of {group_size}; pass a smaller num_topk or a larger num_topk_groups"
        )


def _check_picks(topk_idx: Int[Tensor, "T K"], source: str, *, num_experts: int) -> None:
    wrong = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()
    if len(wrong) > 0:
        token, pick = wrong[0].tolist()
        raise ConfigError(
            f"{source} has expert {int(topk_idx[token, pick])} at token {token}; "
            f"allowed are 0..{num_experts - 1}, and -1 for no pick"
        )
    ordered = topk_idx.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice) > 0:
        token, pick = twice[0].tolist()
        raise ConfigError(
            f"{source} picks expert {int(ordered[token, pick])} twice at token {token}; "
            "a token's picks must be distinct: where they may repeat, as with a hash, put -1 in place of the repeats"
        )


def picks_of_ranks(goes: Bool[Tensor, "T P"], *, num_local: int, num_topk: int) -> Int64[Tensor, "T K"]:
    """Picks that send a token to each rank where its row is True: the first expert of each, ranks ascending, then -1.

    Where a token goes to more than K ranks its first pick is E, which is no expert: ``check_picks``, or on CUDA the
    kernels refuse that.

    >>> picks_of_ranks(torch.tensor([[True, False, True], [False, False, False]]), num_local=4, num_topk=2)
    tensor([[ 0,  8],
            [-1, -1]])
    """
    num_ranks = goes.shape[1]
    nobody = num_ranks * num_local
    first = torch.arange(0, nobody, num_local, dtype=torch.int64, device=goes.device)
    experts = torch.where(goes, first, nobody).sort(dim=1).values  # [T, P]
    if num_ranks <= num_topk:
        experts = torch.nn.functional.pad(experts, (0, num_topk - num_ranks), value=nobody)
        return torch.where(experts == nobody, -1, experts)
    picks = torch.where(experts == nobody, -1, experts)[:, :num_topk].contiguous()
    picks[:, 0] = torch.where(experts[:, num_topk] == nobody, picks[:, 0], nobody)
    return picks


def check_picks(topk_idx: Tensor, *, num_experts: int) -> None:
    """Raises ConfigError unless picks, on the host, are experts 0 .. E - 1 or -1 for none, and distinct in a token."""
    picks = topk_idx.numpy()
    if not picks.size:
        return
    if picks.min() < -1 or picks.max() >= num_experts:
        token, pick = np.argwhere((picks < -1) | (picks >= num_experts))[0]
        raise ConfigError(
            f"topk_idx[{token}, {pick}] = {picks[token, pick]}; experts are 0 to {num_experts - 1}, -1 is no pick"
        )
    ordered = np.sort(picks.astype(np.int16) if num_experts < 2**15 else picks, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token, at = np.argwhere(twice)[0]
        raise ConfigError(
            f"topk_idx[{token}] picks expert {ordered[token, at]} more than once; the picks of a token are distinct: "
            f"where they may repeat, as with a hash, put -1 in place of the repeats and add their weights to the first"
        )
