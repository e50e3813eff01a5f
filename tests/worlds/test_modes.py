"""State of the process that a program may set for itself: the same bits under each, also of a buffer made in it."""

import contextlib

import pytest
import torch

from crossdock import Bf16, Compact, Expanded, Fp8, Fp32, Padded, Spec, autograd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts, Placement
from crossdock.routing import zipf_load
from tests.cases import EXTRA_BYTES, make_case, observed, same_bits
from tests.world import open_buffer


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def memory_as_it_is():
    """Not deterministic, and nothing filled: what these tests have else."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


MODES = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "memory as it is": memory_as_it_is,
}
WITHOUT_GRAD = ("inference mode", "no grad")
OTHER_BITS = ("autocast",)
"""Experts are to compute in another dtype there."""
SPECS = [
    (Expanded(), Fp32(), "token"),
    (Expanded(alignment=4), Fp8(block=8), "token"),
    (Compact(), Bf16(), "token"),
    (Padded(), Fp32(), "rank"),
]


def use_verbs(buffer, case, biases):
    """Rows, sums with weights and each kind of bias, extras that come home."""
    r = buffer.rank
    recv = buffer.dispatch(case.x[r], case.topk[r], weights=case.weights[r], extras=case.extras[r])
    got = list(observed(recv).values())
    again = buffer.dispatch(case.x[r], recv.plan, rows="capacity", copy=True)
    got.append(again.src_idx)
    weights = case.weights[r] if case.spec.reduce == "token" else recv.weights
    for bias in (None, *biases[r]):
        got += [buffer.combine(case.y[r], recv.plan, weights=given, bias=bias) for given in (None, weights)]
    out, home = buffer.combine(recv.output_rows().copy_(case.y[r]), recv.plan, extras=case.y_extras[r])
    buffer.check()
    return [*got, out, *home, *buffer.return_extras(recv.plan, case.y_extras[r])]


def train(layer, tokens):
    """A step of the layer: outputs, gradients of tokens, gate and experts, and the load."""
    x = tokens.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(torch.ones(out.shape, dtype=out.dtype, device=out.device))
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    return [out.detach(), x.grad, *grads, layer.take_load()]


def both_ways(group, spec, case, biases, mode):
    """What verbs and layer give in the mode, by a buffer made before it and by one made in it, and without it."""
    makes_buffer = [contextlib.nullcontext, MODES[mode]]
    results = []
    for make, use in [(0, 0), (0, 1), (1, 1), (1, 0)]:
        with makes_buffer[make]():
            buffer = open_buffer(group, spec, timeout_s=20)
        torch.manual_seed(buffer.rank)
        num_local = spec.num_experts // buffer.topology.num_ranks
        layer = ExpertParallel(Gate(spec.hidden, spec.num_experts, spec.num_topk), GroupedExperts(num_local, 24, 16))
        layer.buffer = buffer
        with makes_buffer[use]():
            got = use_verbs(buffer, case, biases)
            if not (use and mode in (*WITHOUT_GRAD, *OTHER_BITS)):
                got = [*got, *train(layer, case.x[buffer.rank].float())]
            elif mode in WITHOUT_GRAD:
                got = [*got, layer(case.x[buffer.rank].float())]
        results.append([tensor.clone() for tensor in got])
        buffer.close()
    return results


@pytest.mark.worlds("inproc-1", "processes-2")
@pytest.mark.parametrize(("layout", "wire", "reduce"), SPECS, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_whatever_the_process_has_set(world, mode, layout, wire, reduce):
    spec = Spec(
        num_experts=8, num_topk=3, hidden=24, max_tokens=7, wire=wire, layout=layout, reduce=reduce,
        extra_bytes=EXTRA_BYTES,
    )  # fmt: skip
    case = make_case(spec, [7, 5][: world.num_ranks])
    g = torch.Generator().manual_seed(0)
    biases = [[torch.randn(24, generator=g), torch.randn(len(x), 24, generator=g)] for x in case.x]
    for plain, *others in world.run(both_ways, spec, case, biases, mode):
        for other in others:
            assert len(other) > 15
            for got, want in zip(other, plain, strict=False):
                assert same_bits(got, want)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "default" in mode or "context" in mode])
def test_loads_and_placements_are_the_same(mode):
    generator = torch.Generator()
    plain = zipf_load(5, 8, num_topk=2, generator=generator.manual_seed(0))
    table = Placement.balanced([3.0, 1.0, 1.0], num_physical=4, num_ranks=2)
    with MODES[mode]():
        assert torch.equal(zipf_load(5, 8, num_topk=2, generator=generator.manual_seed(0)), plain)
        again = Placement.balanced([3.0, 1.0, 1.0], num_physical=4, num_ranks=2)
        assert torch.equal(again.replicas, table.replicas)
        assert torch.equal(again.to_physical(plain % 3), table.to_physical(plain % 3))


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", ["token", "rank"])
@pytest.mark.parametrize("layout", [Expanded(), Padded()], ids=repr)
@pytest.mark.worlds("inproc-1", "processes-2")
def test_sums_are_float32_whatever_the_default(world, default, reduce, layout):
    """256 and three times 1: bfloat16, which inference servers make their default, has no 257."""
    spec = Spec(num_experts=4, num_topk=4, hidden=2, max_tokens=1, wire=Fp32(), layout=layout, reduce=reduce)
    for out in world.run(sum_four, spec, default):
        assert out == [[259.0] * 2, [259.5] * 2] * 2


def sum_four(group, spec, default):
    bias = torch.full((1, 2), 0.5, dtype=torch.float32)
    outs = []
    with default_dtype(default), open_buffer(group, spec) as buffer:
        weights = torch.ones(1, 4, dtype=torch.float32)
        num_local = 4 // buffer.topology.num_ranks
        recv = buffer.dispatch(torch.zeros(1, 2, dtype=torch.float32), torch.tensor([[0, 1, 2, 3]]), weights=weights)
        y = torch.zeros_like(recv.x)
        for e in range(num_local):
            at = e if isinstance(spec.layout, Padded) else slice(recv.expert_offsets[e], recv.expert_offsets[e + 1])
            y[at] = 256.0 if buffer.rank == 0 and e == 0 else 1.0
        for given in (None, weights if spec.reduce == "token" else recv.weights):
            outs += [buffer.combine(y, recv.plan, weights=given, bias=b)[0].tolist() for b in (None, bias)]
    return outs


def overflow(group, spec):
    with default_dtype(torch.float16), open_buffer(group, spec) as buffer:
        recv = buffer.dispatch(torch.full((1, 2), 40000.0, dtype=torch.bfloat16), torch.tensor([[0, 3]]))
        weights = torch.ones(1, 2, dtype=torch.float32)
        return buffer.combine(recv.x.clone(), recv.plan, weights=weights)[0, 0].item()


@pytest.mark.worlds("inproc-1", "processes-2")
def test_a_sum_over_the_default_dtype_s_range_is_no_infinity(world):
    spec = Spec(num_experts=4, num_topk=2, hidden=2, max_tokens=1, wire=Bf16(), layout=Expanded())
    right = torch.tensor(80000.0).bfloat16().item()
    assert world.run(overflow, spec) == [right] * world.num_ranks


def made_in_inference(group, spec):
    """A warm-up in inference mode makes the buffer; then it trains, and so on in turn."""
    with torch.inference_mode():
        buffer = open_buffer(group, spec)
        buffer.dispatch(torch.ones(2, 4), torch.tensor([[0, 3], [1, 2]]))
    grads = []
    for _ in range(2):
        x = torch.full((2, 4), 2.0, requires_grad=True)
        recv = autograd.dispatch(buffer, x, torch.tensor([[0, 3], [1, 2]]))
        autograd.combine(buffer, recv.x**2, recv.plan).sum().backward()
        grads.append(x.grad[:, 0].tolist())
        with torch.inference_mode():
            recv = autograd.dispatch(buffer, x.detach(), torch.tensor([[0, 3], [1, 2]]))
            autograd.combine(buffer, recv.x, recv.plan)
    buffer.close()
    return grads


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("layout", [Expanded(), Compact(), Padded(capacity=8)], ids=repr)
def test_a_buffer_that_is_made_in_inference_mode_trains(world, layout):
    spec = Spec(num_experts=4, num_topk=2, hidden=4, max_tokens=4, wire=Fp32(), layout=layout)
    assert world.run(made_in_inference, spec) == [[[8.0, 8.0]] * 2] * 2  # two experts, each d(x^2) = 2 * 2
