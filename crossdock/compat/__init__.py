"""Other libraries' interfaces over Crossdock, for programs that were written for them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from crossdock.errors import ConfigError

_MODULES = (
    *("", ".buffers", ".comm"),
    *(".utils", ".utils.envs", ".utils.event", ".utils.gate", ".utils.math", ".utils.refs", ".utils.testing"),
)
_ELSEWHERE = {".buffer": ".v1", ".buffers.elastic": ".elastic", ".buffers.legacy": ".v1", ".utils.comm": ".comm"}
_HOMES = {name: name for name in _MODULES} | _ELSEWHERE
"""Modules that programs import of ``deep_ep``, from the package itself on, and where they are here."""
_HOME = f"{__name__}.deep_ep"
ORIGIN = "crossdock.compat"
"""Where a finder says that it has its ``deep_ep`` from, when that is Crossdock's (``compat-dist``)."""


def install(*, v2: bool = False, replace: bool = False) -> ModuleType:
    """From now on ``import deep_ep`` gives Crossdock's, in this process: modules are put into ``sys.modules``.

    ``deep_ep_cpp`` too, which some programs import. Nothing else changes, and calling it again does nothing.

    Args:
        v2: also by the name ``deep_ep_v2``, from which some programs import ``EPBuffer``.
        replace: even where a DeepEP is installed, or has been imported already.

    Returns:
        The module ``deep_ep``.

    Raises:
        ConfigError: a DeepEP is installed here, and ``replace`` is False; nothing was changed.

    >>> import sys
    >>> module = install()
    >>> sys.modules["deep_ep"] is module, "ElasticBuffer" in dir(module)
    (True, True)
    """
    names = {"deep_ep": _HOME, "deep_ep_cpp": f"{_HOME}.cpp", "deep_ep._C": f"{_HOME}.cpp"}
    if v2:
        names["deep_ep_v2"] = _HOME
    if not replace:
        for name in names:
            _check_free(name.partition(".")[0])
    for name, home in names.items():
        for part, where in _HOMES.items() if home == _HOME else [("", "")]:
            sys.modules[name + part] = importlib.import_module(home + where)
    return sys.modules["deep_ep"]


def _check_free(name: str) -> None:
    """Raises ConfigError if that name is somebody else's."""
    if (known := sys.modules.get(name)) is not None:
        is_ours, where = known.__name__.startswith(_HOME), getattr(known, "__file__", None)
    elif (spec := importlib.util.find_spec(name)) is not None:
        is_ours, where = spec.origin == ORIGIN, spec.origin
    else:
        return
    if not is_ours:
        raise ConfigError(
            f"a module {name} is here already, at {where}; pass replace=True to have Crossdock's in its place in this "
            f"process, or go on with that one"
        )
