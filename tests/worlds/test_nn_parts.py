"""The layer's parts: what it saves and shares, what it counts, and what does not fit together."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from crossdock import Buffer, CapacityError, ConfigError, Padded
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, Placement
from tests.worlds.test_nn_layer import E, F, H, K, layer_of, spec_of, tokens_of, weights_of


def keep_and_copy(group, spec):
    with Buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        layer.buffer = buffer
        state = layer.state_dict()
        other = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        other.buffer = buffer
        for parameter in other.parameters():
            parameter.data = torch.full_like(parameter, float("nan"))
        other.load_state_dict(state)
        twin = copy.deepcopy(layer)
        stored = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own
        x, _ = tokens_of(buffer.rank)
        with torch.no_grad():
            outs = [module(x) for module in (layer, other, twin)]
            error = None
            try:
                stored(x)
            except ConfigError as raised:
                error = str(raised)
        return sorted(state), twin.buffer is buffer, stored.buffer, outs, error


@pytest.mark.worlds("inproc-2", "processes-2")
def test_the_buffer_is_no_state(world):
    for keys, is_shared, stored, outs, error in world.run(keep_and_copy, spec_of(layout=Padded())):
        assert keys == ["experts.w1", "experts.w2", "experts.w3", "gate.weight", "shared.weight"]
        assert is_shared
        assert stored is None
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        assert error == (
            "the experts here are 4 of num_experts=8, and the layer has no buffer to reach the others; set layer.buffer"
        )


def bring_too_many(group, spec):
    with Buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        layer.buffer = buffer
        try:
            layer(torch.zeros(10 if buffer.rank == 0 else 1, H))
        except CapacityError as error:
            return str(error)
    return None


@pytest.mark.worlds("inproc-2")
def test_more_tokens_than_the_spec_has(world):
    for said in world.run(bring_too_many, spec_of()):
        assert said.startswith("rank 0 brought 10 tokens, more than max_tokens=9; no row was moved: split the batch")


def count(group, spec):
    with Buffer(group, spec) as buffer:
        layer = layer_of(rank=buffer.rank, num_ranks=buffer.topology.num_ranks)
        layer.buffer = buffer
        x, _ = tokens_of(buffer.rank)
        with torch.no_grad():
            layer.eval()(x)
            layer.train()(x)
            layer(x)
        return layer.take_load(), layer.take_load()


@pytest.mark.worlds("inproc-4")
def test_load_counts_training_passes(world):
    for rank, (load, again) in enumerate(world.run(count, spec_of())):
        scores = tokens_of(rank)[0] @ weights_of()["gate"].T
        want = [0] * E
        for t, row in enumerate(scores):
            for e in row.argsort(descending=True)[: K - 1 if t % 2 == 0 else K].tolist():
                want[e] += 2
        assert load.tolist() == want
        assert again.tolist() == [0] * E


def misfit(group, spec, parts):
    with Buffer(group, spec) as buffer:
        try:
            ExpertParallel(*parts, buffer)
        except ConfigError as error:
            return str(error)
    return None


@pytest.mark.worlds("inproc-2")
@pytest.mark.parametrize(
    ("gate", "experts", "message"),
    [
        ((H, E, 2), (4, H, F), "the gate has num_topk=2, the buffer's Spec 3"),
        ((8, E, K), (4, H, F), "the gate has hidden=8, the buffer's Spec 16"),
        ((H, 16, K), (4, H, F), "the layer has num_experts (physical ones)=16, the buffer's Spec 8"),
        ((H, E, K), (4, 8, F), "the experts have hidden=8, the buffer's Spec 16"),
        ((H, E, K), (8, H, F), "the experts here are 8, of num_experts=8 on 2 ranks; hold 4 on each"),
    ],
)
def test_parts_that_do_not_fit(world, gate, experts, message):
    for error in world.run(misfit, spec_of(), (Gate(*gate), GroupedExperts(*experts))):
        assert error.startswith(message)


def test_layer_refuses_parts_that_do_not_fit_each_other():
    layer = ExpertParallel(Gate(4, num_experts=2, num_topk=1), GroupedExperts(2, hidden=4, intermediate=8))
    with pytest.raises(ConfigError, match=r"x has shape \[3, 5\]; this layer takes \[\.\.\., hidden=4\]"):
        layer(torch.zeros(3, 5))
    with pytest.raises(ConfigError, match=r"buffer is a str; pass a crossdock\.Buffer, or None"):
        layer.buffer = "buffer"
    with (
        mock.patch.object(Gate, "forward", lambda _, x: (x[:, :1], x[:, :1])),
        pytest.raises(ConfigError, match=r"the gate, a Gate, gave picks as torch\.float32; return"),
    ):
        layer(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="num_experts=None; give it that number"):
        ExpertParallel(nn.Linear(H, E), GroupedExperts(E, H, F))
    with pytest.raises(ConfigError, match="the placement has 3 logical experts, the gate num_experts=8"):
        ExpertParallel(Gate(H, E, K), GroupedExperts(E, H, F), placement=Placement([0, 1, 2]))
