"""V2.5's ``EPBuffer``: V2's calls with a signature of its own, and epilogues that can be deferred.

Letters: as in ``elastic``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from crossdock.compat.deep_ep import refused
from crossdock.compat.deep_ep.base import BufferBase, check_bytes
from crossdock.compat.deep_ep.engine import collective
from crossdock.compat.deep_ep.ep_handle import EPHandle
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap, Previous
from crossdock.compat.deep_ep.expert_parallel import Combine, Dispatch
from crossdock.compat.deep_ep.formats import Rows
from crossdock.errors import ConfigError

Bias = Tensor | tuple[Tensor, Tensor] | None

NUM_ALLOCATION_ALIGNMENT = 2 * 2**20


@refused.refusing("lb_get_theoretical_num_sms", "lb_prefetch_weights", "lb_reduce_grads")
class EPBuffer(BufferBase):
    """V2.5's buffer over a Crossdock connection. Collective to make.

    Args:
        num_bytes: a multiple of 2 MiB, as ``get_buffer_size_hint`` gives; or None.
        lb_allocation_plan_or_num_bytes: must be 0; see ``refused``.
        sl_idx: of links between hosts.
        (the rest): as of ``ElasticBuffer``.
    """

    _SMS_MULTIPLE = 4

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        check_bytes(num_bytes, NUM_ALLOCATION_ALIGNMENT)
        if not isinstance(lb_allocation_plan_or_num_bytes, int) or lb_allocation_plan_or_num_bytes:
            raise refused.error("lb_allocation_plan_or_num_bytes")
        self._begin(
            group,
            num_bytes,
            max_tokens=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            timeout_s=min(num_cpu_timeout_secs, num_gpu_timeout_secs),
            sums_at_rank=allow_multiple_reduction,
            watches_topk_idx=True,
            num_slots=2,
        )
        self.num_allocated_qps, self.deterministic = num_allocated_qps, deterministic
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute, self.explicitly_destroy = prefer_overlap_with_compute, explicitly_destroy
        self.num_lb_bytes = 0
        self.context = self._engine

    @property
    def main_context(self) -> Any:
        """``context``; there is one."""
        return self.context

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes for calls of such sizes at each rank, in either layout: a multiple of 2 MiB."""
        num_bytes = BufferBase.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        return -(-num_bytes // NUM_ALLOCATION_ALIGNMENT) * NUM_ALLOCATION_ALIGNMENT

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 0,
        sm_write_gbs: float = 0,
    ) -> int:
        """SMs that fill the links, a multiple of 4; of all arguments ``nvlink_gbs`` counts, 0 for an H200's."""
        return self._theoretical_sms(nvlink_gbs)

    def print_memory_usage(self) -> None:
        """Prints the bytes of this rank's segment."""
        print(f"rank {self.rank_idx}: {self._engine.connection}")  # noqa: T201 - what it is for

    def barrier(
        self,
        wait_comm_stream: bool = True,
        with_cpu_sync: bool = False,
        sequential: bool = True,
        context_idx: int | None = None,
    ) -> None:
        """All ranks have come here. Collective.

        Args:
            wait_comm_stream: on the communication stream, which is then joined; else on the current one.
            with_cpu_sync: the host waits too.
            sequential: behind what was issued before; it always is.
            context_idx: there is one.
        """
        self._engine.barrier(beside=wait_comm_stream, waits=with_cpu_sync)

    def destroy(self) -> None:
        """Leaves the ranks; a second time it does nothing. Local, and only with ``explicitly_destroy=True``."""
        self._destroy()

    @collective
    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Previous = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap] | EventOverlap:
        """Sends each token to the ranks that hold its experts; gives what came here. Collective.

        Args:
            do_handle_copy: must be False: ``handle.topk_idx`` is the caller's tensor.
            defer_epilogue: give one EventOverlap and nothing else; its first wait gives rows, picks, weights, handle.
            (the rest): as of ``ElasticBuffer.dispatch``.
        """
        if do_handle_copy:
            raise refused.error("do_handle_copy=True")
        wanted = Dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts, num_max_tokens_per_rank,
            expert_alignment, num_sms + num_sms % 2, handle, False, do_cpu_sync, do_expand, do_zero_padding,
            use_tma_aligned_col_major_sf,
        )  # fmt: skip
        if defer_epilogue:
            return self._deferred(lambda: self._calls.start_dispatch(wanted), previous_event, async_with_compute_stream)
        return self._dispatched(wanted, previous_event, is_async=async_with_compute_stream)

    @collective
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Previous = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap] | EventOverlap:
        """Brings rows home and adds those of a token up in float32: picks of a rank, then ranks, then the bias.

        Args:
            defer_epilogue: give one EventOverlap and nothing else; its first wait gives the sums and the weights. A
                bias is read then.
            (the rest): as of ``ElasticBuffer.combine``.
        """
        wanted = Combine(x, handle, topk_weights, bias, num_sms)
        if defer_epilogue:
            return self._deferred(lambda: self._calls.start_combine(wanted), previous_event, async_with_compute_stream)
        return self._combined(wanted, previous_event, is_async=async_with_compute_stream)

    def _deferred(self, start: Callable[[], Callable[[], Any]], previous: Previous, is_async: bool) -> EventOverlap:
        """Begins a call, whose results come with the wait."""
        if not is_async:
            raise ConfigError("defer_epilogue=True needs async_with_compute_stream=True; pass both, or neither")
        self._engine.wait_for(previous)
        finish = start()
        return EventOverlap(EventHandle(), hook_after_wait=finish)
