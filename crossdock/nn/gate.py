"""The gate: which experts each token goes to, with which weights, and the bias that balances them.

Letters: T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn.functional import linear

from crossdock.errors import ConfigError
from crossdock.fields import is_integer
from crossdock.routing import Routing, group_limited_topk, softmax_topk

Score = Literal["softmax", "sigmoid"]


class Gate(nn.Module):
    """Scores tokens against one row of ``weight`` per expert and picks the best: `softmax_topk`, `group_limited_topk`.

    The scores are computed in float32 whatever the dtypes of ``weight`` and of the tokens, under autocast too: two
    experts that bfloat16 makes equal are not the same choice.

    ``"sigmoid"`` is DeepSeek-V3's: it takes groups, and it has a buffer ``bias`` (float32 [E], saved with the module,
    float32 also after ``module.bfloat16()``, which would round small steps away), that decides with the scores and has
    no part in the weights. ``"softmax"`` has neither.

    Args:
        hidden: H.
        num_experts: E, logical experts: those that tokens choose from, however many replicas there are.
        num_topk: K.
        num_groups: how many groups the experts form, by consecutive ids.
        num_topk_groups: how many of them a token may visit.
        score: how a score is made from a logit.
        renormalize: divide a token's weights by their sum; None: where there are several picks. With one, the weight
            would be the constant 1, through which no gradient reaches the gate.
        scale: what all weights are multiplied with at last; DeepSeek-V3 has 2.5.
        dtype, device: of ``weight``; None: torch's defaults, as for `torch.nn.Linear`.

    Raises:
        ConfigError: the sizes do not fit together, or groups were given to the softmax gate.

    >>> gate = Gate(hidden=2, num_experts=3, num_topk=2)
    >>> _ = gate.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> gate(torch.tensor([[0.0, 1.0]])).topk_idx
    tensor([[1, 0]])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(  # noqa: PLR0913 - the numbers by which papers describe a gate
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        num_groups: int = 1,
        num_topk_groups: int = 1,
        score: Score = "softmax",
        renormalize: bool | None = None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("num_experts", num_experts), ("num_topk", num_topk)):
            if not is_integer(value, least=1):
                raise ConfigError(f"{name}={value!r}; pass a positive integer")
        if score not in ("softmax", "sigmoid"):
            raise ConfigError(f"score={score!r}; pass 'softmax' or 'sigmoid'")
        if score == "softmax" and (num_groups, num_topk_groups) != (1, 1):
            raise ConfigError(
                f"num_groups={num_groups} and num_topk_groups={num_topk_groups} with score='softmax', whose gate has "
                f"no groups; pass 1 and 1, or score='sigmoid'"
            )
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale={scale} is not a positive, finite number; pass 1.0 to leave the weights alone")
        self.hidden = hidden
        self.num_experts = num_experts
        self.num_topk = num_topk
        self.num_groups = num_groups
        self.num_topk_groups = num_topk_groups
        self.score: Score = score
        if renormalize and num_topk == 1:
            warnings.warn(
                "renormalize=True with num_topk=1 makes every weight 1, a constant, so the gate learns nothing from "
                "the loss; leave renormalize out, or pass False",
                stacklevel=2,
            )
        self.renormalize = num_topk > 1 if renormalize is None else renormalize
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=dtype, device=device))
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if score == "sigmoid" else None
        self.register_buffer("bias", bias)
        self.reset_parameters()
        self.choose(self.weight.new_zeros(0, num_experts))  # its own checks, now rather than at the first token

    def reset_parameters(self) -> None:
        """Draws ``weight`` as `torch.nn.Linear` does, and zeroes the bias."""
        bound = 1 / math.sqrt(self.hidden)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "T H"]) -> Routing:
        """Picks int64 [T, K], best first, and their weights float32 [T, K], differentiable in ``x`` and ``weight``."""
        return self.choose(self.logits(x))

    def logits(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T E"]:
        """What scores are made of, in float32: also for `crossdock.routing.balance_loss` and ``z_loss``.

        A gate with such a loss is a subclass whose ``forward`` is ``logits``, the losses, and ``choose``.
        """
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight.float())

    @torch.no_grad()
    def balance(self, num_tokens_per_expert: Real[Tensor, "E"], rate: float) -> None:
        """Moves each expert's bias by ``rate``: up where fewer tokens came than on average, down where more did.

        To be called once per training step, on all ranks with the same counts, or their biases drift apart.

        Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664, algorithm 1;
        DeepSeek-V3, arXiv 2412.19437, section 2.1.2, where the rate is 0.001.

        Args:
            num_tokens_per_expert: what was routed to each logical expert by all ranks in the step, in any dtype; see
                `ExpertParallel.take_load`.
            rate: the step, positive; 0 leaves the bias as it is.

        Raises:
            ConfigError: the gate has no bias, or the counts are not one per expert.

        >>> gate = Gate(hidden=2, num_experts=3, num_topk=1, score="sigmoid")
        >>> gate.balance(torch.tensor([5, 3, 1]), rate=0.25)
        >>> gate.bias
        tensor([-0.2500,  0.0000,  0.2500])
        """
        if self.bias is None:
            raise ConfigError("score='softmax' has no bias to balance with; make the gate with score='sigmoid'")
        if num_tokens_per_expert.shape != self.bias.shape:
            raise ConfigError(
                f"num_tokens_per_expert has shape {list(num_tokens_per_expert.shape)}; pass one count per expert, "
                f"[{self.num_experts}]"
            )
        if not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"rate={rate} is not a finite number >= 0; DeepSeek-V3 has 0.001")
        load = num_tokens_per_expert.to(self.bias.device, torch.float64)
        self.bias += rate * (load.mean() - load).sign().to(self.bias.dtype)

    def extra_repr(self) -> str:
        groups = f", groups={self.num_topk_groups}/{self.num_groups}" if self.num_groups > 1 else ""
        return (
            f"hidden={self.hidden}, num_experts={self.num_experts}, num_topk={self.num_topk}{groups}, "
            f"score={self.score!r}"
        )

    def choose(self, logits: Float[Tensor, "T E"]) -> Routing:
        """Picks and weights from logits."""
        if self.score == "softmax":
            routing = softmax_topk(logits, self.num_topk, renormalize=self.renormalize)
            return Routing(routing.topk_idx, routing.topk_weights * self.scale)
        return group_limited_topk(
            logits,
            self.num_topk,
            num_groups=self.num_groups,
            num_topk_groups=self.num_topk_groups,
            bias=self.bias,
            scale=self.scale,
            renormalize=self.renormalize,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:  # noqa: FBT001, FBT002 - torch's
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.bias is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        routing: Routing = super().__call__(*args, **kwargs)
        return routing
