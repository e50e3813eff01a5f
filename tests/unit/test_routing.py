import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock import Buffer, ConfigError, PeerFailed, Spec, run_local
from crossdock.routing import (
    group_limited_topk,
    hot_expert_load,
    picks_of_ranks,
    record_load,
    recorded_load,
    softmax_topk,
    uniform_load,
    zipf_load,
)

LOADS = [uniform_load, zipf_load, hot_expert_load]
E = math.e


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit(score: float) -> float:
    return math.log(score / (1 - score))


@pytest.fixture
def annotations_unchecked() -> Iterator[None]:
    """As a user runs it: jaxtyping does not see the wrong shape before our own check does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_softmax_topk_of_literal_logits() -> None:
    topk_idx, topk_weights = softmax_topk(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), 2)
    assert topk_idx.tolist() == [[3, 1]]
    torch.testing.assert_close(topk_weights, torch.tensor([[E / (1 + E), 1 / (1 + E)]]))


def test_softmax_topk_without_renormalising_gives_the_probabilities() -> None:
    _, topk_weights = softmax_topk(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), 2, renormalize=False)
    total = 2 + E + E**2
    torch.testing.assert_close(topk_weights, torch.tensor([[E**2 / total, E / total]]))


def test_softmax_topk_prefers_the_lowest_id_of_equals() -> None:
    # torch.topk gives other ids here, and yet others on short rows.
    logits = torch.zeros(2, 300)
    logits[1, [7, 250]] = 1.0
    assert softmax_topk(logits, 4).topk_idx.tolist() == [[0, 1, 2, 3], [7, 250, 0, 1]]


def test_softmax_topk_weighs_bfloat16_logits_in_float32() -> None:
    logits = torch.randn(5, 16, generator=seeded()).bfloat16()
    low, wide = softmax_topk(logits, 4), softmax_topk(logits.float(), 4)
    assert low.topk_weights.dtype == torch.float32
    assert torch.equal(low.topk_weights, wide.topk_weights)
    assert torch.equal(low.topk_idx, wide.topk_idx)


def test_softmax_topk_of_no_tokens() -> None:
    assert softmax_topk(torch.zeros(0, 4), 2).topk_idx.tolist() == []


def test_softmax_topk_carries_gradients_to_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0]], requires_grad=True)
    softmax_topk(logits, 2).topk_weights[0, 0].backward()  # type: ignore[no-untyped-call]
    # w = sigmoid(l3 - l1), so dw/dl3 = w (1 - w) = -dw/dl1, and the experts not picked have no part in it.
    slope = E / (1 + E) ** 2
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -slope, 0.0, slope]]))


@pytest.mark.parametrize("num_topk", [0, 5])
def test_softmax_topk_refuses_num_topk_out_of_reach(num_topk: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_topk={num_topk} is not within 1\.\.4; .* num_experts=4"):
        softmax_topk(torch.zeros(1, 4), num_topk)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("logits", [torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(2, 4, dtype=torch.int64)])
def test_softmax_topk_refuses_logits_that_are_no_float_matrix(logits: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"logits is torch\.\w+ of shape \[.*\]; pass a float tensor"):
        softmax_topk(logits, 1)


def define_group_limited(
    scores: Tensor, biased: Tensor, num_topk: int, num_groups: int, num_topk_groups: int
) -> list[tuple[list[int], list[float]]]:
    """The definition, a token at a time, with Python's sort for the order of equals."""
    size = scores.shape[1] // num_groups
    rows = []
    for plain, row in zip(scores, biased, strict=True):
        groups = []
        for group in range(num_groups):
            best = sorted(row[group * size : (group + 1) * size].tolist(), reverse=True)[:2]
            groups.append((-torch.tensor(best).sum().item(), group))
        allowed = [group for _, group in sorted(groups)[:num_topk_groups]]
        picks = sorted((-row[e].item(), e) for e in range(scores.shape[1]) if e // size in allowed)[:num_topk]
        weights = [plain[e].item() for _, e in picks]
        rows.append(([e for _, e in picks], [weight / sum(weights) for weight in weights]))
    return rows


@st.composite
def gates(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int, int, int]:
    num_groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    num_topk_groups = draw(st.integers(1, num_groups))
    num_topk = draw(st.integers(1, num_topk_groups * size))
    num_experts = num_groups * size
    rows = st.lists(st.integers(-3, 3), min_size=num_experts, max_size=num_experts)  # few values, so many ties
    logits = torch.tensor(draw(st.lists(rows, min_size=1, max_size=4)), dtype=torch.float32)
    bias = draw(st.none() | rows.map(lambda row: torch.tensor(row, dtype=torch.float32)))
    return logits, bias, num_topk, num_groups, num_topk_groups


def test_group_limited_topk_of_literal_scores() -> None:
    # Scores by group: 0.9 + 0.1, 0.6 + 0.5, 0.7 + 0.2; the pair 0.6 + 0.5 wins though 0.9 and 0.7 are elsewhere.
    scores = [0.9, 0.1, 0.6, 0.5, 0.7, 0.2]
    logits = torch.tensor([[logit(score) for score in scores]])
    routing = group_limited_topk(logits, 2, num_groups=3, num_topk_groups=1, scale=2.5)
    assert routing.topk_idx.tolist() == [[2, 3]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[2.5 * 6 / 11, 2.5 * 5 / 11]]))
    # Two groups, three picks: 0.9 comes in with group 0, 0.7 is still out of reach.
    routing = group_limited_topk(logits, 3, num_groups=3, num_topk_groups=2)
    assert routing.topk_idx.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[0.45, 0.3, 0.25]]))


