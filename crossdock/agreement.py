"""What ranks compare: before a buffer exists, and when some are to be masked.

A disagreement is found by all of them, and raised by all of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from crossdock.backends.base import Outcome
from crossdock.consent import Consent, Missing, Steps
from crossdock.errors import ConfigError, CrossdockError
from crossdock.masks import Proposal, find_disagreement
from crossdock.spec import Spec
from crossdock.transport.base import Group, Transport
from crossdock.version import __version__

_GRACE_S = 2.0
"""How long a rank that is to be masked may take to be gone: ranks may not see its end at the same moment."""


def agree(members: Group, look: Callable[[], Mapping[str, object]], spec: Spec | None = None) -> int:
    """Raises the same ConfigError on all ranks when they differ; else gives 63 random bits, theirs alone. Collective.

    Versions are compared first: Specs of different versions may not even have the same fields.

    Args:
        look: checks this rank's arguments and gives those that must be the same, by name. Whatever it raises, all
            ranks do: else the others would wait for a rank that has left.
        spec: the Spec of a Buffer; None where there is none yet.
    """
    options: Mapping[str, object] = {}
    problem: str | None = None
    own: Exception | None = None
    try:
        options = look()
    except Exception as error:  # noqa: BLE001 - of arguments that nobody has thought of, too
        own, problem = error, str(error) if isinstance(error, CrossdockError) else f"{type(error).__name__}: {error}"
    gathered = members.all_gather((members.rank, __version__, problem, secrets.randbits(63)))
    _check_by_rank(members, gathered)
    _, first_version, _, number = gathered[0]
    for rank, (_, version, theirs, _) in enumerate(gathered):
        if theirs is not None:
            raise ConfigError(f"rank {rank}: {theirs}") from own
        if version != first_version:
            raise ConfigError(
                f"rank {rank} runs crossdock {version}, rank 0 runs {first_version}; install the same version on all"
            )
    all_options, what = members.all_gather(options), "Connections" if spec is None else "Buffers"
    for name, value in all_options[0].items():
        for rank, other_options in enumerate(all_options):
            if other_options[name] != value:
                raise ConfigError(
                    f"the {what} of rank 0 and rank {rank} differ in {name}: {value!r} != {other_options[name]!r}; "
                    f"pass the same on all ranks"
                )
    specs = [] if spec is None else members.all_gather(spec)
    for rank, other in enumerate(specs):
        if differences := specs[0].differences(other):
            raise ConfigError(
                f"the Specs of rank 0 and rank {rank} differ in {'; '.join(differences)}; pass the same on all ranks"
            )
    return number


def agree_on_masked(consent: Consent, transport: Transport, wanted: Iterable[int]) -> Steps[Outcome[None]]:
    """Done when all ranks but these have said that they want these masked, and see them gone. Collective among them.

    To be begun before any call of an epoch.

    Args:
        wanted: with those that are masked already.

    Raises:
        ConfigError: ranks want others masked, or one of these still lives; the same on all ranks.
        PeerFailed: a rank gave up.
    """
    wanted = frozenset(wanted)

    def is_gone(rank: int) -> bool:
        return rank != consent.rank and (not transport.is_alive(rank) or consent.has_left(rank))

    until = time.monotonic() + _GRACE_S
    while not all(map(is_gone, wanted)) and time.monotonic() < until:
        yield Missing((), "be gone")
    until = time.monotonic() + transport.linger_s
    while time.monotonic() < until:
        yield Missing((), "be gone")
    proposal = Proposal(wanted=wanted, gone=frozenset(filter(is_gone, wanted)))
    heard = yield from consent.propose(proposal, is_gone)
    if (error := find_disagreement(heard)) is not None:
        raise error
    return None, None


def _check_by_rank(members: Group, gathered: object) -> None:
    """Raises ConfigError unless that is everybody's value, which begins with who gave it: a group may be any object."""
    ranks = [given[0] for given in gathered] if isinstance(gathered, (list, tuple)) else type(gathered).__name__
    if ranks != list(range(members.size)):
        raise ConfigError(
            f"all_gather of the group, a {type(members).__name__}, gave the values of ranks {ranks}; give a list of "
            f"every rank's, 0 to {members.size - 1} in order (crossdock.Group)"
        )
