"""The model's parameters: drawn whole from a seed, cut into each rank's share, and put together again.

A rank holds all that is not an expert, and its own experts, by consecutive ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from crossdock.cli.demo.model import Shape, Transformer
from crossdock.cli.demo.plain import PlainMoE

Values = Mapping[str, Tensor]
"""By name, as in ``state_dict()``."""


def plain_model(shape: Shape) -> Transformer:
    """The model in one process."""
    return Transformer(shape, lambda: PlainMoE(shape))


@torch.no_grad()
def initial_values(shape: Shape, seed: int) -> Values:
    """Those that training begins with; the same for any number of ranks.

    Matrices keep the size of what they are applied to; those that add to the residual stream begin smaller, the more
    of them there are.
    """
    generator = torch.Generator().manual_seed(seed)
    values: Values = plain_model(shape).state_dict()
    for name, value in values.items():
        if value.ndim < 2:
            continue  # a norm's ones, and a gate's bias, which begins at 0
        std = 0.02 if name.startswith("embedding") else value.shape[-1] ** -0.5
        if name.endswith(("attention.out.weight", "experts.w2")):
            std /= (2 * shape.num_layers) ** 0.5
        value.normal_(std=std, generator=generator)
    return values


def share(values: Values, rank: int, num_ranks: int) -> Values:
    """What one rank holds."""
    return {name: value.chunk(num_ranks)[rank] if is_expert(name) else value for name, value in values.items()}


def whole(shares: Sequence[Values]) -> Values:
    """All ranks' shares as one model's values; what is not an expert comes from rank 0."""
    return {
        name: torch.cat([of_rank[name] for of_rank in shares]) if is_expert(name) else value
        for name, value in shares[0].items()
    }


def replicated(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that all ranks hold, and whose gradients are summed over ranks."""
    return [parameter for name, parameter in model.named_parameters() if not is_expert(name)]


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to experts: its first dimension is theirs."""
    return ".experts." in name