def test_group_limited_topk_picks_by_bias_and_weighs_without_it() -> None:
    logits = torch.tensor([[logit(score) for score in (0.8, 0.4, 0.2, 0.1)]])
    bias = torch.tensor([-1.0, 0.0, 0.5, 0.5])
    # Biased: -0.2, 0.4 | 0.7, 0.6.
    routing = group_limited_topk(logits, 2, num_groups=2, num_topk_groups=1, bias=bias)
    assert routing.topk_idx.tolist() == [[2, 3]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[2 / 3, 1 / 3]]))
    everywhere = group_limited_topk(logits, 3, num_groups=2, num_topk_groups=2, bias=bias, renormalize=False)
    assert everywhere.topk_idx.tolist() == [[2, 3, 1]]
    torch.testing.assert_close(everywhere.topk_weights, torch.tensor([[0.2, 0.1, 0.4]]))


def test_group_limited_topk_keeps_other_groups_out_when_all_biased_scores_are_negative() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    routing = group_limited_topk(logits, 3, num_groups=2, num_topk_groups=1, bias=torch.full((6,), -5.0))
    assert routing.topk_idx.tolist() == [[3, 4, 5]]


def test_group_limited_topk_keeps_other_groups_out_when_a_pick_has_an_infinite_bias() -> None:
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, -math.inf])
    routing = group_limited_topk(torch.zeros(1, 6), 3, num_groups=2, num_topk_groups=1, bias=bias)
    assert routing.topk_idx.tolist() == [[3, 4, 5]]


def test_group_limited_topk_counts_a_group_of_one_expert_as_that_expert() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    routing = group_limited_topk(logits, 2, num_groups=4, num_topk_groups=2)
    assert routing.topk_idx.tolist() == [[1, 3]]


def test_group_limited_topk_prefers_the_lowest_id_of_equal_groups_and_experts() -> None:
    routing = group_limited_topk(torch.zeros(1, 256), 8, num_groups=8, num_topk_groups=4)
    assert routing.topk_idx.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    bias = torch.zeros(256)
    bias[[200, 201, 40, 41]] = 1.0
    routing = group_limited_topk(torch.zeros(1, 256), 6, num_groups=8, num_topk_groups=2, bias=bias)
    assert routing.topk_idx.tolist() == [[40, 41, 200, 201, 32, 33]]


def test_group_limited_topk_gives_weights_of_zero_to_scores_of_zero() -> None:
    routing = group_limited_topk(torch.full((1, 4), -200.0), 2, num_groups=2, num_topk_groups=1)
    assert routing.topk_weights.tolist() == [[0.0, 0.0]]


def test_group_limited_topk_of_no_tokens() -> None:
    assert group_limited_topk(torch.zeros(0, 4), 2, num_groups=2, num_topk_groups=1).topk_idx.tolist() == []


@settings(deadline=None)
@given(gates())
def test_group_limited_topk_is_its_definition(gate: tuple[Tensor, Tensor | None, int, int, int]) -> None:
    logits, bias, num_topk, num_groups, num_topk_groups = gate
    sizes = {"num_groups": num_groups, "num_topk_groups": num_topk_groups}
    routing = group_limited_topk(logits, num_topk, bias=bias, renormalize=True, **sizes)
    scores = logits.sigmoid()
    biased = scores if bias is None else scores + bias
    expected = define_group_limited(scores, biased, num_topk, num_groups, num_topk_groups)
    assert routing.topk_idx.tolist() == [picks for picks, _ in expected]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([weights for _, weights in expected]))


