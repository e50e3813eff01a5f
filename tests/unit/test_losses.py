"""The gate's auxiliary losses against their formulas, term by term, with gradients; and a gate that can learn."""

import warnings

import pytest
import torch

from crossdock.errors import ConfigError
from crossdock.nn import ExpertParallel, Gate, GroupedExperts
from crossdock.routing import balance_loss, group_limited_topk, softmax_topk, z_loss

T, E, K = 9, 6, 3


def drawn(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(T, E, generator=g)).to(dtype)
    topk_idx = torch.rand(T, E, generator=g).argsort(1)[:, :K]
    topk_idx[::4, 1:] = -1
    topk_idx[5] = -1
    return logits, topk_idx


def balanced_by_hand(logits, topk_idx, score, counts=None):
    """E * sum over experts of its share of picks and its mean score, in float64."""
    scores = [row.softmax(0) if score == "softmax" else row.sigmoid() / row.sigmoid().sum() for row in logits.double()]
    picks = [e for row in topk_idx.tolist() for e in row if e >= 0]
    counts = [picks.count(e) for e in range(E)] if counts is None else counts
    return E * sum(counts[e] / sum(counts) * sum(row[e] for row in scores) / len(scores) for e in range(E))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("counts", [None, [3, 0, 1, 5, 2, 2]])
def test_balance_loss_and_its_gradient_are_those_of_the_formula(score, counts):
    logits, topk_idx = drawn()
    given = None if counts is None else torch.tensor(counts)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = balance_loss(mine, topk_idx, score=score, num_tokens_per_expert=given)
    want = balanced_by_hand(theirs, topk_idx, score, counts)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want.float())
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert mine.grad.abs().max() > 1e-3


def test_balance_loss_is_one_where_all_are_used_alike_and_e_where_one_is():
    even = torch.arange(E).view(E, 1)
    assert balance_loss(torch.zeros(E, E), even).item() == pytest.approx(1)
    hot = torch.full((E, E), -50.0)
    hot[:, 2] = 50.0
    assert balance_loss(hot, torch.full((E, 1), 2)).item() == pytest.approx(E)


def test_a_step_against_the_balance_loss_moves_tokens_from_the_popular_expert():
    logits, _ = drawn()
    logits[:, 2] += 3
    leaf = logits.requires_grad_()
    balance_loss(leaf, softmax_topk(leaf, 1).topk_idx).backward()
    assert (leaf.grad[:, 2] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_and_its_gradient_are_those_of_the_formula(dtype):
    logits, _ = drawn(dtype)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = z_loss(mine)
    want = sum(row.exp().sum().log() ** 2 for row in theirs.double()) / T
    loss.backward()
    want.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want.float())
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_losses_of_no_tokens_are_zero_and_have_gradients():
    logits = torch.zeros(0, E, requires_grad=True)
    (z_loss(logits) + balance_loss(logits, torch.zeros(0, K, dtype=torch.int64))).backward()
    assert logits.grad.shape == (0, E)
    assert z_loss(logits).item() == balance_loss(logits, torch.zeros(0, K, dtype=torch.int64)).item() == 0


def test_losses_are_float32_under_autocast():
    logits, topk_idx = drawn()
    plain = z_loss(logits), balance_loss(logits, topk_idx)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z_loss(logits), balance_loss(logits, topk_idx)) == plain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda logits, idx: balance_loss(logits[0], idx), "pass a float tensor of shape"),
        (lambda logits, idx: balance_loss(logits, idx[:2]), r"pass the picks of these tokens, \[9, K\]"),
        (lambda logits, idx: balance_loss(logits, idx, score="relu"), "pass 'softmax' or 'sigmoid'"),
        (lambda logits, idx: balance_loss(logits, idx, num_tokens_per_expert=idx), r"one count per expert, \[6\]"),
        (lambda logits, _: z_loss(logits.long()), "pass a float tensor of shape"),
    ],
)
def test_losses_refuse_what_does_not_fit(call, message):
    with pytest.raises(ConfigError, match=message):
        call(*drawn())


class GateWithLosses(Gate):
    """As the documentation has it: forward is logits, losses, choose."""

    def forward(self, x):
        logits = self.logits(x)
        routing = self.choose(logits)
        self.loss = 0.01 * balance_loss(logits, routing.topk_idx, score=self.score) + 0.001 * z_loss(logits)
        return routing


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_gate_with_losses_is_a_gate_and_its_weight_learns_from_them(score):
    gate, plain = GateWithLosses(8, E, K, score=score), Gate(8, E, K, score=score)
    plain.load_state_dict(gate.state_dict())
    layer = ExpertParallel(gate, GroupedExperts(E, 8, 16))
    x = torch.randn(T, 8, generator=torch.Generator().manual_seed(0))
    layer(x)
    gate.loss.backward()
    assert gate.weight.grad.abs().max() > 1e-5
    assert torch.equal(gate(x).topk_idx, plain(x).topk_idx)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", [{}, {"renormalize": False}])
def test_a_gate_of_one_pick_learns(score, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = ExpertParallel(Gate(8, 4, 1, score=score, **options), GroupedExperts(4, 8, 16))
    layer(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 1e-6


def test_a_gate_of_one_pick_that_is_told_to_renormalise_warns():
    with pytest.warns(UserWarning, match=r"makes every weight 1.*leave renormalize out, or pass False"):
        gate = Gate(8, 4, 1, renormalize=True)
    assert gate(torch.ones(2, 8)).topk_weights.tolist() == [[1.0], [1.0]]


def test_functions_renormalise_several_picks_and_not_one():
    logits = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    assert softmax_topk(logits, 1).topk_weights.item() == pytest.approx(logits.softmax(1)[0, 1].item())
    assert softmax_topk(logits, 2).topk_weights.sum().item() == pytest.approx(1)
    one = group_limited_topk(logits, 1, num_groups=1, num_topk_groups=1)
    assert one.topk_weights.item() == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert softmax_topk(logits, 1, renormalize=True).topk_weights.item() == 1
