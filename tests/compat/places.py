"""Programs of these tests on other devices: connections are those of ``tests.world``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.world import device, open_connection


def placed(group: Any, program: Callable[..., Any], *args: Any) -> Any:
    """A program whose buffers are on the CUDA backend without a GPU, where the world has that."""

    def connect(group: Any, num_bytes: int | None, **options: Any) -> Any:
        return open_connection(group, num_bytes, **options | {"device": device()})

    with mock.patch("crossdock.compat.deep_ep.engine.Connection", connect):
        return program(group, *args)
