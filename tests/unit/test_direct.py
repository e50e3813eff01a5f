"""Ops past torch's dispatcher: whoever looks at ops still sees them, and gradients are the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock import Buffer, Compact, ConfigError, NotSupported, Spec, ThreadGroup, direct, ops
from crossdock import autograd as ag
from crossdock.wire import Fp32

SPEC = Spec(
    num_experts=2,
    num_topk=2,
    hidden=4,
    max_tokens=3,
    layout=Compact(),
    wire=Fp32(),
    combine_wire=Fp32(),
    reduce="token",
)
OURS = ["dispatch", "combine", "send", "weigh_gradients", "return_weights", "bring"]
"""What a step calls."""


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "crossdock":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    """A tensor of another class, as DTensor and fake ones are."""


def step(buffer: Buffer, *, create_graph: bool = False) -> list[torch.Tensor]:
    """Sums, and gradients of rows and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 4, generator=generator).requires_grad_()
    weights = torch.rand(3, 2, generator=generator).requires_grad_()
    recv = ag.dispatch(buffer, x, torch.tensor([[0, 1], [1, -1], [1, 0]]))
    out = ag.combine(buffer, recv.x**2, recv.plan, weights=weights)
    return [out, *torch.autograd.grad((out**2).sum(), (x, weights), create_graph=create_graph)]


@pytest.fixture
def buffer():
    with Buffer(ThreadGroup.world(1)[0], SPEC) as buffer:
        yield buffer


def test_a_step_at_once_passes_no_op_and_gives_the_same_bits(buffer):
    passed: list[str] = []
    of_op = type(ops.dispatch.op).__call__

    def noted(op: Any, *args: Any) -> Any:
        passed.append(op._name)
        return of_op(op, *args)

    with mock.patch.object(type(ops.dispatch.op), "__call__", noted):
        at_once = step(buffer)
        assert passed == []
        with mock.patch.object(direct, "_are_seen", return_value=True):
            by_ops = step(buffer)
    assert passed == OURS
    for ours, theirs in zip(at_once, by_ops, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_modes_see_each_op(buffer):
    with _Seen() as seen:
        step(buffer)
    assert seen.names == OURS


def test_tensors_of_other_classes_pass_the_dispatcher(buffer):
    x, picks = torch.rand(1, 4), torch.tensor([[0, 1]])
    with mock.patch.object(type(ops.dispatch.op), "__call__", side_effect=NotImplementedError("an op")):
        assert ops.dispatch(x, picks, None, None, buffer.handle, "exact", None)[0].shape == (1, 4)
        for given in ((x.as_subclass(_Wrapped), picks), (x, picks.as_subclass(_Wrapped))):
            with pytest.raises(NotImplementedError, match="an op"):
                ops.dispatch(*given, None, None, buffer.handle, "exact", None)
        with pytest.raises(NotImplementedError, match="an op"):
            ops.send(x, None, None, [picks.as_subclass(_Wrapped)], buffer.handle, "exact", False, None)


def test_functionalized_tensors_pass_the_dispatcher(buffer):
    x, picks = torch.rand(1, 4), torch.tensor([[0, 1]])
    rows = torch.func.functionalize(lambda x: ag.dispatch(buffer, x, picks).x)(x)
    torch.testing.assert_close(rows, x, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, of jvp
@pytest.mark.parametrize("verb", [ag.dispatch, Buffer.dispatch])
def test_what_cannot_follow_a_call_is_refused_by_name(buffer, verb):
    x, picks = torch.rand(1, 4), torch.tensor([[0, 1]])

    def rows(x):
        return verb(buffer, x, picks).x

    for name, transformed in (
        ("vmap", lambda: torch.vmap(rows)(x.expand(2, 1, 4))),
        ("grad", lambda: torch.func.grad(lambda x: rows(x).sum())(x)),
        ("jvp", lambda: torch.func.jvp(rows, (x,), (x,))),
    ):
        with pytest.raises(ConfigError, match=rf"torch\.func \({name}\) cannot follow a call .* make it outside"):
            transformed()
    with forward_ad.dual_level():
        with pytest.raises(ConfigError, match="forward-mode gradients cannot follow a call"), torch.no_grad():
            rows(forward_ad.make_dual(x, x))
        torch.testing.assert_close(rows(x), x, rtol=0, atol=0)


def test_what_has_no_contents_leaves_nothing_behind(buffer):
    """Or each later call of the process would be given it."""
    x, picks = torch.rand(1, 4), torch.tensor([[0, 1]])
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as fake:
        assert ag.dispatch(buffer, fake.from_tensor(x), fake.from_tensor(picks)).x.shape[1:] == (4,)
    torch.testing.assert_close(ag.dispatch(buffer, x, picks).x, x, rtol=0, atol=0)


class _Sends(torch.nn.Module):
    def __init__(self, buffer: Buffer) -> None:
        super().__init__()
        self._buffer = buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ag.dispatch(self._buffer, x, torch.tensor([[0, 1]])).x


def test_no_call_is_exported(buffer):
    with pytest.raises(NotSupported, match=r"torch\.export cannot have a call"):
        torch.export.export(_Sends(buffer), (torch.rand(1, 4),), strict=False)
    step(buffer)


def test_batches_of_gradients_are_refused(buffer):
    x = torch.rand(1, 4, requires_grad=True)
    rows = ag.dispatch(buffer, x, torch.tensor([[0, 1]])).x
    with pytest.raises(ConfigError, match="a batch of gradients"):
        torch.autograd.grad(rows, x, torch.eye(4).view(4, 1, 4), is_grads_batched=True)


def test_a_gradient_of_a_gradient_is_refused_and_not_lost(buffer):
    _, grad, _ = step(buffer, create_graph=True)
    with pytest.raises(NotSupported, match="a gradient of a gradient was asked for"):
        grad.sum().backward()
