"""Who waited for whom, and why: what a trace says in figures.

A rank that waits for several peers at once waits for the one that comes last, and its time is charged to that one
alone: so charges add up to the time that was waited. A late *word* is a late program: before a dispatch, whatever ran
since the last call; before a combine, above all the rank's experts. Late *rows* are those of a rank that was in the
call, and writes slowly, or had much to write. Among several nodes that one may itself wait for a third: ``chains``.

Letters: P ranks, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdock.cli.trace.chains import Chains, last_of
from crossdock.cli.trace.clocks import UNKNOWN
from crossdock.cli.trace.parts import HOPS, Part, Trace

Seconds = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

WORDS_OF_DISPATCH, WORDS_OF_COMBINE, ROWS, REST = "to dispatch", "to combine", "its rows", "other"
REASONS = (WORDS_OF_DISPATCH, WORDS_OF_COMBINE, ROWS, REST)
"""What others wait for."""
_STANDS_OUT = 1.5
"""A rank is slow if others wait for it so many times as long as for the others' mean; an expert and a link likewise."""
_LEAST_SHARE = 0.02
"""Of the ranks' time: less waiting needs no explanation."""
_LEAST_BYTES = 16384
"""To a peer in a call: what is less takes the time of a call of Python."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank gave up."""

    at_s: float
    rank: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Hop:
    """What is known of one axis over which ranks reach each other. Matrices as in ``Figures``."""

    waited_s: Seconds
    """[P, P]: how long each rank has missed each over it, whoever that one was waiting for itself."""
    links: npt.NDArray[np.bool_]
    """[P, P]: who reaches whom over it."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is shown. Matrices are indexed by position in ``ranks``."""

    ranks: Sequence[int]
    num_calls: int
    """Of the rank that made most."""
    lasted_s: Seconds
    """[P]: from a rank's first moment to its last."""
    in_calls_s: Seconds
    """[P]: in methods of buffers, waiting included, but not in making them."""
    waited_s: dict[str, Seconds]
    """By reason, [P, P]: how long each rank has waited for each, as it came last."""
    on_device: bool
    """Whether kernels waited: then a wait for several is charged to each of them, and its reason is unknown."""
    rates: Seconds
    """[P, P]: bytes per second from rank to rank, the median of calls; NaN where none wrote enough rows to tell."""
    expert_rows: Counts
    """[E]: picks that came to each expert."""
    rank_rows: Seconds
    """[P]: picks that came to each rank's experts, over the mean; empty where nothing is known."""
    expert_rank: Sequence[int | None]
    """[E]: the rank of each expert; None where ranks of several groups have it, or none has a part."""
    failures: Sequence[Failure]
    hops: Mapping[str, Hop] = field(default_factory=dict)
    """Over several nodes, each axis."""
    clocks_within_s: float = 0.0
    """How far apart clocks of several machines may be after all; inf: nobody knows."""

    @cached_property
    def waits(self) -> Seconds:
        """[P, P]: for whatever reason."""
        total: Seconds = np.sum([*self.waited_s.values()], axis=0)
        return total

    @cached_property
    def charged_s(self) -> Seconds:
        """[P]: how long all others have waited for each rank."""
        total: Seconds = self.waits.sum(axis=0)
        return total

    @property
    def waiting_share(self) -> float:
        """Of the ranks' time."""
        return float(self.waits.sum() / max(self.lasted_s.sum(), 1e-9))

    @property
    def calls_share(self) -> float:
        """Of the ranks' time, waiting included."""
        return float(self.in_calls_s.sum() / max(self.lasted_s.sum(), 1e-9))

    @property
    def slow_rank(self) -> int | None:
        """The position of the rank that others wait for, if one stands out."""
        late = int(self.charged_s.argmax())
        others = np.delete(self.charged_s, late)
        is_slow = others.size and self.waiting_share >= _LEAST_SHARE
        return late if is_slow and self.charged_s[late] >= _STANDS_OUT * others.mean() else None

    def rates_over(self, hop: str | None) -> Seconds:
        """The rates of one axis alone; None: of all links."""
        return self.rates if hop is None else np.where(self.hops[hop].links, self.rates, np.nan)

    def slowest_link(self, hop: str | None = None) -> tuple[int, int] | None:
        """From where to where; None where no rate is known."""
        rates = self.rates_over(hop)
        if np.isnan(rates).all():
            return None
        src, dst = divmod(int(np.nanargmin(rates)), len(self.ranks))
        return src, dst

    def is_link_slow(self, hop: str | None = None) -> bool:
        """Whether the slowest stands out."""
        link = self.slowest_link(hop)
        return link is not None and bool(self.rates[link] * _STANDS_OUT <= np.nanmedian(self.rates_over(hop)))

    @property
    def hot_expert(self) -> int | None:
        """The expert with most picks, if it stands out."""
        if not self.expert_rows.sum():
            return None
        expert = int(self.expert_rows.argmax())
        return expert if self.expert_rows[expert] >= _STANDS_OUT * self.expert_rows.mean() else None


