"""What users of such layers have run into: experts without rows, sizes that do not divide, meta devices, dtypes."""

import copy

import pytest
import torch
from torch import nn

from crossdock import Compact, ConfigError, Expanded, Fp32, Padded, Spec, autograd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, Placement, sum_replica_gradients
from crossdock.routing import Routing
from tests.cases import STAGED
from tests.world import open_buffer

P, E, H, T = 3, 6, 8, 4
TOKENS = torch.randn(P, T, H, generator=torch.Generator().manual_seed(1))
LAYOUTS = [Expanded(), Expanded(alignment=4), Compact(), Padded(), STAGED]


class OnlyRankZero(nn.Module):
    """A gate that has learned to use experts 0 and 1 alone."""

    num_experts, num_topk, hidden = E, 2, H

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 2 * H).view(2, H))

    def forward(self, x):
        return Routing(torch.tensor([[0, 1]]).expand(len(x), 2).contiguous(), (x @ self.weight.T).softmax(-1))


class Fresh(GroupedExperts):
    """Gives a fresh tensor for no rows."""

    def forward(self, x, num_tokens_per_expert):
        return x.new_zeros(x.shape) if len(x) == 0 else super().forward(x, num_tokens_per_expert)


class Dummy(GroupedExperts):
    """Gives something made of its parameters for no rows, so that an optimizer or DDP finds gradients."""

    def forward(self, x, num_tokens_per_expert):
        if len(x):
            return super().forward(x, num_tokens_per_expert)
        return x.detach() + 0 * sum(weight.sum() for weight in self.parameters())


def make(*, frozen):
    """The layer with all experts; ranks that are threads share torch's generator, and so draw none themselves."""
    torch.manual_seed(0)
    return ExpertParallel(OnlyRankZero(), GroupedExperts(E, H, 16).requires_grad_(not frozen))


def hold(experts, whole, here):
    """Gives experts the weights of a part of all."""
    with torch.no_grad():
        for mine, theirs in zip(experts.parameters(), whole.parameters(), strict=True):
            mine.copy_(theirs[here])