@settings(deadline=None)
@given(gates(), st.floats(0.1, 10), st.integers(0, 2**31))
def test_group_limited_topk_picks_distinct_experts_of_few_groups_that_weigh_scale(
    gate: tuple[Tensor, Tensor | None, int, int, int], scale: float, seed: int
) -> None:
    like, bias, num_topk, num_groups, num_topk_groups = gate
    logits = 4 * torch.randn(like.shape, generator=seeded(seed))
    sizes = {"num_groups": num_groups, "num_topk_groups": num_topk_groups}
    topk_idx, topk_weights = group_limited_topk(logits, num_topk, bias=bias, scale=scale, renormalize=True, **sizes)
    for picks in topk_idx.tolist():
        assert len(set(picks)) == num_topk
        assert len({pick * num_groups // like.shape[1] for pick in picks}) <= num_topk_groups
    torch.testing.assert_close(topk_weights.sum(dim=1), torch.full((len(logits),), scale))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=8; pass a divisor of it"),
        ({"num_groups": 0}, "num_groups=0 does not divide num_experts=8; pass a divisor of it"),
        ({"num_topk_groups": 5}, "num_topk_groups=5 is not within 1..4; pass at most num_groups=4"),
        ({"num_topk_groups": 0}, "num_topk_groups=0 is not within 1..4; pass at most num_groups=4"),
        (
            {"num_topk": 5},
            (
                "num_topk=5 is not within 1..4, the experts of num_topk_groups=2 groups of 2; "
                "pass a smaller num_topk or a larger num_topk_groups"
            ),
        ),
        ({"bias": torch.zeros(4)}, "bias has shape [4]; pass one value per expert, shape [8]"),
        ({"scale": 0.0}, "scale=0.0 is not a positive, finite number; pass 1.0 to leave the weights as they are"),
        (
            {"scale": math.nan},
            "scale=nan is not a positive, finite number; pass 1.0 to leave the weights as they are",
        ),
    ],
)
@pytest.mark.usefixtures("annotations_unchecked")
def test_group_limited_topk_refuses_sizes_that_do_not_fit(wrong: dict[str, object], message: str) -> None:
    arguments = {"num_topk": 2, "num_groups": 4, "num_topk_groups": 2} | wrong
    with pytest.raises(ConfigError) as caught:
        group_limited_topk(torch.zeros(1, 8), **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


def assert_frequencies(observed: Tensor, expected: Tensor, num_tokens: int) -> None:
    """Within five standard deviations of a binomial; the seeds are fixed, so this holds always or never."""
    deviation = (num_tokens * expected * (1 - expected)).sqrt()
    assert ((observed - num_tokens * expected).abs() <= 5 * deviation + 1e-3).all(), (observed, num_tokens * expected)


@settings(deadline=None)
@given(st.sampled_from(LOADS), st.integers(0, 20), st.integers(1, 40), st.data())
def test_loads_pick_distinct_experts(
    load: Callable[..., Tensor], num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    num_topk = data.draw(st.integers(1, num_experts))
    topk_idx = load(num_tokens, num_experts, num_topk=num_topk, generator=seeded(data.draw(st.integers(0, 2**31))))
    assert topk_idx.dtype == torch.int64
    assert len(topk_idx) == num_tokens
    for picks in topk_idx.tolist():
        assert len(picks) == len(set(picks)) == num_topk
        assert set(picks) <= set(range(num_experts))


@pytest.mark.parametrize("load", LOADS)
def test_loads_are_decided_by_the_seed(load: Callable[..., Tensor]) -> None:
    first, again, other = (load(64, 32, num_topk=4, generator=seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("load", LOADS)
def test_loads_differ_from_call_to_call(load: Callable[..., Tensor]) -> None:
    generator = seeded()
    first, second = (load(64, 32, num_topk=4, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 8, 2), "num_tokens=-1 is negative; pass 0 or more"),
        ((4, 8, 9), "num_topk=9 is not within 1..8; a token has num_experts=8 to pick from"),
        ((4, 8, 0), "num_topk=0 is not within 1..8; a token has num_experts=8 to pick from"),
    ],
)
def test_loads_refuse_sizes_that_do_not_fit(
    load: Callable[..., Tensor], sizes: tuple[int, int, int], message: str
) -> None:
    num_tokens, num_experts, num_topk = sizes
    with pytest.raises(ConfigError) as caught:
        load(num_tokens, num_experts, num_topk=num_topk, generator=seeded())
    assert str(caught.value) == message


def test_uniform_load_picks_every_expert_equally_often() -> None:
    topk_idx = uniform_load(20_000, 10, num_topk=3, generator=seeded())
    for position in range(3):  # the order of a token's picks is random too
        assert_frequencies(topk_idx[:, position].bincount(minlength=10), torch.full((10,), 0.1), 20_000)
    # Pairs too: picks are independent but for being distinct.
    both = (topk_idx == 4).any(dim=1) & (topk_idx == 9).any(dim=1)
    assert_frequencies(both.sum(), torch.tensor(3 / 10 * 2 / 9), 20_000)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_zipf_load_picks_by_rank(exponent: float) -> None:
    num_experts = 8
    topk_idx = zipf_load(20_000, num_experts, num_topk=2, generator=seeded(), exponent=exponent)
    rank = torch.randperm(num_experts, generator=seeded())  # the load's first draw
    weight = (rank + 1.0) ** -exponent
    share = weight / weight.sum()
    assert_frequencies(topk_idx[:, 0].bincount(minlength=num_experts), share, 20_000)
    # The second pick is e, after j != e: sum over j of share[j] * share[e] / (1 - share[j]).
    after = share / (1 - share)
    assert_frequencies(topk_idx[:, 1].bincount(minlength=num_experts), share * (after.sum() - after), 20_000)


def test_zipf_load_of_a_steep_law_picks_the_ranks_in_order() -> None:
    topk_idx = zipf_load(50, 64, num_topk=4, generator=seeded(3), exponent=1000.0)
    by_rank = torch.randperm(64, generator=seeded(3)).argsort()
    assert topk_idx.tolist() == [by_rank[:4].tolist()] * 50


def test_zipf_load_has_other_favourites_with_another_seed() -> None:
    favourites = {
        int(zipf_load(500, 64, num_topk=1, generator=seeded(seed), exponent=2.0).mode(dim=0).values)
        for seed in range(8)
    }
    assert len(favourites) > 1


def test_hot_expert_load_picks_the_hot_expert_always_and_the_others_equally() -> None:
    topk_idx = hot_expert_load(20_000, 6, num_topk=3, generator=seeded(), hot_expert=2)
    assert topk_idx[:, 0].eq(2).all()
    expected = torch.tensor([0.4, 0.4, 0.0, 0.4, 0.4, 0.4])
    assert_frequencies(topk_idx[:, 1:].flatten().bincount(minlength=6), expected, 20_000)


def test_hot_expert_load_refuses_an_expert_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"hot_expert=8 is not within 0\.\.7; pass one of num_experts=8"):
        hot_expert_load(1, 8, num_topk=1, generator=seeded(), hot_expert=8)


@pytest.mark.parametrize("exponent", [-1.0, math.inf, math.nan])
def test_zipf_load_refuses_an_exponent_that_is_no_popularity(exponent: float) -> None:
    with pytest.raises(ConfigError, match=f"exponent={exponent} is not a finite number >= 0"):
        zipf_load(1, 8, num_topk=1, generator=seeded(), exponent=exponent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "load"  # without a suffix: the name is used as it is


def read(path: Path, num_tokens: int = 2) -> Tensor:
    return recorded_load(path, num_tokens, num_experts=8, num_topk=2)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, []),
        (2, [[5, 1], [0, -1]]),
        (3, [[5, 1], [0, -1], [-1, -1]]),
        (7, [[5, 1], [0, -1], [-1, -1], [5, 1], [0, -1], [-1, -1], [5, 1]]),
    ],
)
def test_recorded_load_is_cut_or_starts_over(path: Path, num_tokens: int, expected: list[list[int]]) -> None:
    record_load(path, torch.tensor([[5, 1], [0, -1], [-1, -1]]))
    topk_idx = read(path, num_tokens)
    assert topk_idx.dtype == torch.int64
    assert topk_idx.tolist() == expected


