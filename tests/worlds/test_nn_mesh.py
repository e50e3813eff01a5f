"""parallelize_module: a layer that is split over a mesh trains as the whole one does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from crossdock import Buffer, ConfigError, Expanded, Padded
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, Placement, ShardExperts, sum_replica_gradients
from tests.worlds.test_nn_layer import EXPERTS, REPLICATED, E, F, H, K, layer_of, spec_of, tokens_of

WORLDS = pytest.mark.worlds("processes-2")
NUM_STEPS = 3
MAX_NORM = 0.5


def mesh_of_all():
    """Of the default group: DTensor's caches outlive the group that the world makes for each program."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def optimizer_of(layer):
    experts = {"params": list(layer.experts.parameters())}
    rest = {"params": [p for name, p in layer.named_parameters() if not name.startswith("experts.")]}
    return torch.optim.AdamW([experts, rest], lr=0.05)


def train_split(group, table):
    """Rank 1 begins with other experts, which rank 0's replace; returns stacks that were put together again."""
    mesh = mesh_of_all()
    placement = None if table is None else Placement(table)
    num_experts = E if table is None else len(table)
    with Buffer(mesh, spec_of(num_experts=num_experts, layout=Expanded(alignment=4))) as buffer:
        layer = layer_of(placement=placement)
        if buffer.rank == 1:
            layer.experts.reset_parameters()
        model = parallelize_module(nn.ModuleDict({"moe": layer}), mesh, {"moe": ShardExperts(buffer)})
        layer = model["moe"]
        optimizer, norms = optimizer_of(layer), []
        for step in range(NUM_STEPS):
            x, slope = tokens_of(2 * buffer.rank, seed=step)
            optimizer.zero_grad()
            (layer(x) * slope).sum().backward()
            for parameter in (layer.gate.weight, layer.shared.weight):
                dist.all_reduce(parameter.grad, group=group)
            if placement is not None:
                sum_replica_gradients(layer.experts.parameters(), placement, buffer.group)
            norms.append(nn.utils.clip_grad_norm_(layer.experts.parameters(), MAX_NORM).full_tensor())
            optimizer.step()
        state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in layer.state_dict().items()}
        moments = optimizer.state[layer.experts.w2]["exp_avg"].full_tensor()
        return state, torch.stack(norms), moments, layer.experts.num_experts, layer.experts.w1.to_local().shape[0]


def train_whole():
    layer = layer_of()
    optimizer, norms = optimizer_of(layer), []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for rank in (0, 2):
            x, slope = tokens_of(rank, seed=step)
            (layer(x) * slope).sum().backward()
        norms.append(nn.utils.clip_grad_norm_(layer.experts.parameters(), MAX_NORM))
        optimizer.step()
    return layer.state_dict(), torch.stack(norms), optimizer.state[layer.experts.w2]["exp_avg"]


@WORLDS
def test_split_layer_trains_as_the_whole(world):
    want, norms, moments = train_whole()
    for state, mine, exp_avg, num_experts, num_local in world.run(train_split, None):
        assert (num_experts, num_local) == (E, E // 2)
        torch.testing.assert_close(mine, norms, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exp_avg, moments, rtol=1e-3, atol=1e-5)
        assert state.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: name + m)


@WORLDS
def test_copies_stay_equal_in_training(world):
    (state, *_), (other, *_) = world.run(train_split, REPLICATED)
    for name in EXPERTS:
        stack = state[f"experts.{name}"]
        for logical in range(E):
            copies = [i for i, held in enumerate(REPLICATED) if held == logical]
            for i in copies[1:]:
                assert torch.equal(stack[i], stack[copies[0]])
        assert not torch.equal(stack[0], getattr(layer_of().experts, name)[0])  # it has moved at all
        assert torch.equal(stack, other[f"experts.{name}"])


def keep_own(group):
    """A frozen stack, and no values from rank 0."""
    with Buffer(group, spec_of()) as buffer:
        layer = layer_of()
        layer.experts.w2.requires_grad_(False)
        layer.experts.w1.data.fill_(buffer.rank)
        parallelize_module(layer, mesh_of_all(), ShardExperts(buffer), src_data_rank=None)
        return layer.experts.w1.detach().to_local(), [getattr(layer.experts, name).requires_grad for name in EXPERTS]


@WORLDS
def test_frozen_stays_frozen_and_values_may_be_the_ranks_own(world):
    for rank, (w1, wants_grad) in enumerate(world.run(keep_own)):
        assert (w1 == rank).all()
        assert wants_grad == [True, False, True]


def apply_wrongly(group, case):
    mesh = mesh_of_all()
    with Buffer(group, spec_of(layout=Padded())) as buffer:
        module, its_mesh = layer_of(), mesh
        if case == "linear":
            module = nn.Linear(2, 2)
        elif case == "2-D mesh":
            its_mesh = DeviceMesh("cpu", torch.arange(2).view(1, 2))
        elif case == "rank's own":
            module = ExpertParallel(Gate(H, E, K), GroupedExperts(E // 2, H, F))
        elif case == "turned":
            its_mesh = DeviceMesh("cpu", [1, 0])
        try:
            parallelize_module(module, its_mesh, ShardExperts(buffer))
        except ConfigError as error:
            return str(error)
    return None


@WORLDS
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("linear", "ShardExperts is for crossdock.nn.ExpertParallel, and was applied to Linear"),
        ("2-D mesh", "the mesh has shape (1, 2), the buffer 2 ranks"),
        ("rank's own", "experts.w1 has shape [4, 12, 16]; to be sharded it must hold all 8 experts"),
        ("turned", "this process is number {other} of the mesh and rank {rank} of the buffer"),
    ],
)
def test_what_cannot_be_split(world, case, message):
    for rank, error in enumerate(world.run(apply_wrongly, case)):
        assert error.startswith(message.format(rank=rank, other=1 - rank))
