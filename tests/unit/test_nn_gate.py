"""The gate against DeepSeek-V3's choice in plain Python, its bias, and its precision."""

import pytest
import torch

from crossdock.errors import ConfigError
from crossdock.nn import Gate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picked_by_hand(scores, biased, num_topk, groups, num_topk_groups):
    """DeepSeek-V3's choice for one token, in plain Python."""
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    worth = [sum(sorted((biased[e] for e in members[g]), reverse=True)[:2]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-worth[g], g))[:num_topk_groups]
    return sorted((e for g in best for e in members[g]), key=lambda e: (-biased[e], e))[:num_topk]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gate_is_the_loops_with_gradients(score):
    groups = (1, 1) if score == "softmax" else (4, 2)
    gate = Gate(6, 8, 3, score=score, num_groups=groups[0], num_topk_groups=groups[1], scale=2.5)
    if gate.bias is not None:
        gate.bias.copy_(torch.linspace(-0.4, 0.4, 8))
    x = torch.randn(20, 6, generator=seeded(), requires_grad=True)
    slope = torch.randn(20, 3, generator=seeded(1))
    routing = gate(x)
    (routing.topk_weights * slope).sum().backward()

    weight, rows = gate.weight.detach().requires_grad_(), x.detach().requires_grad_()
    loss = torch.zeros(())
    for t, row in enumerate(rows):
        logits = weight @ row
        scores = logits.softmax(0) if score == "softmax" else logits.sigmoid()
        biased = (scores.detach() + (0 if gate.bias is None else gate.bias)).tolist()
        picks = picked_by_hand(scores, biased, 3, *groups)
        assert routing.topk_idx[t].tolist() == picks
        for k, e in enumerate(picks):
            share = 2.5 * scores[e] / sum(scores[p] for p in picks)
            torch.testing.assert_close(routing.topk_weights[t, k], share)
            loss = loss + share * slope[t, k]
    loss.backward()
    torch.testing.assert_close(gate.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad, rows.grad, rtol=1e-4, atol=1e-6)


def test_gate_chooses_in_float32_under_autocast_and_in_bfloat16():
    gate = Gate(2, 2, 1)
    gate.weight.data = torch.tensor([[1.0, 0.0], [1.0, 2.0**-9]])
    x = torch.tensor([[1.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(x).topk_idx.tolist() == [[1]]  # in bfloat16 they were equal, and 0 would win
    gate = Gate(2, 2, 1).to(torch.bfloat16)
    assert gate(x.bfloat16()).topk_weights.dtype == torch.float32


def test_bias_stays_float32_and_is_saved():
    gate = Gate(2, 2, 1, score="sigmoid")
    gate.balance(torch.tensor([3, 1]), rate=0.001)
    gate = gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.bias, torch.tensor([-0.001, 0.001]))
    other = Gate(2, 2, 1, score="sigmoid")
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.bias, gate.bias)


@pytest.mark.parametrize("num_experts", [4, 12])
def test_balance_evens_the_load_out(num_experts):
    gate = Gate(8, num_experts, 2, score="sigmoid")
    gate.weight.data = torch.randn(num_experts, 8, generator=seeded(2))
    gate.weight.data[0] = 3  # a favourite
    x = torch.randn(500, 8, generator=seeded(3)) + 0.5

    def load():
        return gate(x).topk_idx.flatten().bincount(minlength=num_experts)

    before = load()
    for _ in range(1000):
        gate.balance(load(), rate=0.002)
    mean = 500 * 2 / num_experts
    assert before.max() > 1.5 * mean
    assert (load() - mean).abs().max() < 0.1 * mean


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_groups": 2, "num_topk_groups": 1}, "num_groups=2 and num_topk_groups=1 with score='softmax'"),
        ({"score": "tanh"}, "score='tanh'; pass 'softmax' or 'sigmoid'"),
        ({"scale": 0.0}, "scale=0.0 is not a positive"),
        ({"num_topk": 9}, "num_topk=9 is not within 1..8"),
        ({"score": "sigmoid", "num_groups": 3}, "num_groups=3 does not divide num_experts=8"),
    ],
)
def test_gate_refuses(kwargs, message):
    with pytest.raises(ConfigError) as error:
        Gate(**({"hidden": 4, "num_experts": 8, "num_topk": 2} | kwargs))
    assert str(error.value).startswith(message)


def test_balance_refuses():
    with pytest.raises(ConfigError, match="score='softmax' has no bias"):
        Gate(2, 4, 1).balance(torch.ones(4), rate=0.001)
    gate = Gate(2, 4, 1, score="sigmoid")
    with pytest.raises(ConfigError, match=r"num_tokens_per_expert has shape \[3\]"):
        gate.balance(torch.ones(3), rate=0.001)
    with pytest.raises(ConfigError, match="rate=-1 is not"):
        gate.balance(torch.ones(4), rate=-1)
