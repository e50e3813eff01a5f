"""V2's ``ElasticBuffer``.

Letters: R ranks, T tokens here, K picks per token, H hidden, N tokens that came, A alignment.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossdock.compat.deep_ep.base import BufferBase, check_bytes
from crossdock.compat.deep_ep.engine import collective
from crossdock.compat.deep_ep.ep_handle import EPHandle
from crossdock.compat.deep_ep.events import EventOverlap, Previous
from crossdock.compat.deep_ep.expert_parallel import Combine, Dispatch
from crossdock.compat.deep_ep.formats import Rows
from crossdock.compat.deep_ep.refused import refusing
from crossdock.errors import NotSupported

Bias = Tensor | tuple[Tensor, Tensor] | None


@refusing(
    *("get_engram_storage_size_hint", "engram_write", "engram_fetch"),
    *("get_pp_buffer_size_hint", "pp_set_config", "pp_send", "pp_recv"),
    *("get_agrs_buffer_size_hint", "agrs_set_config", "create_agrs_session", "destroy_agrs_session"),
    *("agrs_new_session", "agrs_get_inplace_tensor", "all_gather"),
)
class ElasticBuffer(BufferBase):
    """V2's buffer over a Crossdock connection. Collective to make.

    Args:
        group: the ranks.
        num_bytes: what ``get_buffer_size_hint`` gives; None: that of the sizes that follow. A GPU's memory is taken at
            once, and more when a call needs more.
        num_cpu_bytes: must be 0; see ``refused``.
        num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch: of calls; the first holds where a call names none.
        deterministic: results always are.
        allow_multiple_reduction: whether a rank may add up its rows of a token, and round the sum, before it goes home.
        allow_hybrid_mode, prefer_overlap_with_compute, sl_idx, num_allocated_qps: of links between hosts, and of
            kernels that are others here.
        num_cpu_timeout_secs, num_gpu_timeout_secs: the smaller one is how long a call waits for a peer.
        explicitly_destroy: ``destroy()`` will be called.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        check_bytes(num_bytes)
        if num_cpu_bytes:
            raise NotSupported(f"num_cpu_bytes={num_cpu_bytes}: no call keeps rows in host memory; leave it 0")
        self._begin(
            group,
            num_bytes,
            max_tokens=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            timeout_s=min(num_cpu_timeout_secs, num_gpu_timeout_secs),
            sums_at_rank=allow_multiple_reduction,
            watches_topk_idx=False,
            num_slots=1,
        )
        self.num_allocated_qps, self.deterministic = num_allocated_qps, deterministic
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute, self.explicitly_destroy = prefer_overlap_with_compute, explicitly_destroy

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs that fill the links, even and 4 at least; of all arguments ``nvlink_gbs`` counts, 0 for an H200's."""
        return self._theoretical_sms(nvlink_gbs)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """All ranks have come here. Collective.

        Args:
            use_comm_stream: on the communication stream, which is then joined; else on the current one.
            with_cpu_sync: the host waits too.
            sequential: behind what was issued before; it always is.
        """
        self._engine.barrier(beside=use_comm_stream, waits=with_cpu_sync)

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
        previous_event_before_epilogue: Previous = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends each token to the ranks that hold its experts; gives what came here. Collective.

        Args:
            x: bfloat16 [T, H], or data and scales of four bytes each.
            topk_idx, topk_weights: [T, K], -1 for no pick; left out with a handle, weights may be given then too.
            cumulative_local_expert_recv_stats: int32 [L], to which the picks of each local expert are added.
            num_max_tokens_per_rank: M of this call, the same on all ranks; None: the buffer's.
            num_sms: SMs for this call, 0: as many as the links can feed.
            handle: of an earlier dispatch, to send other rows the same way.
            do_handle_copy: the handle keeps a copy of ``topk_idx``, not the very tensor.
            do_cpu_sync: whether the host waits for how many rows come (None: yes); else there are as many as can come.
            do_expand: a row per pick, by local expert, from aligned starts; else a row per token, by source rank.
            do_zero_padding: rows between experts are zero; they always are.
            use_tma_aligned_col_major_sf: scales arrive with strides (1, rows rounded up to 4).

        Returns:
            Rows; picks int64 [N, K], local or -1, or None where rows are picks; weights [N, K], or [rows]; the handle;
            an event.
        """
        wanted = Dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts, num_max_tokens_per_rank,
            expert_alignment, num_sms, handle, do_handle_copy, do_cpu_sync, do_expand, do_zero_padding,
            use_tma_aligned_col_major_sf,
        )  # fmt: skip
        return self._dispatched(
            wanted, previous_event, previous_event_before_epilogue, is_async=async_with_compute_stream
        )

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
        previous_event_before_epilogue: Previous = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings rows home and adds those of a token up in float32: picks of a rank, then ranks, then the bias.

        Collective. Whatever stands in rows that nothing points to is not read.

        Args:
            x: bfloat16, a row where each came; of expanded dispatches any rows that ``handle.recv_src_metadata`` names.
            topk_weights: float32 [N, K], or [rows] of expanded ones, which go home beside them.
            bias: [T, H], none, one or two of them.

        Returns:
            The sums, bfloat16 [T, H]; float32 [T, K], each pick's weight from the rank that has it, or None; an event.
        """
        wanted = Combine(x, handle, topk_weights, bias, num_sms)
        return self._combined(
            wanted, previous_event, previous_event_before_epilogue, is_async=async_with_compute_stream
        )
