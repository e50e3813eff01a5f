"""Finds ``deep_ep``, ``deep_ep_cpp`` and ``deep_ep_v2`` in Crossdock, where nobody else has them."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

NAMES = ("deep_ep", "deep_ep_cpp", "deep_ep_v2")
ORIGIN = "crossdock.compat"


class Loader:
    """Gives the module that ``crossdock.compat.install`` puts under a name."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Puts Crossdock's in the module's place, which is what the import then gives."""
        importlib.import_module("crossdock.compat").install(v2=True, replace=True)


class Finder:
    """The last of Python's finders: it is asked when no other one has found a name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in NAMES or importlib.util.find_spec("crossdock") is None:
            return None
        return importlib.machinery.ModuleSpec(name, Loader(), origin=ORIGIN, is_package=name != "deep_ep_cpp")


def register() -> None:
    """Puts the finder behind all others, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
