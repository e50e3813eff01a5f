"""The seam: what a Buffer asks of whatever moves rows.

Letters: T tokens here, K top-k, H hidden, R rows received, Q rows sent, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from crossdock import cost
from crossdock.consent import Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.plan import Plan
from crossdock.spec import Spec
from crossdock.wire import Quantized


class Launch(Protocol):
    """How a backend launches its kernels; printable."""

    @property
    def num_sms(self) -> int:
        """Multiprocessors that the kernels which move rows may use."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What a user may ask of a backend; see ``Buffer``."""

    num_sms: int | None = None
    expand: Literal["sender", "receiver"] | None = None
    mover: Literal["kernel", "copy"] = "kernel"

    def check(self, spec: Spec, device: torch.device) -> None:
        """Raises ConfigError for what is not allowed."""
        if self.num_sms is not None and self.num_sms < 1:
            raise ConfigError(f"num_sms={self.num_sms}; pass a positive number, or None for the default")
        if self.expand not in (None, "sender", "receiver"):
            raise ConfigError(f"expand={self.expand!r}; pass 'sender', 'receiver', or None for the cheaper one")
        if self.mover not in ("kernel", "copy"):
            raise ConfigError(f"mover={self.mover!r}; pass 'kernel' or 'copy'")
        if self.mover == "copy" and spec.layout.per_pick:
            raise ConfigError(
                f"mover='copy' moves whole blocks, which {type(spec.layout).__name__} rows do not form; pass "
                f"layout=Compact(), or mover='kernel'"
            )
        if self.expand == "receiver" and not cost.receiver_can_expand(spec):
            raise ConfigError(
                f"expand='receiver' makes copies of landed rows; {spec.layout} has none, or rows of {spec.wire} do not "
                f"fit where outputs of {spec.combine_dtype} are written, in multiples of 16 bytes: pass expand=None"
            )
        if device.type == "cpu" and (self.num_sms, self.expand, self.mover) != (None, None, "kernel"):
            raise ConfigError("num_sms, expand and mover say how a GPU moves rows; leave them out on CPUs")


RowCount = Literal["exact", "capacity"]


class PlanTensors(NamedTuple):
    """What decides a plan, and what a dispatch on it has brought; empty where there is none."""

    topk_idx: Tensor  # [T, K]
    counts: Tensor  # [P, W] int64
    partial_rows: Tensor  # [pairs, K] int32
    src_idx: Tensor  # [R] or [L, C] int32
    local_idx: Tensor  # [R, K] int32, one row per (token, rank)


class Batch(NamedTuple):
    """What a dispatch sends: rows, and the small things that travel with each."""

    x: Tensor | Quantized  # [T, H]
    weights: Tensor | None  # [T, K] float32
    extras: tuple[Tensor, ...]  # [T, ...] each
    unquantized: bool = False
    """x travels in the combine format; ``Arena.region_of_rows`` says where it lands."""


class Metadata(NamedTuple):
    """The small things that came with rows: copies, which no later dispatch overwrites."""

    src_idx: Tensor  # [R] int32
    topk_idx: Tensor | None  # [R, K] int32, one row per (token, rank)
    weights: Tensor | None  # [R, K] there, [R] where a row is one pick; float32
    extras: tuple[Tensor, ...]  # [R, ...] each


class Arrived(NamedTuple):
    """What is known of a receive slot once all rows have arrived."""

    plan: Plan
    small: Callable[[], Metadata]
    """Gives the small things; to be called once, before the slot comes round."""


class Event(Protocol):
    """A moment in a device's work, such as ``torch.cuda.Event``."""

    def wait(self) -> None:
        """What the caller issues from now on, on its current stream, comes after it."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Returns once it has passed."""


class FusedCalls(Protocol):
    """Calls of few tokens, as a backend does them as a whole; on the wire the same as by the verbs of ``Backend``."""

    def takes_dispatch(self, batch: Batch, routing: Plan | Tensor) -> bool:
        """Whether ``dispatch`` does that."""

    def dispatch(
        self, sequence: int, word: Word, batch: Batch, topk_idx: Tensor, mode: RowCount, *, at_once: bool
    ) -> Steps[Plan]:
        """From picks to rows in place: the plan, once its rows are here.

        Where it is not to be done at once, it yields after rows have been sent, or when a peer is late.
        """

    def takes_combine(self, plan: Plan, *, pushes: bool, has_extras: bool) -> bool:
        """Whether ``combine`` does that."""

    def combine(
        self, word: Word, plan: Plan, weights: Tensor | None, bias: Tensor | None, *, at_once: bool
    ) -> Steps[Tensor]:
        """The sums of outputs that lie where they were written. Where not at once, it yields after the word."""


