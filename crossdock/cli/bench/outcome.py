"""The outcome of a run as one value, from which the table, the JSON lines and the chart are made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crossdock.cli.bench.config import Config
from crossdock.cli.bench.cuda_cases import CACHED, FUSED, STEP
from crossdock.cli.bench.cuda_measure import CALLS
from crossdock.cli.bench.figures import Figure, Limits
from crossdock.cli.bench.measure import WARM_UPS
from crossdock.cli.bench.samples import OnGpu
from crossdock.cli.machine import Machine
from crossdock.cli.mps import Sharing

BASELINES = {"fresh": "gloo all_to_all_single", "kept": "gloo all_to_all_single, buffers kept"}
NCCL = "NCCL all_to_all_single"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's figures, limits, configuration and machine. ``sharing`` and ``gpu`` are None on CPUs."""

    config: Config
    figures: Sequence[Figure]
    sweep: Sequence[Figure]
    """A dispatch and a combine for each number of SMs, alternating."""
    limits: Limits
    machine: Machine
    gpu: OnGpu | None
    sharing: Sharing | None

    @property
    def baseline(self) -> str | None:
        """Name of the timed baseline; None if there is none."""
        if self.sharing is None:
            return BASELINES[self.config.baseline]
        return NCCL if any(figure.baseline_us is not None for figure in self.figures) else None

    @property
    def pairs(self) -> list[tuple[Figure, Figure]]:
        """The sweep as pairs of dispatch and combine."""
        return list(zip(self.sweep[::2], self.sweep[1::2], strict=True))

    def json_lines(self) -> Iterator[str]:
        """JSON lines: one per operation, then one per number of SMs of the sweep."""
        about = {
            "baseline": self.baseline,
            "copy_gb_s": self.limits.copy / 1e9,
            "trip_us": None if self.limits.trip_s is None else self.limits.trip_s * 1e6,
            "store_gb_s": None if self.limits.store is None else self.limits.store / 1e9,
            "load_gb_s": None if self.limits.load is None else self.limits.load / 1e9,
            "write_gb_s": None if self.limits.write is None else self.limits.write / 1e9,
            "gpu": None if self.gpu is None else asdict(self.gpu),
            "sharing": None if self.sharing is None else {**asdict(self.sharing), "warning": self.sharing.warning},
            "machine": asdict(self.machine),
        }
        config = asdict(self.config)
        for figure in self.figures:
            yield json.dumps({**config, **asdict(figure), "times_dispatch": self.times_dispatch(figure), **about})
        for dispatch, combine in self.pairs:
            line: dict[str, Any] = {"op": "sweep", "num_sms": dispatch.num_sms}
            yield json.dumps({**config, **line, "dispatch": asdict(dispatch), "combine": asdict(combine), **about})

    def times_dispatch(self, figure: Figure) -> float | None:
        """A training step's time in dispatches on a cached plan; None for other operations."""
        cached = self._median(CACHED, figure.wire)
        return figure.median_us / cached if figure.op == STEP and cached else None

    def notes(self) -> list[str]:
        """Lines that say how the figures were measured."""
        return [*self._about_steps(), *self._about_fp8(), *self._about_method(), str(self.machine)]

    def _about_steps(self) -> list[str]:
        ratios = [self.times_dispatch(figure) for figure in self.figures]
        return [
            f"A training step takes {ratio:.1f} × a dispatch on a cached plan: dispatch, combine, both backward; eager."
            for ratio in ratios
            if ratio
        ]

    def _about_fp8(self) -> list[str]:
        """The gain of a quantised wire and the cost of the cast, if both were measured."""
        fused, plain = ("dispatch (fused cast)", "dispatch") if self.sharing is None else (FUSED, CACHED)
        cast, quantised, wide = self._median(fused, "fp8"), self._median(plain, "fp8"), self._median(plain, "bf16")
        if not (cast and quantised and wide):
            return []
        gain = f"Quantised rows travel {wide / quantised:.2f} × as fast as bf16"
        return [f"{gain}; the cast on the way costs {cast - quantised:.0f} us ({cast / quantised - 1:+.0%})."]

    def _about_method(self) -> list[str]:
        repeats, num_ranks, copy = self.config.repeats, self.config.ranks, self.limits.copy / 1e9
        if self.sharing is None or self.gpu is None:
            return [
                f"Slowest rank's median of {repeats} calls, after {WARM_UPS} others; rows equal gloo's, bit for bit.",
                f"Limit: each row read once and written once at {copy:.1f} GB/s, what {num_ranks} ranks copy.",
                f"Baseline: {self.baseline}.",
            ]
        assert self.limits.write is not None
        assert self.limits.trip_s is not None
        written, places = self.limits.write / 1e9, self.gpu.destinations
        slow = [f"NOT A MEASUREMENT OF SPEED: {self.sharing.warning}."] if self.sharing.warning else []
        return [
            *slow,
            f"Slowest rank's median of {repeats} batches of {CALLS} calls, by CUDA events; graphs behind others.",
            "Rows and sums equal those of the same exchange over gloo on CPU copies, bit for bit.",
            f"Limit of dispatch: {num_ranks} ranks read rows and write each to {places} places, {written:,.0f} GB/s.",
            f"Limit of combine: {num_ranks} ranks copy, {copy:,.0f} GB/s read and written.",
            *self._about_link(),
            "Host: the time inside one eager call with nothing queued.",
            f"Floor: that limit and two one-way trips of a word, {self.limits.trip_s * 1e6:.1f} us each.",
            f"Baseline: {self.baseline or 'none, because ranks share a GPU and NCCL refuses that'}.",
            f"Ranks: {self.sharing}; each sees {self.gpu.visible_sms} SMs.",
            self.gpu.launch,
        ]

    def _about_link(self) -> list[str]:
        """What a link carries, where there is one between the ranks' GPUs."""
        store, load = self.limits.store, self.limits.load
        if store is None or load is None:
            return []
        both = f"each rank stores {store / 1e9:.0f} GB/s into the next one's memory, or loads {load / 1e9:.0f} from it"
        return [f"Link: {both}, all at once; the limit where that takes longer than memory."]

    def _median(self, op: str, wire: str) -> float | None:
        return next((figure.median_us for figure in self.figures if (figure.op, figure.wire) == (op, wire)), None)
