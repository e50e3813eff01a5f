import pytest
import torch
from torch.nn.functional import silu

from crossdock.cli.demo.generate import TEMPERATURE, UNKNOWN, draw_bytes, draw_noise, generate_plainly, prompts_of
from crossdock.cli.demo.model import Cache, Shape
from crossdock.cli.demo.parameters import initial_values, plain_model, share, whole
from crossdock.cli.demo.plain import PlainGate, PlainMoE
from crossdock.nn import Gate

SHAPE = Shape(
    hidden=16,
    num_layers=2,
    num_heads=2,
    context=12,
    num_experts=8,
    num_topk=2,
    intermediate=4,
    num_groups=4,
    num_topk_groups=2,
)


@pytest.fixture
def model():
    model = plain_model(SHAPE)
    model.load_state_dict(initial_values(SHAPE, seed=3))
    return model


def test_the_plain_gate_is_the_librarys():
    generator = torch.Generator().manual_seed(0)
    plain, gate = PlainGate(SHAPE), Gate(16, 8, 2, num_groups=4, num_topk_groups=2, score="sigmoid")
    values = {"weight": torch.randn(8, 16, generator=generator), "bias": torch.randn(8, generator=generator)}
    plain.load_state_dict(values)
    gate.load_state_dict(values)
    x = torch.randn(50, 16, generator=generator)
    for mine, theirs in zip(plain(x), gate(x), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_plain_block_is_a_sum_over_picks(model):
    moe = model.layers[0].moe
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    out = moe(x)
    picks, weights = moe.gate(x.flatten(0, 1))
    w1, w2, w3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
    expected = torch.zeros(15, 16)
    for token in range(15):
        row = x.flatten(0, 1)[token]
        for e, weight in zip(picks[token].tolist(), weights[token], strict=True):
            expected[token] += weight * (w2[e] @ (silu(w1[e] @ row) * (w3[e] @ row)))
    torch.testing.assert_close(out.flatten(0, 1), expected)
    assert moe.num_tokens_per_expert.tolist() == picks.flatten().bincount(minlength=8).tolist()


def test_a_cache_changes_nothing(model):
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(2))
    whole_scores = model(tokens)
    caches = [Cache(SHAPE, 3) for _ in model.layers]
    with torch.no_grad():
        for position in range(12):
            h = model.embed(tokens[:, position : position + 1])
            for layer, cache in zip(model.layers, caches, strict=True):
                h = layer.attend(h, cache)
                h = h + layer.moe(layer.moe_norm(h))
            torch.testing.assert_close(model.scores(h)[:, 0], whole_scores[:, position])


def test_generating_leaves_prompts_as_they_are(model):
    prompts = prompts_of([b"if", b"while x:"], 12)
    written = generate_plainly(model, prompts, torch.zeros(2, 12, 256))  # without noise, the likeliest
    assert written[prompts >= 0].tolist() == prompts[prompts >= 0].tolist()
    assert written.min() >= 0
    for position in range(2, 12):
        assert written[0, position] == model(written[:1, :position])[0, -1].argmax()


def test_noise_makes_draws_by_probability():
    scores = torch.tensor([3.0, 2.0] + [-50.0] * 254) * TEMPERATURE
    tokens = torch.full((4000, 1), UNKNOWN)
    draw_bytes(tokens, 0, scores.expand(4000, 1, 256), draw_noise(4000, 1, seed=0))
    assert float((tokens == 0).float().mean()) == pytest.approx(float(torch.tensor(1.0).sigmoid()), abs=0.03)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_shares_make_the_whole(num_ranks):
    values = initial_values(SHAPE, seed=0)
    shares = [share(values, rank, num_ranks) for rank in range(num_ranks)]
    assert shares[0]["layers.0.moe.experts.w1"].shape == (8 // num_ranks, 4, 16)
    again = whole(shares)
    assert list(again) == list(values)
    assert all(torch.equal(again[name], values[name]) for name in values)


def test_the_model_begins_not_knowing_anything(model):
    tokens = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(4))
    assert float(model(tokens).detach().log_softmax(-1).mean()) == pytest.approx(-5.545, abs=0.1)


def test_a_block_counts_all_picks():
    moe = PlainMoE(SHAPE)
    moe(torch.ones(7, 16))
    assert moe.num_tokens_per_expert.sum() == 14