class Backend(Protocol):
    """Moves rows between this rank and its peers. Called only between the words that permit it.

    ``words`` are those that consent gave for the call; where kernels read them themselves, there are none.
    """

    num_tokens_per_expert: Tensor
    """[L] int64, picks of each local expert in all dispatches but unquantized ones."""

    @property
    def wait_s(self) -> Tensor:
        """[P] float64, seconds that its kernels have waited for each peer; 0 where the host waits."""
        raise NotImplementedError

    has_pairs: bool
    """Whether plans say which rows of a rank are of one token (``Plan.partial_rows``)."""

    @property
    def fused(self) -> FusedCalls | None:
        """Calls that it does as a whole, if there are such."""
        raise NotImplementedError

    @property
    def overflows(self) -> list[tuple[int, CapacityError]]:
        """Of dispatches that had more rows than room and did not raise, by number, until somebody raises them.

        Between two calls of ``synchronize``, only those that all ranks know of.
        """
        raise NotImplementedError

    def enter(self) -> None:
        """What the caller has issued on its current stream comes before what the call does."""

    def use_sms(self, num_sms: int | None) -> None:
        """How many SMs the call that comes now may use; None: the default."""

    def post_counts(self, sequence: int, topk_idx: Tensor) -> None:
        """Tells every rank how many rows this rank will send it in the call; before the call's word is posted."""

    def make_plan(self, sequence: int, topk_idx: Tensor, mode: RowCount) -> Plan:
        """The plan of a fresh dispatch, from its picks and everybody's counts; after the words have been seen.

        Of an overflow with ``rows="capacity"``, that of no rows, on all ranks.

        Raises:
            CapacityError: an overflow with ``rows="exact"``, where the host already knows of it.
        """

    def remake_plan(self, tensors: PlanTensors) -> Plan:
        """A plan from the tensors that decide it; stamped the same on all ranks that remake the same.

        Raises:
            ConfigError: it has rows of ranks that have been masked since; on all ranks that remake it.
        """

    def as_remade(self, plan: Plan, tensors: PlanTensors) -> Plan:
        """What ``remake_plan`` would give from the tensors of a dispatch that has brought its rows, of its own plan.

        The same stamp, and the same on all ranks, or not all could take it for the same plan.
        """
        raise NotImplementedError

    def push_rows(self, plan: Plan, batch: Batch, words: Sequence[Word]) -> None:
        """Writes each row into its final place, in the receive slot that each peer named."""

    def arrived(self, plan: Plan, batch: Batch, slot: int, *, num_rows: int) -> Arrived:
        """What has arrived in this rank's slot, with as many rows; zeroes what alignment left between segments."""

    def settled(self, plan: Plan, mode: RowCount) -> Steps[Plan]:
        """The plan with what the host is told of it, waiting for that if ``mode`` asks for it.

        Raises:
            CapacityError: an overflow with ``rows="exact"``.
        """

    def push_outputs(
        self, plan: Plan, y: Tensor | None, extras: Sequence[Tensor], weights: Tensor | None, words: Sequence[Word]
    ) -> None:
        """Writes outputs [R, H] (or their sums, weighted by [R], where ranks sum) and extras [R, ...] to their owners.

        ``y`` None: the outputs stay in the arena, to be pulled.
        """

    def sum_rows(
        self, plan: Plan, weights: Tensor | None, bias: Tensor | None, words: Sequence[Word], return_slot: int
    ) -> Tensor:
        """The sum of each token's rows [T, H], pulled from the peers' output slots or, if pushed, from returned."""

    def returned_extras(self, plan: Plan, extras: Sequence[Tensor], return_slot: int) -> tuple[Tensor, ...]:
        """Extras that came home: [T, ...] summed over ranks, or [T, K, ...] where a row is one pick."""

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """Rows of a receive slot in memory of their own, on the caller's stream; narrow ones in the combine format.

        With ``src_idx`` those where it is negative are 0, whatever lies there.
        """
        raise NotImplementedError

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Of sums of ``weights[r] * y[r]`` with gradients ``grads [..., H]``: those of y, and of weights in float32.

        0 where ``src_idx`` is negative; there y and weights may be anything.
        """
        raise NotImplementedError

    def on_stream(self) -> AbstractContextManager[object]:
        """Torch operations within come after what the call has done so far, and before its end."""

    def event(self, *, at_once: bool) -> Event | None:
        """The end of what has been issued so far; None where nobody has to wait for it.

        Args:
            at_once: whether it is waited for where it is started.
        """

    def mask(self, ranks: tuple[int, ...]) -> None:
        """These ranks, and no others, take part in nothing any more; nothing of this rank is running.

        Plans from now on have no rows of theirs, and those before are void, in graphs too.
        """

    def check_capture(self, *, asks_host: bool) -> None:
        """Raises ConfigError where a graph is captured of a call that asks the host."""

    def marked(self, name: str) -> AbstractContextManager[object]:
        """What is issued within has that name in a profiler."""

    def synchronize(self) -> None:
        """Returns once all that was issued is done, on the current stream too; ``overflows`` then has all of them."""
