"""The façade on the CUDA backend without a GPU: programs of the CPU tests, kernels in Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from tests.compat import test_clients as clients
from tests.compat import test_expert_parallel as expert_parallel
from tests.compat import test_low_latency as low_latency
from tests.compat import test_normal as normal
from tests.compat.places import placed

PROGRAMS = {
    "worst case": (normal.worst,),
    "no picks": (normal.without_picks,),
    "low latency": (low_latency.blocks, "at once"),
    "low latency by hooks": (low_latency.blocks, "hook"),
    "ue8m0": (low_latency.casts, "ue8m0", {"round_scale": True, "use_ue8m0": True}, True),
    "expand without host": (expert_parallel.fresh, "V2.5", True, False, 4),
    "compact without host": (expert_parallel.fresh, "V2", False, False, 1),
    "rewritten": (expert_parallel.rewritten, "V2", True),
    "lightllm": (clients.lightllm,),
}
"""A handful; tests/gpu runs the others, and these, on GPUs."""


@pytest.mark.worlds("interpreted-2")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_as_on_cpus(world, name):
    world.run(placed, *PROGRAMS[name])