def test_recorded_load_gives_back_what_was_recorded(path: Path) -> None:
    topk_idx = uniform_load(100, 64, num_topk=6, generator=seeded())
    record_load(path, topk_idx)
    assert torch.equal(recorded_load(path, 100, num_experts=64, num_topk=6), topk_idx)


@pytest.mark.parametrize("dtype", [">i4", "u1", "i8"])
def test_recorded_load_reads_integers_of_any_width_and_order(path: Path, dtype: str) -> None:
    with path.open("wb") as file:
        np.save(file, np.asfortranarray(np.array([[5, 1], [0, 7]], dtype=dtype)))
    assert read(path).tolist() == [[5, 1], [0, 7]]


def test_recorded_load_of_no_tokens(path: Path) -> None:
    record_load(path, torch.empty(0, 2, dtype=torch.int64))
    assert read(path, 0).tolist() == []
    with pytest.raises(ConfigError, match="has no tokens to repeat for num_tokens=1"):
        read(path, 1)


@pytest.mark.parametrize(
    ("topk_idx", "message"),
    [
        ([[0, 1], [8, 2]], r"load has expert 8 at token 1; allowed are 0\.\.7, and -1 for no pick"),
        ([[0, 1], [2, -2]], r"load has expert -2 at token 1; allowed are 0\.\.7, and -1 for no pick"),
        ([[0, 1], [3, 3]], r"load picks expert 3 twice at token 1; a token's picks must be distinct"),
        ([[0, 1, 2]], r"load has 3 picks per token, not num_topk=2; pass num_topk=3"),
        ([0, 1], r"load holds int64 of shape \[2\]; it must hold integers of shape"),
        ([[0.0, 1.0]], r"load holds float64 of shape \[1, 2\]; it must hold integers of shape"),
    ],
)
def test_recorded_load_refuses_picks_that_do_not_fit(path: Path, topk_idx: object, message: str) -> None:
    with path.open("wb") as file:
        np.save(file, np.array(topk_idx))
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_recorded_load_checks_only_the_rows_asked_for(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([[0, 1], [9, 9]]))
    assert read(path, 1).tolist() == [[0, 1]]


