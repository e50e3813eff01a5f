"""Combines of several kernels, and extras that go back: what is bound for one kind of them.

Letters: T tokens here, J rows of a token, K top-k, H hidden, R rows received.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from crossdock.backends.cuda.config import PROGRAMS_PER_SM, LaunchConfig, Shape, power_of_two, src_rows_at_once
from crossdock.backends.cuda.kernels import calls as call_kernels
from crossdock.backends.cuda.kernels import returns as return_kernels
from crossdock.backends.cuda.kernels import rows as row_kernels
from crossdock.backends.cuda.kernels import sums as sum_kernels
from crossdock.backends.cuda.kernels.groups import WORDS, Ends, Returned, Summed, as_constants
from crossdock.backends.cuda.launch import Launch, Launcher
from crossdock.backends.cuda.sends import MOST_TICKETS, ONE_WORD, over, tiles_of
from crossdock.layout import Padded

_NOBODY, _PUSHERS, _ALL = (who.value for who in (call_kernels.NOBODY, call_kernels.PUSHERS, call_kernels.ALL))
_EXTRAS_AT_ONCE = 512
"""Values that a program gathers, four tiles at a time."""


@dataclass(frozen=True, eq=False)
class SumKind:
    """What combines of one kind launch, or returns of extras. None: such a kind has no need of it."""

    begin: Launch
    """Words; of a call that pushes, with where rows came from."""
    push: Launch | None
    """Outputs, or sums of them, to their owners."""
    extras: Launch | None
    finish: Launch
    """Where what pushes waits for nobody."""
    sum: Launch | None
    """Also of extras that came back."""
    gather: Launch | None
    """These, without sums."""
    is_summed: bool
    """Whether this rank sums outputs before it pushes them."""
    most_tokens: int
    """Whose sums end the call by themselves."""
    check: Launch
    """Behind those that do not."""

    @property
    def pushes(self) -> bool:
        """Whether this rank sends anything back."""
        return self.push is not None or self.extras is not None


class SumKinds:
    """Makes the kinds of a buffer's combines."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._on = launcher.state
        self._spec = launcher.state.arena.spec
        self._of_pairs = self._spec.ranks_sum_picks

    def key(  # noqa: PLR0913 - in a group they would cost one more call of Python in each call
        self,
        y: Tensor | None,
        weights: Tensor | None,
        bias: Tensor | None,
        rows: Tensor | None,
        extras: Tensor | None,
        out: Tensor,
        num_sms: int | None,
        *,
        sums: bool,
    ) -> Any:
        """All that may differ between kinds; y is None where it is pulled, extras are of a combine or alone."""
        return (
            None if y is None else (y.stride(0), y.stride(1), y.data_ptr() & 15),
            None if weights is None else weights.data_ptr() & 15,
            None if bias is None else (bias.dtype, bias.data_ptr() & 15),
            None if rows is None else rows.data_ptr() & 15,
            None if extras is None else extras.data_ptr() & 15,
            out.data_ptr() & 15,
            num_sms,
            sums,
        )

    def make(
        self,
        y: Tensor | None,
        weights: Tensor | None,
        bias: Tensor | None,
        rows: Tensor | None,
        extras: Tensor | None,
        config: LaunchConfig,
        *,
        sums: bool,
    ) -> SumKind:
        """What such a combine launches; see ``key``.

        Args:
            rows: which of y this rank sums, in place of the plan's.
            sums: whether there are outputs to be summed; else extras alone.
        """
        sums_here = self._spec.reduce == "rank"
        awaits = _PUSHERS if extras is None else _ALL
        last = Ends(POSTS=True, AWAITS=awaits, COUNTED=False)
        push = None
        if y is not None:
            ends = last if extras is None else Ends(POSTS=False, AWAITS=_NOBODY, COUNTED=False)
            push = self._bind_push(y, weights if sums_here else None, rows, config, ends)
        summed = self._bind_sum(None if sums_here else weights, bias, config) if sums else None
        return SumKind(
            begin=self._bind_begin(config, pushes=y is not None or extras is not None),
            push=push,
            extras=None if extras is None else self._bind_extras(config, last),
            finish=self._bind_finish(Ends(POSTS=False, AWAITS=awaits, COUNTED=False)),
            sum=summed,
            gather=None if sums else self._bind_gather(),
            is_summed=self._of_pairs or (sums_here and weights is not None),
            most_tokens=0 if summed is None else summed.most_tokens(MOST_TICKETS),
            check=self._launcher.bind(call_kernels.check_call, 1, self._on.own, num_warps=1),
        )

    def _bind_begin(self, config: LaunchConfig, *, pushes: bool) -> Launch:
        on, spec = self._on, self._spec
        if not pushes:
            return self._launcher.bind(call_kernels.begin_call, 1, on.own, AWAITS=_PUSHERS, num_warps=1)
        num_blocks = on.num_ranks * (on.num_local if spec.layout.per_pick else 1)
        at_once = src_rows_at_once(num_blocks)
        num_rows = max(spec.most_rows(on.num_ranks), on.num_ranks * spec.max_tokens)
        programs = min(-(-num_rows // at_once), config.num_sms * PROGRAMS_PER_SM)
        return self._launcher.bind(return_kernels.begin_return, programs, on.own, on.scratch, ROWS=at_once, num_warps=4)

    def _bind_finish(self, ends: Ends) -> Launch:
        return self._launcher.bind(call_kernels.finish_call, 1, self._on.own, as_constants(ends), num_warps=1)

    def _bind_push(
        self, y: Tensor, weights: Tensor | None, rows: Tensor | None, config: LaunchConfig, ends: Ends
    ) -> Launch:
        """Outputs ``y [R, H]``, or this rank's sums of them, to their owners."""
        hidden, size = self._spec.hidden, y.element_size()
        sums = self._of_pairs or weights is not None
        shape = self._return_shape(hidden * size, config, sums=sums)
        word = size if sums else math.gcd(8, hidden * size, y.stride(0) * size, y.data_ptr() & 15)
        tiles = tiles_of(shape, hidden * size, word)
        how = Returned(
            WORD=WORDS[word],
            ROW=hidden * size // word,
            ROW_BYTES=hidden * size,
            tiles=tiles,
            OF_PAIRS=self._of_pairs,
            HAS_WEIGHTS=weights is not None,
            GIVEN=rows is not None,
            ends=ends,
        )
        return self._launcher.bind(
            sum_kernels.push_sums if sums else row_kernels.return_rows_to,
            over(shape, tiles),
            y.stride(0) * size // word,
            self._on.own,
            self._on.returns,
            self._on.scratch,
            as_constants(how),
            num_warps=shape.num_warps,
            enable_fp_fusion=not sums,
        )

    def _bind_extras(self, config: LaunchConfig, ends: Ends) -> Launch:
        how = self._of_extras(ends)
        return self._launcher.bind(
            return_kernels.push_extras,
            config.num_sms * 4,
            self._on.own,
            self._on.returns,
            self._on.scratch,
            as_constants(how),
            num_warps=4,
        )

    def _bind_gather(self) -> Launch:
        how = self._of_extras(Ends(POSTS=False, AWAITS=_NOBODY, COUNTED=False))
        at_once = max(1, _EXTRAS_AT_ONCE // power_of_two(self._on.arena.return_bytes // 4))
        return self._launcher.bind(
            return_kernels.gather_extras,
            lambda num_tokens: -(-num_tokens // at_once),
            self._on.own,
            self._on.returns,
            as_constants(how),
            num_warps=4,
        )

    def _of_extras(self, ends: Ends) -> Returned:
        return Returned(
            WORD=WORDS[4],
            ROW=1,
            ROW_BYTES=self._on.arena.return_bytes,
            tiles=ONE_WORD,
            OF_PAIRS=False,
            HAS_WEIGHTS=False,
            GIVEN=False,
            ends=ends,
        )

    def _bind_sum(self, weights: Tensor | None, bias: Tensor | None, config: LaunchConfig) -> Launch:
        """``out [T, H]`` from each token's rows, weighted ``[T, K]``, and the extras that came back."""
        spec, shape_of = self._spec, self._on.plan_shape
        num_columns = shape_of.num_pairs if self._of_pairs else shape_of.num_columns
        size = spec.combine_dtype.itemsize
        shape = config.sums(spec.hidden * size, num_columns)
        tiles = tiles_of(shape, spec.hidden * size, size)
        how = Summed(
            J=num_columns,
            H=spec.hidden,
            tiles=tiles,
            OF_PAIRS=self._of_pairs,
            HAS_WEIGHTS=weights is not None,
            HAS_BIAS=bias is not None,
            EXTRA_BYTES=self._on.arena.return_bytes,
        )
        return self._launcher.bind(
            sum_kernels.sum_rows,
            over(shape, tiles),
            self._on.own,
            self._on.returns,
            as_constants(how),
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )

    def _return_shape(self, row_bytes: int, config: LaunchConfig, *, sums: bool) -> Shape:
        shape = (config.pieces if sums else config.rows)(row_bytes, is_counted=False)
        if not isinstance(self._spec.layout, Padded):
            return shape
        # Most rows are none: look at each once, not at all its pieces.
        if config.is_capped and not sums:
            return replace(shape, parts=1)
        return replace(shape, piece_bytes=power_of_two(row_bytes), num_rows=1, num_warps=max(4, shape.num_warps))
