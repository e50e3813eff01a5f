"""Grouped products and experts against a product per row; what is in gaps has no part in anything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from crossdock.errors import ConfigError
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, expert_ids, grouped_mm
from crossdock.nn import grouped as grouped_module

NAN = float("nan")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_grouped_mm_is_a_product_per_expert(monkeypatch, native, dtype, sizes):
    if not native:
        monkeypatch.setattr(grouped_module, "_NATIVE", None)
    counts = [3, 0, 5, 1]
    x = torch.randn(11, sizes[0], generator=seeded()).to(dtype)
    x[9:] = NAN  # behind the last segment
    x.requires_grad_()
    weights = torch.randn(4, sizes[1], sizes[0], generator=seeded(1)).to(dtype).requires_grad_()
    y = grouped_mm(x, weights, torch.tensor(counts, dtype=torch.int32))[:9]
    y.sum().backward()
    twin, weights_twin = x.detach()[:9].requires_grad_(), weights.detach().requires_grad_()
    start, want = 0, []
    for e, n in enumerate(counts):
        want += [weights_twin[e] @ row for row in twin[start : start + n]]
        start += n
    want = torch.stack(want)
    want.sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, want, **tolerance)
    torch.testing.assert_close(x.grad[:9], twin.grad, **tolerance)
    torch.testing.assert_close(weights.grad, weights_twin.grad, **tolerance)


def test_grouped_mm_takes_the_gradient_of_a_sum():
    """It is expanded, all of it one number; torch's own product refuses that."""
    x = torch.randn(3, 8, generator=seeded())
    weights = torch.randn(2, 4, 8, generator=seeded(1), requires_grad=True)
    grouped_mm(x, weights, torch.tensor([1, 2])).sum().backward()
    none = torch.zeros(0, 8).as_strided((0, 8), (0, 0)).requires_grad_()  # as NumPy has them, and a sum's gradient
    grouped_mm(none, weights, torch.tensor([0, 0])).sum().backward()
    assert none.grad.shape == (0, 8)
    want = torch.stack([x[:1].sum(0), x[1:].sum(0)]).unsqueeze(1).expand(2, 4, 8)
    torch.testing.assert_close(weights.grad, want)


@pytest.mark.parametrize(
    ("x", "weights", "counts", "message"),
    [
        ((4, 3), (2, 5, 4), (2,), r"x has shape \[4, 3\], weights \[2, 5, 4\]"),
        ((4, 3), (2, 5, 3), (3,), r"num_tokens_per_expert has shape \[3\]; pass one count for each of the 2 experts"),
    ],
)
def test_grouped_mm_refuses(x, weights, counts, message):
    with pytest.raises(ConfigError, match=message):
        grouped_mm(torch.zeros(x), torch.zeros(weights), torch.ones(counts, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"x is torch.float64, weights are torch.float32"):
        grouped_mm(torch.zeros(2, 4).double(), torch.zeros(1, 4, 4), torch.tensor([2]))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 5))
