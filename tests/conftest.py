"""The ``world`` fixture: runs one test body with ranks as threads, as processes, or on other devices.

A test runs in DEFAULT_WORLDS, or in the worlds of its marker: ``@pytest.mark.worlds("inproc-8", "processes-4")``.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from tests.world import NIXL_PROBLEM, Pools, World

DEFAULT_WORLDS = ("inproc-1", "inproc-2", "inproc-4", "processes-2")

hypothesis.settings.register_profile(
    "crossdock",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("crossdock")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "worlds(*names): worlds to run in, instead of the default ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("worlds")
        metafunc.parametrize("world", marker.args if marker else DEFAULT_WORLDS, indirect=True)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Processes that stay, one set for each number of ranks: importing torch takes seconds."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def world(request: pytest.FixtureRequest, pools: Pools) -> World:
    if request.param.startswith("nixl-") and NIXL_PROBLEM is not None:
        pytest.skip(NIXL_PROBLEM)
    return World(request.param, pools)
