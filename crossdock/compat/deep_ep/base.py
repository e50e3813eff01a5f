"""What V2's and V2.5's buffers have in common: ranks, attributes, sizes, barriers, ends.

Letters: R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossdock import cost
from crossdock.compat.deep_ep import cpp, sizes
from crossdock.compat.deep_ep.comm import get_logical_domain_size, get_physical_domain_size, size_of
from crossdock.compat.deep_ep.engine import Engine
from crossdock.compat.deep_ep.ep_handle import EPHandle
from crossdock.compat.deep_ep.events import EventHandle, EventOverlap, Previous
from crossdock.compat.deep_ep.expert_parallel import Combine, Dispatch, ExpertParallel
from crossdock.compat.deep_ep.formats import Rows
from crossdock.errors import ConfigError
from crossdock.spec import Topology


class BufferBase:
    """A group of ranks, and what was said of their calls when it was made."""

    _SMS_MULTIPLE = 2
    _SMS_MIN = 4

    def _begin(
        self,
        group: Any,
        num_bytes: int | None,
        *,
        max_tokens: int,
        hidden: int,
        num_topk: int,
        timeout_s: float,
        sums_at_rank: bool,
        watches_topk_idx: bool,
        num_slots: int,
    ) -> None:
        if num_bytes is None and max_tokens and hidden:
            num_bytes = self.get_buffer_size_hint(group, max_tokens, hidden, num_topk)
        self.group = group
        self.num_bytes = num_bytes or 0
        self.num_max_tokens_per_rank = max_tokens
        self._engine = Engine(group, num_bytes=self.num_bytes, timeout_s=timeout_s)
        self.rank_idx, self.num_ranks = self._engine.rank, self._engine.num_ranks
        self.num_scaleout_ranks, self.num_scaleup_ranks = 1, self.num_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self.num_rdma_ranks, self.num_nvlink_ranks = 1, self.num_ranks
        self.nccl_comm_handle = None
        self.runtime = cpp.Buffer(self._engine)
        self.explicitly_destroy = False
        self._calls = ExpertParallel(
            self._engine,
            max_tokens=max_tokens,
            hidden=hidden,
            sums_at_rank=sums_at_rank,
            watches_topk_idx=watches_topk_idx,
            num_slots=num_slots,
        )

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
        """Bytes for calls of such sizes at each rank, in either layout."""
        return sizes.elastic(num_max_tokens_per_rank, hidden, size_of(group), num_topk)

    @staticmethod
    def capture() -> EventHandle:
        """This moment of the current stream."""
        return EventHandle()

    def _theoretical_sms(self, nvlink_gbs: float) -> int:
        """SMs whose stores fill the links, twice: a combine loads over them, which takes more."""
        rate = nvlink_gbs * 1e9 or Topology(num_ranks=self.num_ranks).link_bandwidth
        num_sms = max(self._SMS_MIN, cost.sms_to_store(rate))
        return -(-num_sms // self._SMS_MULTIPLE) * self._SMS_MULTIPLE

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs of a network card; the ranks of one host use none, and this number means nothing to them."""
        return max(1, num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """Where asynchronous calls run; None on CPUs, where the host does their work."""
        return self._engine.comm_stream

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(ranks over RDMA, ranks over NVLink): (1, R)."""
        return get_physical_domain_size(self.group)

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks): (1, R)."""
        return get_logical_domain_size(self.group)

    def _dispatched(
        self, wanted: Dispatch, *previous: Previous, is_async: bool
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """A dispatch behind events: on the current stream, or on the communication stream with an event at its end."""
        if not is_async:
            if previous.count(None) < len(previous):
                self._engine.wait_for(*previous)
            return (*self._calls.dispatch(wanted), EventOverlap())
        with self._engine.beside(*previous) as overlap:
            rows, picks, weights, given = self._calls.dispatch(wanted)
            self._engine.lend(wanted.x, wanted.topk_idx, wanted.topk_weights)
        self._engine.hand_out(rows, picks, weights)
        return rows, picks, weights, given, overlap

    def _combined(
        self, wanted: Combine, *previous: Previous, is_async: bool
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """The same of a combine."""
        if not is_async:
            if previous.count(None) < len(previous):
                self._engine.wait_for(*previous)
            return (*self._calls.combine(wanted), EventOverlap())
        with self._engine.beside(*previous) as overlap:
            result = self._calls.combine(wanted)
            self._engine.lend(wanted.x, wanted.topk_weights, wanted.bias)
        self._engine.hand_out(result)
        return (*result, overlap)

    def _destroy(self) -> None:
        assert self.explicitly_destroy, "destroy() without explicitly_destroy=True; pass that to the constructor"
        self._engine.close()


def check_bytes(num_bytes: object, multiple: int = 1) -> None:
    """Raises ConfigError unless it is None or a size, of whole units."""
    if num_bytes is None:
        return
    if not isinstance(num_bytes, int) or num_bytes < 0 or num_bytes % multiple:
        raise ConfigError(
            f"num_bytes={num_bytes!r}; pass what get_buffer_size_hint gives"
            + (f", a multiple of {multiple:,}" if multiple > 1 else "")
            + ", or None with num_max_tokens_per_rank and hidden"
        )
