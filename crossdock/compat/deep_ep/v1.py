"""V1's ``Buffer``: its constructor, its normal calls and what is static; low-latency calls are in ``low_latency``.

Letters: R ranks, E experts, L local experts, T tokens here, K picks per token, H hidden, N rows that came.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.compat.deep_ep import cpp, layout, refused, sizes
from crossdock.compat.deep_ep.config import Config, check_sms, sms_of
from crossdock.compat.deep_ep.engine import CommunicatorGroup, Engine, collective
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap, Previous
from crossdock.compat.deep_ep.formats import Rows
from crossdock.compat.deep_ep.handles import Handle
from crossdock.compat.deep_ep.low_latency import LowLatency
from crossdock.compat.deep_ep.normal import Normal, Wanted, check_streams
from crossdock.errors import ConfigError

Bias = Tensor | tuple[Tensor, Tensor] | None


@refused.refusing("internode_dispatch", "internode_combine")
class Buffer(LowLatency):
    """V1's buffer over a Crossdock connection. Collective to make.

    Args:
        group: the ranks; or None, with ``comm``.
        num_nvl_bytes, num_rdma_bytes: what programs give by the hints; a GPU's memory is taken at once, and more when a
            call needs more. ``num_rdma_bytes`` is also the size of the scratch area (``get_local_buffer_tensor``).
        low_latency_mode: whether low-latency calls will come, which are refused otherwise.
        num_qps_per_rank, allow_mnnvl, use_fabric: of links between hosts; the ranks of one host need none of them.
        allow_nvlink_for_low_latency_mode: must stay True: there is no other link.
        explicitly_destroy: ``destroy()`` will be called.
        enable_shrink: mask calls will come, which are refused otherwise.
        comm: a communicator of mpi4py, in place of ``group``.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
    ) -> None:
        if not allow_nvlink_for_low_latency_mode:
            raise refused.error("allow_nvlink_for_low_latency_mode=False")
        if group is None and comm is None and not dist.is_initialized():
            raise ConfigError("group and comm are both None; pass a process group, or a communicator of mpi4py")
        self.group = group
        members = CommunicatorGroup(comm) if group is None and comm is not None else group
        self._engine = Engine(members, num_bytes=max(num_nvl_bytes, num_rdma_bytes), takes_all=enable_shrink)
        self.rank, self.group_size = self._engine.rank, self._engine.num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime = cpp.Buffer(self._engine)
        self._normal = Normal(self._engine)
        self._begin_low_latency()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs of the configs that are made from now on; an even number."""
        check_sms(new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 and low-latency calls are there, as they are."""
        return cpp.is_sm90_compiled()

    @staticmethod
    def capture() -> EventOverlap:
        """This moment of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The config of a dispatch among so many ranks, whatever their number."""
        assert num_ranks > 0, f"num_ranks={num_ranks}; pass the size of the group"
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The config of a combine among so many ranks."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that low-latency calls of such sizes need at each rank."""
        return sizes.low_latency(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """Where asynchronous calls run; None on CPUs, where the host does their work."""
        return self._engine.comm_stream

    @collective
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Previous = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """How many tokens go where; asks no peer, and tells them where its input keeps this rank from going on.

        Args:
            topk_idx: [T, K], -1 for no pick.

        Returns:
            Tokens per rank int32 [R], per node of eight ranks (None up to eight ranks), per expert int32 [E], whether a
            token goes to a rank bool [T, R], and an event.
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        if not async_finish:
            self._engine.wait_for(previous_event)
            return (*layout.counts_of(topk_idx, num_experts, self.group_size), EventOverlap())
        with self._engine.beside(previous_event) as overlap:
            counts = layout.counts_of(topk_idx, num_experts, self.group_size)
            self._engine.lend(topk_idx)
        self._engine.hand_out(counts)
        return (*counts, overlap)

    @collective
    def dispatch(
        self,
        x: Rows,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Previous = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Sends each token to the ranks that hold its experts, as one row each; gives the rows that came. Collective.

        Args:
            x: bfloat16 [T, H], or data and scales.
            handle: of an earlier dispatch, to send other rows the same way; then the six that say where are left out.
            num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank: of ``get_dispatch_layout``. Without
                ``topk_idx`` the last one is the routing.
            topk_idx, topk_weights: [T, K], together or not at all.
            expert_alignment: of the numbers in the list; rows are not padded.
            num_worst_tokens: as many rows as there are to be whatever comes, so that the host waits for nothing.
            config: whose ``num_sms`` holds; None: as many SMs as the links can feed.

        Returns:
            Rows [N, H], ordered by source rank and token; picks int64 [N, K], local or -1; weights [N, K], 0.0 where
            the pick is -1; tokens per local expert; the handle; an event. With a handle rows and event alone.
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        wanted = Wanted(
            x, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, expert_alignment,
            num_worst_tokens, sms_of(config),
        )  # fmt: skip
        if not async_finish:
            if previous_event is not None:
                self._engine.wait_for(previous_event)
            return (*self._normal.dispatch(wanted, handle), EventOverlap())
        with self._engine.beside(previous_event) as overlap:
            result = self._normal.dispatch(wanted, handle)
            if self._engine.comm_stream is not None and (made := result[4]) is not None:
                self._engine.hand_out(made.tensors())  # of this stream, whenever they are looked at
            self._engine.lend(x, is_token_in_rank, topk_idx, topk_weights)
        self._engine.hand_out(result)
        return (*result, overlap)

    @collective
    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: Previous = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings rows home and adds those of a token up, in float32, in the order of ranks; the bias last. Collective.

        Args:
            x: bfloat16 [N, H], where their rows came.
            topk_weights: float32 [N, K], which go home beside them and are added up too.
            bias: [T, H], none, one or two of them.

        Returns:
            The sums, bfloat16 [T, H]; those of the weights, float32 [T, K], or None; an event.
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        if not async_finish:
            if previous_event is not None:
                self._engine.wait_for(previous_event)
            return (*self._normal.combine(x, handle, topk_weights, bias, sms_of(config)), EventOverlap())
        with self._engine.beside(previous_event) as overlap:
            result = self._normal.combine(x, handle, topk_weights, bias, sms_of(config))
            self._engine.lend(x, topk_weights, bias)
        self._engine.hand_out(result)
        return (*result, overlap)

    def destroy(self) -> None:
        """Leaves the ranks. Local, and only where ``explicitly_destroy=True`` has said that it would come."""
        assert self.explicitly_destroy, "destroy() without explicitly_destroy=True; pass that to the constructor"
        self._engine.close()
