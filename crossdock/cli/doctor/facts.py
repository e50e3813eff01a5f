"""What was found on a machine, as values; `show` prints them and ``--json`` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from crossdock.errors import BackendUnavailable, ConfigError


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line: what was found, what is needed for what, and what to do where it is not enough."""

    name: str
    """What ``--need`` calls it."""
    found: str
    needed: str
    problem: str | None = None
    """What is wrong and what to do, in the words of the error that says so elsewhere; None: nothing."""
    note: bool = False
    """Whether nothing of this version depends on it."""

    @property
    def state(self) -> str:
        """One of "ok", "missing", and "note" where nothing depends on it.

        >>> Fact(name="shm", found="64 MB", needed="1 GB", problem="give it more").state
        'missing'
        """
        if self.note:
            return "note"
        return "ok" if self.problem is None else "missing"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Facts of one kind, under a heading."""

    title: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, kw_only=True)
class Links:
    """What was measured between ranks, or between GPUs: row ``i``, column ``j`` is from ``i`` to ``j``.

    None where nothing was measured: a rank and itself, or ranks that this transport does not connect.
    """

    transport: str
    what_latency: str
    latency_us: list[list[float | None]]
    what_rate: str
    gb_per_s: list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """Rows that went from all ranks to all ranks and back through one transport."""

    transport: str
    problem: str | None
    """Why they did not, or came back changed; None: every value came back."""
    links: Links | None = None


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What differs between ranks, or must not."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    namespaces: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it. ``ranks`` and ``round_trips`` are there only with ``--group``."""

    sections: tuple[Section, ...]
    links: tuple[Links, ...] = ()
    ranks: tuple[RankFacts, ...] = ()
    disagreements: tuple[str, ...] = ()
    round_trips: tuple[RoundTrip, ...] = ()

    def facts(self) -> dict[str, Fact]:
        """By name."""
        return {fact.name: fact for section in self.sections for fact in section.facts}


def check_needs(report: Report, needs: Iterable[str]) -> None:
    """Raises BackendUnavailable when something that was asked for is missing, or a round trip failed.

    Raises:
        ConfigError: a need is no fact of the report.
    """
    facts = report.facts()
    problems = []
    for need in needs:
        if need not in facts:
            raise ConfigError(f"need={need!r} is unknown; pass {', '.join(facts)}")
        if facts[need].problem is not None:
            problems.append(f"{need}: {facts[need].problem}")
    problems += [f"{trip.transport}: {trip.problem}" for trip in report.round_trips if trip.problem is not None]
    problems += report.disagreements
    if problems:
        raise BackendUnavailable("; ".join(problems))
