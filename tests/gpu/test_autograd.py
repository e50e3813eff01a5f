"""Gradients on CUDA are those of the dense sums, the same bits compiled and checkpointed; torch's own checks pass.

Ranks are processes here: autograd runs the backward passes of all threads of a process on one thread per device.
"""

import pytest

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded
from tests.worlds import test_autograd as programs

ALIGNED = Expanded(alignment=4)
TWO = pytest.mark.parametrize(("layout", "reduce"), [(Expanded(), "token"), (Padded(), "rank")], ids=repr)


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize(
    ("layout", "reduce", "way"),
    [
        (Compact(), "token", "weights-home"),
        (Compact(), "rank", "weights-travel"),
        (Expanded(), "rank", "capacity"),
        (ALIGNED, "token", "weights-home"),
        (Padded(), "token", "weights-travel"),
        (Padded(), "rank", "capacity"),
    ],
    ids=repr,
)
def test_all_gradients_are_those_of_the_dense_sum(world, layout, reduce, way):
    programs.test_all_gradients_are_those_of_the_dense_sum(world, layout, reduce, way)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize(
    ("layout", "wire", "combine_wire"),
    [
        (Compact(), Bf16(), None),
        (Expanded(), Fp8(block=8), None),
        (ALIGNED, Fp8(block=8, scale="ue8m0"), Fp32()),
        (Padded(), Bf16(), Fp32()),
    ],
    ids=repr,
)
def test_gradients_of_outputs_travel_bit_for_bit_whatever_the_wire(world, layout, wire, combine_wire):
    programs.test_gradients_of_outputs_travel_bit_for_bit_whatever_the_wire(world, layout, wire, combine_wire)


@pytest.mark.worlds("cuda-4")
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_one_plan_serves_many_steps(world, layout):
    programs.test_one_plan_serves_many_steps(world, layout)


@pytest.mark.worlds("cuda-4")
def test_a_rank_without_tokens_takes_part(world):
    programs.test_a_rank_without_tokens_takes_part(world, ALIGNED)


@pytest.mark.worlds("cuda-2")
def test_outputs_that_do_not_depend_on_rows_hang_nobody(world):
    programs.test_outputs_that_do_not_depend_on_rows_hang_nobody(world)


@pytest.mark.worlds("cuda-2")
def test_a_loss_that_leaves_the_layer_out_can_touch_it(world):
    programs.test_a_loss_that_leaves_the_layer_out_can_touch_it(world)


@pytest.mark.worlds("cuda-2")
@TWO
def test_checkpoints_give_the_same_bits_and_a_selective_one_repeats_no_call(world, layout, reduce):
    programs.test_checkpoints_give_the_same_bits_and_a_selective_one_repeats_no_call(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
@TWO
def test_a_compiled_layer_gives_the_same_bits(world, layout, reduce):
    programs.test_a_compiled_layer_gives_the_same_bits(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
def test_torch_finds_nothing_wrong_with_the_ops(world):
    programs.test_torch_finds_nothing_wrong_with_the_ops_among_processes(world)


@pytest.mark.worlds("cuda-2")
def test_an_overflow_without_host_sync_gives_no_rows_and_the_next_call_raises(world):
    programs.test_an_overflow_without_host_sync_gives_no_rows_and_the_next_call_raises(world)
