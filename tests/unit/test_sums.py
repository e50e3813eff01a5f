"""Sums in float32: their order, their roundings, and rows that are not there."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossdock.backends import sums
from crossdock.backends.sums import sum_rows
from crossdock.plan import Terms
from tests.cases import same_bits

CHUNK_ROWS = 8


@pytest.fixture(params=["sparse", "plain"], autouse=True)
def way(request, monkeypatch):
    """Unweighted sums go through torch's sparse product where it is exact: both ways give the same bits."""
    if request.param == "plain":
        monkeypatch.setattr(sums, "_sparse_sums_are_ours", lambda _: False)
    else:
        assert all(map(sums._sparse_sums_are_ours, (torch.bfloat16, torch.float16, torch.float32)))


def summed(source, terms, *, dtype=None, **kwargs):
    table = torch.tensor(terms, dtype=torch.int64).view(len(terms), -1).numpy()
    return sum_rows(source, Terms.of(table), dtype=dtype or source.dtype, **kwargs)


def test_sums_run_from_left_to_right():
    source = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert summed(source, [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0]]).tolist() == [[0.0], [1.0], [0.0], [1.0]]


def test_products_are_rounded_before_they_are_added():
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24: a fused multiply-add would keep the last part of it.
    a = 1 + 2.0**-12
    source = torch.tensor([[-(1 + 2.0**-11)], [a]])
    assert summed(source, [[0, 1]], weights=torch.tensor([1.0, a])).item() == 0.0


def test_a_sum_is_cast_once():
    # In bfloat16, 256 + 1 is 256, twice; in float32 it is 258, which bfloat16 has.
    source = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    assert summed(source, [[0, 1, 1]]).item() == 258.0
    assert summed(source, [[0, 1]], bias=torch.tensor([1.0])).item() == 258.0


def test_a_sum_begins_with_zero():
    source = torch.tensor([[-0.0], [0.0]])
    assert not summed(source, [[0, 0], [0, 1], [0, -1], [-1, -1]]).signbit().any()


def test_sums_of_none_are_zero_plus_bias():
    assert summed(torch.zeros(0, 2), [[], []]).tolist() == [[0.0, 0.0]] * 2
    assert summed(torch.zeros(0, 2), [[], []], bias=torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "wide"])
@given(
    seed=st.integers(0, 2**20),
    num_sums=st.sampled_from([0, 1, 5, CHUNK_ROWS, 2 * CHUNK_ROWS + 3]),
    num_terms=st.integers(0, 6),
    options=st.tuples(st.booleans(), st.sampled_from([None, 1, 2]), st.booleans()),
)
def test_any_sums_are_those_of_a_plain_loop(dtype, out_dtype, seed, num_sums, num_terms, options):
    is_weighted, bias_dim, is_ragged = options
    g = torch.Generator().manual_seed(seed)
    source = torch.randn(11, 5, generator=g).to(dtype)
    terms = torch.randint(0, 11, (num_sums, num_terms), generator=g)
    if is_ragged:
        lengths = torch.randint(0, num_terms + 1, (num_sums, 1), generator=g)
        terms[torch.arange(num_terms) >= lengths] = -1
    weights = torch.randn(num_sums, num_terms, generator=g) if is_weighted else None
    bias = {None: None, 1: torch.randn(5, generator=g), 2: torch.randn(num_sums, 5, generator=g)}[bias_dim]
    of_terms = None if weights is None else weights[terms >= 0]
    with patch.object(sums, "chunk_rows", return_value=CHUNK_ROWS):
        out = sum_rows(source, Terms.of(terms.numpy()), dtype=out_dtype or dtype, weights=of_terms, bias=bias)
    for t, row in enumerate(terms.tolist()):
        products = [
            source[n].float() * (1.0 if weights is None else weights[t, j]) for j, n in enumerate(row) if n >= 0
        ]
        total = torch.zeros(5)
        for product in products:
            total = total + product
        if bias is not None:
            total = total + (bias[t] if bias.dim() == 2 else bias)
        assert same_bits(out[t], total.to(out.dtype)), t
