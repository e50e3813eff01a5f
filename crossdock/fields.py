"""Integers and flags in the fields of configs, made plain: a Spec's checksum is that of its text.

NumPy's 8 is equal to 8 and prints otherwise: ranks that have one each would agree, and then not understand each other.
"""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np

from crossdock.errors import ConfigError


def is_integer(value: object, *, least: int, most: int | None = None) -> bool:
    """Whether that is an integer in these bounds, of Python or NumPy; no flag is one, and no float.

    >>> is_integer(4, least=1), is_integer(4.0, least=1), is_integer(True, least=1)
    (True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least <= int(value) and (most is None or int(value) <= most)


def is_positive(value: object) -> bool:
    """Whether that is a number above 0.

    >>> is_positive(0.5), is_positive(float("nan")), is_positive("0.5")
    (True, False, False)
    """
    return isinstance(value, Real) and float(value) > 0


def set_integer(config: object, name: str, allowed: str, *, least: int, most: int | None = None) -> None:
    """Makes a field of a frozen config a plain ``int``.

    Args:
        allowed: what the error says behind the value.

    Raises:
        ConfigError: its value is no such integer.
    """
    value = getattr(config, name)
    if not is_integer(value, least=least, most=most):
        raise ConfigError(f"{name}={value!r}{allowed}")
    object.__setattr__(config, name, int(value))


def set_flag(config: object, *names: str) -> None:
    """Makes fields of a frozen config plain ``bool``.

    Raises:
        ConfigError: a value is neither True nor False.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f"{name}={value!r}; pass True or False")
        object.__setattr__(config, name, bool(value))
