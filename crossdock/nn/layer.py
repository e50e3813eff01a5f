"""The mixture-of-experts layer: gate, dispatch, experts, combine; or, without a buffer, the same in one process.

Letters: T tokens, K top-k, H hidden, R rows, L local experts, C capacity per expert, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crossdock import autograd, inputs
from crossdock.autograd import Dispatched
from crossdock.buffer import Buffer
from crossdock.errors import ConfigError
from crossdock.nn.experts import num_held, run_picks
from crossdock.nn.grouped import pack, real_rows, unpack
from crossdock.nn.placement import Placement
from crossdock.spec import Spec


class ExpertParallel(nn.Module):
    """A mixture of experts, ``[..., H] -> [..., H]``: each token's picks, run and summed with the gate's weights.

    With a buffer, this rank holds L of the experts, and forward and backward are collective: all ranks run them, in the
    same order, also with no tokens (see `crossdock.autograd.touch` for a loss that leaves the layer out). Without one,
    the same layer runs in this process alone and holds all experts.

    Where the number of ranks does not divide that of the experts, the Spec has the next multiple: each rank holds as
    many experts, and those behind the gate's last are never picked.

    The buffer is borrowed. One serves all layers of a model; whoever made it closes it, after the last backward. It is
    in no state_dict, a deep copy of the layer borrows the same one, and a pickled layer comes back without.

    Gradients: those of the experts are complete for the sum of all ranks' losses. Those of the gate, the shared expert
    and ``x`` are this rank's own; to average or sum them over ranks is data parallelism's business (and then experts'
    gradients want the same factor). Experts with copies need `sum_replica_gradients`.

    Args:
        gate: a module with ``num_experts``, from ``[T, H]`` to ``(topk_idx [T, K], topk_weights [T, K])``: `Gate`. A
            pick of -1 is none.
        experts: a module ``experts(x, num_tokens_per_expert)``: rows ``[R, H]``, expert-major without gaps, and int32
            ``[L]`` counts, to outputs ``[R, H]``: `GroupedExperts`. Where segments are aligned, counts include their
            padding rows, which are zero, and whose outputs nobody reads.
        buffer: to dispatch with, or None.
        placement: the physical experts behind the gate's logical ones; None: the same.
        shared: a module ``[T, H] -> [T, H]`` that all tokens go through here, added to the sum.

    Raises:
        ConfigError: the parts do not fit the buffer's Spec, or each other.

    >>> from crossdock.nn import Gate, GroupedExperts
    >>> layer = ExpertParallel(Gate(4, num_experts=8, num_topk=2), GroupedExperts(8, hidden=4, intermediate=16))
    >>> layer(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        buffer: Buffer | None = None,
        *,
        placement: Placement | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        num_experts = getattr(gate, "num_experts", None)
        if not isinstance(num_experts, int):
            raise ConfigError(
                f"the gate, a {type(gate).__name__}, has num_experts={num_experts!r}; give it that number"
            )
        if placement is not None and placement.num_logical != num_experts:
            raise ConfigError(
                f"the placement has {placement.num_logical} logical experts, the gate num_experts={num_experts}; "
                f"physical_to_logical must name 0..{num_experts - 1}"
            )
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.placement = placement
        self._borrowed = _Borrowed(None)
        # No module buffer, which DDP would broadcast; so not on the meta device either, which nothing would fill.
        self._load = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        if buffer is not None:
            self.buffer = buffer

    @property
    def buffer(self) -> Buffer | None:
        """What the layer dispatches with, and does not own; a new one must fit as the first did."""
        return self._borrowed.buffer

    @buffer.setter
    def buffer(self, buffer: Buffer | None) -> None:
        if buffer is not None and not isinstance(buffer, Buffer):
            raise ConfigError(f"buffer is a {type(buffer).__name__}; pass a crossdock.Buffer, or None")
        if buffer is not None:
            self._check_fits(buffer.spec, buffer.topology.num_ranks)
        self._borrowed = _Borrowed(buffer)

    @property
    def num_experts(self) -> int:
        """Physical experts, of all ranks."""
        return self._load.shape[0] if self.placement is None else self.placement.num_physical

    def forward(self, x: Float[Tensor, "*tokens H"]) -> Float[Tensor, "*tokens H"]:
        """The layer's outputs, in the dtype of ``x``. Rows travel in the wire's dtype, to which they are cast.

        Raises:
            ConfigError: more tokens than ``spec.max_tokens``, other values per token, or picks that are no integers;
                without a buffer, not all experts are here.
            CapacityError, PeerFailed, PeerTimeout: as the buffer's verbs, in the backward pass too.
        """
        buffer = self.buffer
        hidden = getattr(self.gate, "hidden", None) if buffer is None else buffer.spec.hidden
        if hidden is not None and x.shape[-1] != hidden:
            raise ConfigError(f"x has shape {list(x.shape)}; this layer takes [..., hidden={hidden}]")
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        topk_idx, topk_weights = self.gate(tokens)
        if topk_idx.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"the gate, a {type(self.gate).__name__}, gave picks as {topk_idx.dtype}; return (topk_idx, "
                f"topk_weights), and topk_idx as int64 or int32"
            )
        if self.training and type(topk_idx) is Tensor:  # what one without contents would leave, nothing could add to
            picks = topk_idx[topk_idx >= 0].bincount(minlength=self._load.shape[0])
            self._load = self._load.to(picks.device) + picks
        if self.placement is not None:
            topk_idx = self.placement.to_physical(topk_idx, start=0 if buffer is None else buffer.rank)
        if buffer is None:
            self._check_dense()
            out = run_picks(self.experts, tokens, topk_idx, topk_weights, num_experts=self.num_experts)
        else:
            out = self._exchange(buffer, tokens, topk_idx, topk_weights.float())
        out = out.to(x.dtype)
        if self.shared is not None:
            out = (out + self.shared(tokens)).to(x.dtype)
        return out.view(x.shape)

    def take_load(self) -> Int64[Tensor, "E"]:
        """This rank's picks of each logical expert in training passes since it was last asked, which starts anew.

        Summed over ranks (``torch.distributed.all_reduce``) it is what `Gate.balance` and `Placement.balanced` take.
        A pass that activation checkpointing runs again counts again.
        """
        load, self._load = self._load, torch.zeros_like(self._load)
        return load

    def _exchange(self, buffer: Buffer, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        spec = buffer.spec
        x = tokens.to(spec.wire.dtype) if spec.wire.is_unquantized else tokens
        sums_here = spec.reduce != "token" or not spec.layout.per_pick
        recv = autograd.dispatch(buffer, x, topk_idx, weights=topk_weights if sums_here else None)
        y = self._outputs(recv).to(spec.combine_dtype)
        if not spec.layout.per_pick:  # a row serves several picks, so it is summed before it goes home
            return autograd.combine(buffer, y, recv)
        return autograd.combine(buffer, y, recv, weights=recv.weights if sums_here else topk_weights)

    def _outputs(self, recv: Dispatched) -> Tensor:
        """The experts' outputs, in the places of the rows that came."""
        counts = recv.num_tokens_per_expert
        if recv.topk_idx is not None and recv.weights is not None:
            return run_picks(self.experts, recv.x, recv.topk_idx, recv.weights, num_experts=counts.shape[0])
        y: Tensor
        if recv.x.dim() == 3:
            rows = real_rows(counts, recv.x.shape[1])
            y = unpack(self.experts(pack(recv.x, rows), counts), rows, shape=recv.x.shape)
        else:
            y = self.experts(recv.x, counts if recv.expert_offsets is None else recv.expert_offsets.diff())
        return y

    def _check_fits(self, spec: Spec, num_ranks: int) -> None:
        """Raises ConfigError unless gate and experts are such that the Spec was made for; a part may be silent."""
        inputs.check_trains(spec)
        wants: list[tuple[str, Any, int]] = [
            ("the gate has hidden", getattr(self.gate, "hidden", None), spec.hidden),
            ("the gate has num_topk", getattr(self.gate, "num_topk", None), spec.num_topk),
            ("the experts have hidden", getattr(self.experts, "hidden", None), spec.hidden),
        ]
        for what, got, allowed in wants:
            if got is not None and got != allowed:
                raise ConfigError(
                    f"{what}={got}, the buffer's Spec {allowed}; make the Spec for this layer, or another"
                )
        num_unused = spec.num_experts - self.num_experts  # by which a number that ranks do not divide may be padded
        if not 0 <= num_unused < (1 if self.placement is not None else num_ranks):
            raise ConfigError(
                f"the layer has num_experts (physical ones)={self.num_experts}, the buffer's Spec {spec.num_experts}; "
                f"make the Spec for this layer, with the next multiple of num_ranks={num_ranks}, or another"
            )
        held = num_held(self.experts)
        if held is not None and spec.num_local_experts(num_ranks) not in held:
            raise ConfigError(
                f"the experts here are {held[0]}, of num_experts={spec.num_experts} on {num_ranks} ranks; hold "
                f"{spec.num_local_experts(num_ranks)} on each, or shard all of them with ShardExperts"
            )

    def _check_dense(self) -> None:
        held = num_held(self.experts)
        if held is not None and self.num_experts not in held:
            raise ConfigError(
                f"the experts here are {held[0]} of num_experts={self.num_experts}, and the layer has no buffer to "
                f"reach the others; set layer.buffer"
            )


class _Borrowed:
    """Holds a buffer that is no part of the layer's state: copies share it, pickles leave it out."""

    def __init__(self, buffer: Buffer | None) -> None:
        self.buffer = buffer

    def __deepcopy__(self, memo: dict[int, object]) -> _Borrowed:
        return self

    def __reduce__(self) -> tuple[type[_Borrowed], tuple[None]]:
        return _Borrowed, (None,)