def test_expert_ids_are_the_segments(counts, alignment, spare):
    segments = [-(-n // alignment) * alignment for n in counts]
    want = [e if i < counts[e] else -1 for e, length in enumerate(segments) for i in range(length)] + [-1] * spare
    offsets = torch.tensor([0, *segments]).cumsum(0)
    got = expert_ids(torch.tensor(counts, dtype=torch.int32), offsets.to(torch.int32), len(want))
    assert got.tolist() == want
    assert got.dtype == torch.int32
    packed = expert_ids(torch.tensor(counts), None, sum(counts) + spare)
    assert packed.tolist() == [e for e, n in enumerate(counts) for _ in range(n)] + [-1] * spare


def swiglu(experts, e, row):
    return experts.w2[e] @ (silu(experts.w1[e] @ row) * (experts.w3[e] @ row))


def grads_of(experts):
    return [weight.grad for weight in (experts.w1, experts.w2, experts.w3)]


def test_what_lies_behind_the_counts_has_no_part():
    experts, twin = GroupedExperts(3, 8, 4), GroupedExperts(3, 8, 4)
    twin.load_state_dict(experts.state_dict())
    counts = [2, 0, 5]
    x = torch.full((3, 5, 8), NAN)
    slope = torch.full((3, 5, 8), NAN)
    loss = torch.zeros(())
    rows = torch.randn(7, 8, generator=seeded(), requires_grad=True)
    places = [(e, i) for e, n in enumerate(counts) for i in range(n)]
    slopes = torch.randn(7, 8, generator=seeded(1))
    for (e, i), row, its_slope in zip(places, rows, slopes, strict=True):
        x[e, i], slope[e, i] = row.detach(), its_slope
        loss = loss + (swiglu(twin, e, row) * its_slope).sum()
    loss.backward()
    x.requires_grad_()
    y = experts(x, torch.tensor(counts, dtype=torch.int32))
    y.backward(slope)
    want = torch.zeros(3, 5, 8)
    want_grad = torch.zeros(3, 5, 8)
    for (e, i), row, grad in zip(places, rows, rows.grad, strict=True):
        want[e, i], want_grad[e, i] = swiglu(twin, e, row).detach(), grad
    torch.testing.assert_close(y.detach(), want)
    torch.testing.assert_close(x.grad, want_grad)
    for mine, theirs in zip(grads_of(experts), grads_of(twin), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_padding_rows_of_aligned_segments_are_harmless():
    experts, twin = GroupedExperts(2, 8, 4), GroupedExperts(2, 8, 4)
    twin.load_state_dict(experts.state_dict())
    x = torch.randn(8, 8, generator=seeded())
    x[[3, 5, 6, 7]] = 0
    slope = torch.randn(8, 8, generator=seeded(1))
    y = experts(x, torch.tensor([4, 4]))
    (y * slope).sum().backward()
    real = [(0, 0), (0, 1), (0, 2), (1, 4)]
    sum((swiglu(twin, e, x[r]) * slope[r]).sum() for e, r in real).backward()
    assert (y[[3, 5, 6, 7]] == 0).all()
    for mine, theirs in zip(grads_of(experts), grads_of(twin), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_experts_compute_in_their_weights_dtype_or_autocasts():
    experts = GroupedExperts(1, 8, 4)
    x = torch.ones(2, 8)
    counts = torch.tensor([2])
    assert experts.to(torch.bfloat16)(x, counts).dtype == torch.bfloat16
    full = experts.float()(x, counts)
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(x, counts)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), full, rtol=0.05, atol=0.01)
    cast.sum().backward()
    assert experts.w1.grad.dtype == torch.float32


def test_experts_start_within_linear_bounds_and_refuse_nothing_sizes():
    experts = GroupedExperts(2, 16, 4)
    assert experts.w1.abs().max() <= 1 / 4
    assert experts.w2.abs().max() <= 1 / 2
    assert experts.w2.abs().max() > 1 / 4
    with pytest.raises(ConfigError, match="intermediate=0; pass a positive integer"):
        GroupedExperts(2, 16, 0)


def test_layer_keeps_dtype_and_leading_dimensions():
    layer = ExpertParallel(Gate(8, 4, 2), GroupedExperts(4, 8, 4))
    x = torch.randn(2, 3, 8, generator=seeded())
    flat = layer(x.view(6, 8))
    assert torch.equal(layer(x), flat.view(2, 3, 8))
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float().view(6, 8), flat, rtol=0.1, atol=0.02)
    assert torch.equal(layer(x[:0]), x[:0])


class Fixed(torch.nn.Module):
    """A gate that always decides the same."""

    num_experts = 3

    def forward(self, x):
        return torch.tensor([[2, 0, 1]]).expand(len(x), 3), torch.ones(len(x), 3)


class Constant(torch.nn.Module):
    """Experts that give 256, 1 and 1, in bfloat16."""

    def forward(self, x, num_tokens_per_expert):
        values = torch.tensor([256.0, 1.0, 1.0]).repeat_interleave(num_tokens_per_expert)
        return values.bfloat16().unsqueeze(1).expand_as(x)


def test_picks_are_summed_in_float32():
    layer = ExpertParallel(Fixed(), Constant())
    assert torch.equal(layer(torch.zeros(2, 4)), torch.full((2, 4), 258.0))  # in bfloat16, 256 + 1 is 256
