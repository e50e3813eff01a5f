"""Gradients on CUDA are those of the dense sums, the same bits compiled and checkpointed; torch's own checks pass.

Ranks are processes here: autograd runs the backward passes of all threads of a process on one thread per device.
"""

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded
from crossdock import autograd as ag
from tests.cases import same_bits
from tests.world import open_buffer
from tests.worlds import test_autograd as programs
from tests.worlds import test_memo as memo
from tests.worlds import test_training_rows as rows

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


@pytest.mark.worlds("cuda-2")
@TWO
def test_a_step_makes_no_plan_again_and_gives_the_same_bits(world, layout, reduce):
    memo.test_a_step_makes_no_plan_again_and_gives_the_same_bits(world, layout, reduce)


@pytest.mark.worlds("cuda-2")
def test_ranks_that_remember_and_ranks_that_do_not_mean_the_same_plan(world):
    memo.test_ranks_that_remember_and_ranks_that_do_not_mean_the_same_plan(world, Compact())


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("combine_wire", [Bf16(), Fp32()], ids=repr)
@pytest.mark.parametrize(
    ("layout", "wire"),
    [
        (Expanded(capacity=8), Fp8(block=8)),
        (Padded(capacity=5), Fp8(block=8, scale="ue8m0", packed=True, column_major=True)),
    ],
    ids=repr,
)
def test_dequantised_rows_have_the_bits_of_the_formula(world, layout, wire, combine_wire):
    spec = rows.spec_of(layout, wire)
    for outcomes in world.run(
        rows.dequantize, spec.__class__(**{**vars(spec), "num_experts": 4, "combine_wire": combine_wire})
    ):
        assert all(outcomes)


def capture_a_step(group, spec):
    """Gradients of replays with other inputs, of the same calls outside of the graph, and how many plans were made."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        inputs = [programs.make_inputs(buffer.rank + 10 * i, num_tokens=4) for i in range(3)]
        x, topk_idx, weights, direction = (tensor.detach().clone() for tensor in inputs[0])
        x.requires_grad_()
        weights.requires_grad_()

        def run():
            recv = ag.dispatch(buffer, x, topk_idx, rows="capacity")
            out = ag.combine(buffer, torch.tanh(recv.x), recv.plan, weights=weights)
            return torch.autograd.grad(out, (x, weights), direction)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with memo.counting(buffer) as made, torch.cuda.graph(graph):
            grads = run()
        outcomes = []
        for given in inputs:
            for here, there in zip((x, topk_idx, weights, direction), given, strict=True):
                here.detach().copy_(there.detach())
            graph.replay()
            replayed = [grad.clone() for grad in grads]
            outcomes.append(all(same_bits(got, want) for got, want in zip(replayed, run(), strict=True)))
        buffer.check()
    return outcomes, made[0]


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("layout", [Compact(), Padded()], ids=repr)
def test_a_step_in_a_graph_makes_its_plan_once_and_gives_the_same_bits(world, layout):
    for outcomes, made in world.run(capture_a_step, programs.make_spec(layout)):
        assert outcomes == [True] * 3
        assert made == 0