def measure(trace: Trace) -> Figures:
    """The figures of a trace."""
    ranks = trace.ranks
    place = {rank: i for i, rank in enumerate(ranks)}
    shape = (len(ranks), len(ranks))
    waited = {reason: np.zeros(shape) for reason in REASONS}
    of_links: dict[tuple[int, int], list[float]] = defaultdict(list)
    in_calls_s, num_calls = np.zeros(len(ranks)), np.zeros(len(ranks), np.int64)
    spans: dict[int, list[int]] = defaultdict(list)
    failures: list[Failure] = []
    on_device = False
    chains = Chains(trace)
    missed = {hop: np.zeros(shape) for hop in HOPS}
    links = {hop: np.zeros(shape, np.bool_) for hop in HOPS}
    for part in trace.parts:
        own, peers = place[part.rank], [place[rank] for rank in part.ranks]
        spans[own] += part.span
        in_calls_s[own] += (
            sum(line["t"][1] - line["t"][0] for line in part.of("verb") if line["name"] != "Buffer") / 1e9
        )
        num_calls[own] += sum(1 for _ in part.of("start"))
        for hop, peer in chains.reached(part):
            links[hop][own, peers[peer]] = True
        for line, peer in last_of(part):
            if (over := part.hop_to(peer)) is not None:
                missed[over][own, peers[peer]] += (line["t"][1] - line["t"][0]) / 1e9
            for what, kind, culprit, seconds in chains.charges(part, line, peer):
                waited[_reason(what, kind)][own, peers[culprit]] += seconds
        on_device |= (of_device := _waits_of_device(part)) is not None
        for peer, seconds in zip(peers, of_device or (), strict=False):
            waited[REST][own, peer] += seconds
        for src, dst, num_bytes, ns in _moved(part):
            if num_bytes >= _LEAST_BYTES and ns > 0:
                of_links[peers[src], peers[dst]].append(num_bytes / ns * 1e9)
        failures += _failures(part, trace.first)
    rates = np.full(shape, np.nan)
    for link, of_calls in of_links.items():
        rates[link] = np.median(of_calls)
    return Figures(
        ranks=ranks,
        num_calls=int(num_calls.max()),
        lasted_s=np.array([(max(spans[i]) - min(spans[i])) / 1e9 if spans[i] else 0.0 for i in range(len(ranks))]),
        in_calls_s=in_calls_s,
        waited_s=waited,
        on_device=on_device,
        rates=rates,
        **_loads(trace),
        failures=sorted(failures, key=lambda failure: failure.at_s),
        hops={hop: Hop(waited_s=missed[hop], links=links[hop]) for hop in HOPS if any(map(np.any, links.values()))},
        clocks_within_s=math.inf if trace.clocks_within_ns >= UNKNOWN else trace.clocks_within_ns / 1e9,
    )


def _moved(part: Part) -> Iterator[tuple[int, int, int, int]]:
    """Bytes that a call has moved from one rank of the buffer to another, and nanoseconds in which it did.

    Over the rail it is the receiver who knows, of chunks that it saw as they came.
    """
    own = part.header["rank"]
    for line in part.of("call"):
        for peer, (num_rows, ns) in enumerate(zip(line.get("sent", ()), line.get("move_ns", ()), strict=False)):
            if peer != own:
                yield own, peer, num_rows * line["row_bytes"], ns
        for peer, (_, _, first, last, num_rows) in line.get("landed", {}).items():
            yield peer, own, num_rows * line.get("row_bytes", 0), last - first


def _failures(part: Part, first: int) -> list[Failure]:
    return [
        Failure(at_s=(part.at(line["t"]) - first) / 1e9, rank=part.rank, text=line["error"]["text"])
        for line in part.of("failed")
    ]


def _reason(what: str, kind: str) -> str:
    if what == "begin":
        return WORDS_OF_COMBINE if kind == "combine" else WORDS_OF_DISPATCH
    return ROWS if what.startswith(("send its rows", "make room")) else REST


def _waits_of_device(part: Part) -> list[float] | None:
    """Seconds that kernels have waited for each peer; None where the host does that."""
    if any(line["came"] or line["missing"] for line in part.waits()):
        return None
    counted: list[float] = next((line["wait_s"] for line in part.of("end")), [])
    return counted if any(counted) else None


def _loads(trace: Trace) -> dict[str, Any]:
    """The figures of experts: of the number of experts that most picks were of, where Specs have different ones."""
    by_size: dict[int, Counts] = {}
    owners: dict[tuple[int, int], set[int]] = defaultdict(set)
    of_rank = np.zeros(len(trace.ranks))
    for part in trace.parts:
        of_calls = [(line["num_experts"], line["experts"]) for line in part.of("call") if "experts" in line]
        for num_experts, picks in of_calls or next((line["loads"] for line in part.of("end")), []):
            total = by_size.setdefault(num_experts, np.zeros(num_experts, np.int64))
            first = part.header["rank"] * len(picks)
            total[first : first + len(picks)] += picks
            of_rank[trace.ranks.index(part.rank)] += sum(picks)
            for expert in range(first, first + len(picks)):
                owners[num_experts, expert].add(part.rank)
    rows = max(by_size.values(), key=lambda rows: int(rows.sum()), default=np.zeros(0, np.int64))
    places = [owners[len(rows), expert] for expert in range(len(rows))]
    return {
        "expert_rows": rows,
        "rank_rows": of_rank / of_rank.mean() if of_rank.sum() else np.zeros(0),
        "expert_rank": [next(iter(ranks)) if len(ranks) == 1 else None for ranks in places],
    }
