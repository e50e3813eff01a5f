"""What ranks compare before a buffer exists: a disagreement is found by all of them, and raised by all of them."""

from __future__ import annotations

import secrets

from crossdock.errors import ConfigError
from crossdock.spec import Spec
from crossdock.transport.base import Group
from crossdock.version import __version__


def agree(members: Group, spec: Spec, timeout_s: float, options: dict[str, object], problem: str | None) -> int:
    """Raises the same ConfigError on all ranks when they differ; else gives 63 random bits, theirs alone. Collective.

    Versions are compared first: Specs of different versions may not even have the same fields.

    Args:
        options: what else must be the same, by name of the ``Buffer``'s argument.
        problem: what is wrong with other arguments of this rank.
    """
    hellos = members.all_gather((__version__, _problem(spec, timeout_s) or problem, secrets.randbits(63)))
    first_version, _, number = hellos[0]
    for rank, (version, theirs, _) in enumerate(hellos):
        if theirs is not None:
            raise ConfigError(f"rank {rank}: {theirs}")
        if version != first_version:
            raise ConfigError(
                f"rank {rank} runs crossdock {version}, rank 0 runs {first_version}; install the same version on all"
            )
    all_options = members.all_gather(options)
    for name, value in all_options[0].items():
        for rank, other_options in enumerate(all_options):
            if other_options[name] != value:
                raise ConfigError(
                    f"the Buffers of rank 0 and rank {rank} differ in {name}: {value!r} != {other_options[name]!r}; "
                    f"pass the same on all ranks"
                )
    specs = members.all_gather(spec)
    for rank, other in enumerate(specs):
        if differences := specs[0].differences(other):
            raise ConfigError(
                f"the Specs of rank 0 and rank {rank} differ in {'; '.join(differences)}; pass the same on all ranks"
            )
    return number


def _problem(spec: object, timeout_s: float) -> str | None:
    if not isinstance(spec, Spec):
        return f"spec is a {type(spec).__name__}; pass a crossdock.Spec"
    if not timeout_s > 0:
        return f"timeout_s={timeout_s}; pass a positive number of seconds"
    return None