def test_recorded_load_refuses_a_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([[{}, {}]], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"load is no readable \.npy array"):
        read(path)


@pytest.mark.parametrize("num_bytes", [0, 5, 40, 130])
def test_recorded_load_refuses_a_file_cut_short(path: Path, num_bytes: int) -> None:
    record_load(path, torch.tensor([[5, 1], [0, 2]]))
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match=r"load is no readable \.npy array \(.+\); write it with"):
        read(path)


def test_recorded_load_refuses_another_format(path: Path) -> None:
    torch.save(torch.tensor([[0, 1]]), path)
    with pytest.raises(ConfigError, match=r"load is no readable \.npy array"):
        read(path)


def test_recorded_load_of_a_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="load"):
        read(path)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    ("topk_idx", "message"),
    [
        (torch.tensor([[1, 1]]), "topk_idx picks expert 1 twice at token 0"),
        (torch.tensor([[1, -3]]), "topk_idx has expert -3 at token 0"),
        (torch.tensor([[1, 2**31]]), "topk_idx has expert 2147483648 at token 0"),
        (torch.tensor([1, 2]), r"topk_idx is torch\.int64 of shape \[2\]; pass an integer tensor"),
        (torch.tensor([[1.0]]), r"topk_idx is torch\.float32 of shape \[1, 1\]; pass an integer tensor"),
    ],
)
def test_record_load_refuses_picks_that_do_not_fit(path: Path, topk_idx: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record_load(path, topk_idx)
    assert not path.exists()


BAD_MASKS = {
    "too many ranks": (torch.tensor([[False] * 4, [True, False, True, True]]), "token 1 to 3 ranks; .*num_topk=3"),
    "columns": (torch.ones(2, 3, dtype=torch.bool), r"routing is bool \[2, 3\]; .*\[tokens=2, ranks=4\]"),
    "dimensions": (torch.ones(2, dtype=torch.bool), r"routing is bool \[2\]; .*\[tokens=2, ranks=4\]"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_of_ranks_that_cannot_be_is_refused(name):
    mask, says = BAD_MASKS[name]
    spec = Spec(num_experts=8, num_topk=2, hidden=4, max_tokens=4)

    def program(group):
        with Buffer(group, spec) as buffer, pytest.raises((ConfigError, PeerFailed), match=says):
            buffer.dispatch(torch.zeros(2, 4).bfloat16(), mask)

    run_local(program, 4)


@pytest.mark.parametrize("num_topk", [1, 3, 4, 6])
def test_picks_of_ranks_are_first_experts_in_the_order_of_ranks(num_topk):
    goes = torch.rand(50, 4, generator=torch.Generator().manual_seed(num_topk)) < 0.5
    for mask, picks in zip(goes.tolist(), picks_of_ranks(goes, num_local=5, num_topk=num_topk).tolist(), strict=True):
        firsts = [5 * rank for rank, is_its in enumerate(mask) if is_its]
        if len(firsts) <= num_topk:
            assert picks == firsts + [-1] * (num_topk - len(firsts))
        else:
            assert picks[0] == 20  # no expert: refused
