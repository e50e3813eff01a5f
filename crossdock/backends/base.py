"""The seam: what a Buffer asks of whatever carries out its calls.

Letters: T tokens here, K top-k, H hidden, R rows received, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from crossdock import cost
from crossdock.consent import Steps, Word
from crossdock.errors import CapacityError, ConfigError
from crossdock.extent import Extent, RowCount
from crossdock.fields import is_integer
from crossdock.kinds import Kinds
from crossdock.plan import Plan
from crossdock.spec import Spec
from crossdock.wire import Quantized

Result = TypeVar("Result")


class Launch(Protocol):
    """How a backend launches its kernels; printable."""

    @property
    def num_sms(self) -> int:
        """SMs that the kernels which store rows may use."""

    @property
    def num_load_sms(self) -> int:
        """The same of those which load rows, or sum them."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What a user may ask of a backend; see ``Buffer``."""

    num_sms: int | None = None
    expand: Literal["sender", "receiver"] | None = None
    mover: Literal["kernel", "copy"] = "kernel"

    def check(self, spec: Spec, device: torch.device) -> None:
        """Raises ConfigError for what is not allowed."""
        if self.num_sms is not None and not is_integer(self.num_sms, least=1):
            raise ConfigError(f"num_sms={self.num_sms!r}; pass a positive integer, or None for the default")
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
                f"expand='receiver' copies rows where they arrive; {spec.layout} has no copies, or rows of {spec.wire} "
                f"do not fit where outputs of {spec.combine_dtype} are written, in multiples of 16 bytes: pass "
                f"expand=None"
            )
        if self.expand == "sender" and spec.is_staged:
            raise ConfigError(f"expand='sender' with {spec.layout}, whose rows the receiver expands: pass expand=None")
        if device.type == "cpu" and (self.num_sms, self.expand, self.mover) != (None, None, "kernel"):
            raise ConfigError("num_sms, expand and mover say how a GPU moves rows; leave them out on CPUs")


class PlanTensors(NamedTuple):
    """What decides a plan, and what a dispatch on it has brought; empty where there is none."""

    topk_idx: Tensor  # [T, K]
    counts: Tensor  # [P, W] int64
    partial_rows: Tensor  # [pairs, K] int32
    src_idx: Tensor  # [R] or [L, C] int32
    local_idx: Tensor  # [R, K] int32, one row per (token, rank)


class Batch(NamedTuple):
    """What a dispatch sends: rows, and the metadata that travels with each."""

    x: Tensor | Quantized  # [T, H]
    weights: Tensor | None  # [T, K] float32
    extras: tuple[Tensor, ...]  # [T, ...] each
    unquantized: bool = False
    """x travels in the combine format; ``Arena.region_of_rows`` says where its rows arrive."""


class Counters(NamedTuple):
    """Tensors on the buffer's device that a call adds to, also each time that a CUDA graph replays it.

    >>> Counters(num_tokens_per_expert=torch.zeros(2, dtype=torch.int32))
    Counters(num_tokens_per_expert=tensor([0, 0], dtype=torch.int32), wait_ns=None)
    """

    num_tokens_per_expert: Tensor | None = None
    """int32 or int64 [L]: of a dispatch, the picks of each local expert that came; nothing where the call was void."""
    wait_ns: Tensor | None = None
    """int64 [P]: nanoseconds that the call has waited for each rank, on CUDA in its kernels."""


class Outputs(NamedTuple):
    """What a combine brings back: outputs, how they are summed, what goes home beside them, where sums are written."""

    y: Tensor  # [R, H]
    weights: Tensor | None = None  # [T, K] float32, or [R] where ranks sum
    bias: Tensor | None = None  # [T, H] or [H]
    extras: Sequence[Tensor] | None = None  # [R, ...] each
    partial_rows: Tensor | None = None  # [pairs, K] int32
    """In place of the plan's: y, and weights, then have any number of rows."""
    out: Tensor | None = None  # [T, H]


class Metadata(NamedTuple):
    """What travelled with rows: copies, which no later dispatch overwrites."""

    src_idx: Tensor  # [R] int32
    topk_idx: Tensor | None  # [R, K] int32, one row per (token, rank)
    weights: Tensor | None  # [R, K] there, [R] where a row is one pick; float32
    extras: tuple[Tensor, ...]  # [R, ...] each


class Arrived(NamedTuple):
    """Rows that are in place, in a receive slot or in memory of their own."""

    plan: Plan
    num_rows: int
    """Rows to look at: as many as came, or all of the slot."""
    read_metadata: Callable[[], Metadata]
    """Reads what travelled with these rows; to be called at most once, before the slot comes round."""
    x: Tensor | Quantized | None = None
    """The rows, where they were expanded into memory of their own; None: they lie in the slot."""


class Event(Protocol):
    """A moment in a device's work, such as ``torch.cuda.Event``."""

    def wait(self) -> None:
        """What the caller issues from now on, on its current stream, comes after it."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Returns once it has passed."""


class Call(NamedTuple):
    """One collective call of this rank, as its Buffer hands it to the backend."""

    sequence: int
    word: Word
    """This rank's word: the kind of call, and the slots that peers may write to and read from."""
    row_count: RowCount = "capacity"
    """Of a dispatch: whether the host is told how many rows came."""
    at_once: bool = True
    """Whether it is waited for where it is started."""
    is_first: bool = True
    """Whether every call before it has been driven to its end."""
    num_sms: int | None = None
    """SMs for this call; None: the buffer's."""
    counters: Counters | None = None
    """What its caller wants counted; waits of the host are not the backend's."""
    extent: Extent | None = None
    """Of a fresh dispatch: what it uses of a receive slot; None: what the Spec's own M does."""
    kept: Kinds[Any] | None = None
    """What the backend launches for calls of its kind; None: of a call that has none."""


