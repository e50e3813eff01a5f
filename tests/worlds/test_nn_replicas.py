"""Experts with copies: who uses which, and the sum of their gradients."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from crossdock import Buffer, ConfigError
from crossdock.nn import Gate, Placement, sum_replica_gradients
from tests.worlds.test_nn_layer import REPLICATED, H, layer_of, spec_of


def one_token_each(group, spec):
    with Buffer(group, spec) as buffer, torch.no_grad():
        placement = Placement(REPLICATED)
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks, placement=placement, gate=Gate)
        layer.gate.weight.data[[0, 3, 5], 0] = 100  # those that have copies
        layer.buffer = buffer
        layer(torch.eye(1, H))
        return buffer.gather_stats().num_tokens_per_expert


@pytest.mark.worlds("inproc-2", "inproc-4")
def test_ranks_with_one_token_use_different_copies(world):
    load = world.run(one_token_each, spec_of(num_experts=len(REPLICATED)))[0]
    want = [0] * len(REPLICATED)
    for logical in (0, 3, 5):
        copies = [i for i, held in enumerate(REPLICATED) if held == logical]
        for rank in range(world.num_ranks):
            want[copies[rank % len(copies)]] += 1
    assert load.tolist() == want


def sum_copies(group, rank_of):
    """Expert 0 has copies on all of four ranks; of expert 1, which has one, nothing may change."""
    rank = rank_of(group)
    weights = [nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16)) for _ in range(3)]
    weights[0].grad = torch.tensor([[256.0 if rank == 0 else 1.0], [rank]], dtype=torch.bfloat16)
    weights[1].grad = torch.tensor([[7.0], [rank]], dtype=torch.bfloat16) if rank == 1 else None
    weights[2].requires_grad_(False)
    sum_replica_gradients(weights, Placement([0, 1, 0, 2, 0, 3, 0, 4]), group)
    return [None if weight.grad is None else weight.grad.flatten().tolist() for weight in weights]


def rank_of_threads(group):
    return group.rank


def rank_of_processes(group):
    return dist.get_rank(group)


@pytest.mark.worlds("inproc-4", "processes-4")
def test_gradients_of_copies_are_summed_in_float32(world):
    rank_of = rank_of_processes if world.kind == "processes" else rank_of_threads
    for rank, grads in enumerate(world.run(sum_copies, rank_of)):
        assert grads == [[260.0, rank], [7.0, 1.0 if rank == 1 else 0.0], None]  # 259, to even


def misplace(group):
    try:
        parameter = nn.Parameter(torch.zeros(3, 2))
        sum_replica_gradients([parameter], Placement([0, 1, 0, 1]), group)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.worlds("inproc-2")
def test_gradients_of_other_experts_than_the_placements(world):
    for rank, error in enumerate(world.run(misplace)):
        assert error.startswith(f"a parameter has 3 experts on rank {rank}, the placement gives each of 2 ranks 2")