def train_cold(group, kind, spec, wants_x, frozen, whole):
    layer = ExpertParallel(OnlyRankZero(), kind(E // P, H, 16).requires_grad_(not frozen))
    with open_buffer(group, spec, timeout_s=20) as buffer:
        hold(layer.experts, whole.experts, slice(2 * buffer.rank, 2 * buffer.rank + 2))
        x = TOKENS[buffer.rank].clone().requires_grad_(wants_x)
        layer.buffer = buffer
        layer(x).square().sum().backward()
    return x.grad, layer.gate.weight.grad, [weight.grad for weight in layer.experts.parameters()]


@pytest.mark.worlds("inproc-3")
@pytest.mark.parametrize("kind", [GroupedExperts, Fresh, Dummy])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize(("wants_x", "frozen"), [(True, False), (False, False), (True, True), (False, True)])
def test_a_rank_whose_experts_get_no_token_takes_part_in_the_backward_pass(world, kind, layout, wants_x, frozen):
    spec = Spec(num_experts=E, num_topk=2, hidden=H, max_tokens=T, wire=Fp32(), layout=layout)
    whole = make(frozen=frozen)
    got = world.run(train_cold, kind, spec, wants_x, frozen, whole)
    x = TOKENS.flatten(0, 1).clone().requires_grad_()
    whole(x).square().sum().backward()
    gates = sum(gate for _, gate, _ in got)
    torch.testing.assert_close(gates, whole.gate.weight.grad, rtol=1e-4, atol=1e-5)
    for rank, (x_grad, _, experts) in enumerate(got):
        if wants_x:
            torch.testing.assert_close(x_grad, x.grad.view(P, T, H)[rank], rtol=1e-4, atol=1e-5)
        for mine, weight in zip(experts, whole.experts.parameters(), strict=True):
            want = None if frozen else weight.grad[2 * rank : 2 * rank + 2]
            if mine is None:
                assert want is None or not want.any()
            else:
                torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def combine_with_all(group, spec):
    """With recv, not recv.plan, outputs may depend on anything."""
    with open_buffer(group, spec, timeout_s=20) as buffer:
        x, free = torch.ones(2, H, requires_grad=True), torch.ones(1, H, requires_grad=True)
        recv = autograd.dispatch(buffer, x, torch.tensor([[0, 1]] * 2))
        y = 2 * recv.x if buffer.rank == 0 else free * torch.ones(recv.x.shape)
        autograd.combine(buffer, y, recv).sum().backward()
    return x.grad[:, 0].tolist()


@pytest.mark.worlds("inproc-3", "processes-2")
def test_outputs_that_do_not_depend_on_rows_are_combined_with_recv(world):
    spec = Spec(num_experts=2 * world.num_ranks, num_topk=2, hidden=H, max_tokens=2, wire=Fp32(), layout=Expanded())
    assert world.run(combine_with_all, spec) == [[4.0, 4.0]] * world.num_ranks


def spec_of(num_experts):
    return Spec(num_experts=num_experts, num_topk=3, hidden=H, max_tokens=T, wire=Fp32(), layout=Expanded())


def ten_of(num_experts):
    torch.manual_seed(0)
    return ExpertParallel(Gate(H, 10, 3), GroupedExperts(num_experts, H, 16))


def train_ten(group, placement, whole):
    """Ten experts on four ranks, as twelve: two that nobody picks, or copies."""
    table = torch.arange(12).clamp_max(9) if placement is None else placement.physical_to_logical
    with open_buffer(group, spec_of(12), timeout_s=20) as buffer:
        gate, here = copy.deepcopy(whole.gate), table[3 * buffer.rank : 3 * buffer.rank + 3]
        layer = ExpertParallel(gate, GroupedExperts(3, H, 16), placement=placement, buffer=buffer)
        hold(layer.experts, whole.experts, here)
        x = torch.randn(T, H, generator=torch.Generator().manual_seed(buffer.rank)).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        if placement is not None:
            sum_replica_gradients(layer.experts.parameters(), placement, group)
    return x, out, x.grad, [weight.grad for weight in layer.experts.parameters()], layer.take_load()


@pytest.mark.worlds("inproc-4")
@pytest.mark.parametrize("how", ["padded", "placed"])
def test_experts_that_ranks_do_not_divide_are_padded_or_copied(world, how):
    placement = None if how == "padded" else Placement.balanced([1.0] * 10, num_physical=12, num_ranks=4)
    whole = ten_of(10)
    got = world.run(train_ten, placement, whole)
    x = torch.cat([x.detach() for x, *_ in got]).requires_grad_()
    out = whole(x)
    out.square().sum().backward()
    torch.testing.assert_close(torch.cat([mine[1] for mine in got]), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([mine[2] for mine in got]), x.grad, rtol=1e-4, atol=1e-5)
    table = torch.arange(12) if placement is None else placement.physical_to_logical
    for i, weight in enumerate(whole.experts.parameters()):
        grads = torch.cat([mine[3][i] for mine in got])
        is_real = table < 10
        torch.testing.assert_close(grads[is_real], weight.grad[table[is_real]], rtol=1e-4, atol=1e-5)
        assert not grads[~is_real].any()
    assert torch.equal(sum(mine[4] for mine in got), whole.take_load())


def refusals(group):
    texts = []
    for num_experts, held in ((10, 3), (16, 4), (8, 2)):
        try:
            with open_buffer(group, spec_of(num_experts)) as buffer:
                ExpertParallel(Gate(H, 10, 3), GroupedExperts(held, H, 16), buffer=buffer)
        except ConfigError as error:
            texts.append(str(error))
    return texts


@pytest.mark.worlds("inproc-4")
def test_what_is_proposed_for_such_a_number_is_what_the_layer_takes(world):
    for first, *others in world.run(refusals):
        assert "num_experts=10 is not divisible by num_ranks=4; pass a multiple of 4: 12, with 2 experts" in first
        assert len(others) == 2
        for text in others:
            assert "num_experts (physical ones)=10" in text
            assert "the next multiple of num_ranks=4" in text


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_layer_that_is_made_on_the_meta_device_and_filled(score, way):
    def build():
        return ExpertParallel(Gate(H, 4, 2, score=score), GroupedExperts(4, H, 16))

    torch.manual_seed(0)
    real, x = build(), TOKENS[0]
    with torch.device("meta"):
        layer = build()
    if way == "to_empty":
        layer.to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert layer.gate.bias is None or not layer.gate.bias.any()
        layer.load_state_dict(real.state_dict())
    else:
        layer.load_state_dict(real.state_dict(), assign=True)
    for training in (False, True):
        layer.train(training)
        real.train(training)
        assert torch.equal(layer(x), real(x))
    assert layer.take_load().tolist() == real.take_load().tolist()


class Wide(nn.Linear):
    """Answers in float32, as a part does that FSDP2 wraps with output_dtype=float32."""

    def forward(self, x):
        return super().forward(x.float())


def test_outputs_have_the_dtype_of_x_whatever_its_parts_answer_in():
    for shared in (Wide(H, H), None):
        layer = ExpertParallel(Gate(H, 4, 2), GroupedExperts(4, H, 16), shared=shared)
        if shared is not None:
            layer.experts.bfloat16()
        assert layer(TOKENS[0].bfloat16()).dtype == torch.bfloat16