Outcome: TypeAlias = tuple[Result, Event | None]
"""What a call gives, and the end of its work on a device (None: it is on the caller's stream, or done)."""


class RowTimes:
    """When a call has moved rows, for a trace: written by the backend, begun anew for each call.

    Times are nanoseconds of ``time.perf_counter_ns``.
    """

    def __init__(self, num_ranks: int) -> None:
        self.move_ns = [0] * num_ranks
        """How long rows to each peer that shares memory took."""
        self.put: dict[int, list[int]] = {}
        """By rail peer, when the first and the last chunk were put into its box."""
        self.landed: dict[int, list[int]] = {}
        """By rail peer, when its first chunk was seen and its last; and of those that had just come when they were
        seen the first and the last, 0 for none, and the rows that came after the first of these up to the last."""

    def begin(self) -> None:
        """Another call."""
        self.move_ns[:] = [0] * len(self.move_ns)
        self.put, self.landed = {}, {}


class Backend(Protocol):
    """Carries out calls: the three verbs. All of them begin at once whatever waits for no peer.

    The steps that a verb gives are driven to their end in the order of calls, on all ranks alike; they yield what is
    still missing. A call that is not the first must not wait for a peer before its turn: calls before it may have to
    send what that peer waits for.
    """

    num_tokens_per_expert: Tensor
    """[L] int64, picks of each local expert in all dispatches but unquantized ones."""
    tells_tokens: bool
    """Whether all ranks are told of one that brings more tokens than a call may have; else it must not begin it."""
    signs_plans: bool
    """Whether words say which plan a call is on. Not where one rank may replay a graph and another make the same calls:
    their plans have other numbers."""
    has_pairs: bool
    """Whether plans say which rows of a rank are of one token (``Plan.partial_rows``)."""

    @property
    def launch(self) -> Launch | None:
        """How kernels are launched; None on CPUs."""

    overflows: list[tuple[int, CapacityError]]
    """Capacity overflows not yet raised, as (sequence, error).

    Between two calls of ``synchronize``, only those that all ranks know of.
    """

    @property
    def wait_s(self) -> Tensor:
        """[P] float64, seconds that its kernels have waited for each peer; 0 where the host waits."""
        raise NotImplementedError

    @property
    def stream(self) -> Any:
        """The stream on which started calls run; None where there are none."""

    def use_stream(self, stream: Any) -> None:
        """From now on started calls run on that stream; None: on one of the backend's own.

        Raises:
            ConfigError: it is no stream of the backend's device.
        """

    def wait_for(self, event: Event, *, at_once: bool) -> None:
        """The work of the next call, waited for at once or only started, comes after the event.

        Raises:
            ConfigError: it is no event of the backend's device.
        """

    def dispatch(self, call: Call, batch: Batch, routing: Tensor | Plan) -> Steps[Outcome[Arrived]]:
        """Moves each row of the batch into its final place, at every rank that the routing names.

        Args:
            routing: int64 picks [T, K] (they are copied), or the plan of an earlier dispatch.

        Raises:
            CapacityError: more rows than a rank has room for, or a rank with more tokens than the call may have, with
                ``row_count="exact"``; on all ranks. With "capacity" every rank gets an empty plan, and ``overflows``
                has the error.
        """

    def combine(
        self, call: Call, plan: Plan, given: Outputs
    ) -> Steps[Outcome[Tensor | tuple[Tensor, tuple[Tensor, ...]]]]:
        """The sum of each token's rows [T, H], in ``out`` if given; and the extras that came back, if any were given.

        Owners pull the rows from ``call.word.output_slot``, or this rank pushes them if it is PUSHED.
        """

    def return_extras(self, call: Call, plan: Plan, extras: tuple[Tensor, ...]) -> Steps[Outcome[tuple[Tensor, ...]]]:
        """Brings extras [R, ...] back: [T, ...] summed over ranks, or [T, K, ...] where a row is one pick."""

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

    def copy_rows(self, plan: Plan, rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
        """Copies rows of a receive slot, as they are, on the caller's stream: those that came, and no others.

        Args:
            out: contiguous, shaped as ``rows``; scales in the order of the wire's.
        """

    def own_rows(self, rows: Tensor | Quantized, src_idx: Tensor | None) -> Tensor:
        """Rows of a receive slot in memory of their own, on the caller's stream; quantised ones in the combine format.

        With ``src_idx`` those where it is negative are 0, whatever lies there.
        """
        raise NotImplementedError

    def weigh_gradients(self, grads: Tensor, y: Tensor, weights: Tensor, src_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Of sums of ``weights[r] * y[r]`` with gradients ``grads [..., H]``: those of y, and of weights in float32.

        0 where ``src_idx`` is negative; there y and weights may be anything.
        """
        raise NotImplementedError

    def mask(self, ranks: tuple[int, ...]) -> None:
        """These ranks, and no others, take part in nothing any more; nothing of this rank is running.

        Plans from now on have no rows of theirs, and those before are void, in graphs too.
        """

    def time_rows(self, times: RowTimes) -> bool:
        """From now on rows are timed, for a trace, and their times written there.

        False where a device moves them.
        """
        raise NotImplementedError

    def lie_in(self, segment: Tensor | None) -> None:
        """This rank's segment is another one from now on; None: there is none until the next one."""

    def check_capture(self, *, asks_host: bool) -> None:
        """Raises ConfigError where a graph is captured of a call that asks the host."""

    def synchronize(self) -> None:
        """Returns once all that was issued is done, on the current stream too; ``overflows`` then has all of them."""
