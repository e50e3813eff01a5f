"""Whatever one rank does wrong: it is told what, got, allowed, what to do; the others are told at once; all go on."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from crossdock import (
    Buffer,
    CapacityError,
    Compact,
    ConfigError,
    Counters,
    CrossdockError,
    Expanded,
    Fp8,
    Fp32,
    Opaque,
    Padded,
    PeerFailed,
    Plan,
    Quantized,
    Received,
    Spec,
    agreement,
    run_local,
)

T, K, H, E = 4, 2, 16, 8
SPEC = Spec(num_experts=E, num_topk=K, hidden=H, max_tokens=6, wire=Fp32(), layout=Expanded(), extra_bytes=4)
TIMEOUT_S = 30
AT_ONCE_S = 10


def x_of(rank):
    return torch.arange(T * H, dtype=torch.float32).view(T, H) + 1000 * rank


def topk():
    return torch.tensor([[0, 7], [3, -1], [5, 2], [6, 1]])


def meta(tensor):
    return tensor.to("meta")


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@dataclass(frozen=True)
class Given:
    """What the guilty rank has at hand."""

    buffer: Buffer
    x: torch.Tensor
    recv: Received
    foreign: Received | Stale
    """Of another buffer, or of a slot that has come round: not to be used."""


class Stale(NamedTuple):
    """Rows that were taken out of a Received before their slot came round."""

    x: torch.Tensor
    plan: Plan


# name: (what the guilty rank does, what its error says).
BAD_DISPATCHES = {
    "expert out of range": (
        lambda a: a.buffer.dispatch(a.x, changed(topk(), (1, 0), 8)),
        ("topk_idx[1, 0] = 8", "experts are 0 to 7", "-1 is no pick"),
    ),
    "expert below -1": (lambda a: a.buffer.dispatch(a.x, changed(topk(), (3, 1), -2)), ("topk_idx[3, 1] = -2",)),
    "expert twice": (
        lambda a: a.buffer.dispatch(a.x, changed(topk(), (2, 0), 2)),
        ("topk_idx[2]", "expert 2 more than once", "distinct"),
    ),
    "dtype of topk_idx": (lambda a: a.buffer.dispatch(a.x, topk().float()), ("topk_idx is float32", "int64 or int32")),
    "shape of topk_idx": (
        lambda a: a.buffer.dispatch(a.x, topk()[:, :1]),
        ("topk_idx has shape [4, 1]", "[tokens=4, num_topk=2]"),
    ),
    "device of topk_idx": (lambda a: a.buffer.dispatch(a.x, meta(topk())), ("topk_idx is on meta", "topk_idx.cpu()")),
    "topk_idx no tensor": (lambda a: a.buffer.dispatch(a.x, topk().numpy()), ("topk_idx is a ndarray", "tensor")),
    "most tokens of a call": (
        lambda a: a.buffer.dispatch(a.x, topk(), max_tokens=7),
        ("max_tokens=7 of a call", "from 1 to 6"),
    ),
    "most tokens no number": (lambda a: a.buffer.dispatch(a.x, topk(), max_tokens="6"), ("max_tokens='6'", "integer")),
    "most tokens of a plan": (
        lambda a: a.buffer.dispatch(a.x, a.recv.plan, max_tokens=5),
        ("max_tokens=5", "dispatch with 6", "leave it out"),
    ),
    "hidden": (lambda a: a.buffer.dispatch(a.x[:, :8], topk()), ("x has shape [4, 8]", "[tokens, hidden=16]")),
    "dtype of x": (
        lambda a: a.buffer.dispatch(a.x.bfloat16(), topk()),
        ("x is bfloat16", "Fp32()", "x.to(torch.float32)"),
    ),
    "device of x": (lambda a: a.buffer.dispatch(meta(a.x), topk()), ("x is on meta", "x.cpu()")),
    "x no tensor": (lambda a: a.buffer.dispatch(a.x.numpy(), topk()), ("x is a ndarray", "tensor")),
    "quantized x on a unquantized wire": (
        lambda a: a.buffer.dispatch(Quantized(a.x, torch.ones(T, 1)), topk()),
        ("x is Quantized", "Fp32()", "wire=Fp8"),
    ),
    "x requires grad": (
        lambda a: a.buffer.dispatch(a.x.requires_grad_(), topk()),
        ("requires grad", "records no gradient", "x.detach()"),
    ),
    "dtype of weights": (
        lambda a: a.buffer.dispatch(a.x, topk(), weights=torch.ones(T, K, dtype=torch.float64)),
        ("weights is float64", "float32"),
    ),
    "shape of weights": (
        lambda a: a.buffer.dispatch(a.x, topk(), weights=torch.ones(T)),
        ("weights has shape [4]", "[tokens=4, num_topk=2]"),
    ),
    "device of weights": (
        lambda a: a.buffer.dispatch(a.x, topk(), weights=torch.ones(T, K, device="meta")),
        ("weights is on meta", "weights.cpu()"),
    ),
    "bytes of extras": (
        lambda a: a.buffer.dispatch(a.x, topk(), extras=[torch.zeros(T), torch.zeros(T, dtype=torch.int16)]),
        ("extras take 6 bytes per token", "extra_bytes=4", "extra_bytes=6"),
    ),
    "length of extras": (
        lambda a: a.buffer.dispatch(a.x, topk(), extras=[torch.zeros(T + 1)]),
        ("extras[0] has shape [5]", "[tokens=4, ...]"),
    ),
    "extras no tensors": (lambda a: a.buffer.dispatch(a.x, topk(), extras=[3]), ("extras[0] is a int", "tensor")),
    "rows": (lambda a: a.buffer.dispatch(a.x, topk(), rows="all"), ("rows='all'", "'exact' or 'capacity'")),
    "tokens of a plan": (lambda a: a.buffer.dispatch(a.x[:2], a.recv.plan), ("x has 2 tokens", "plan was made for 4")),
    "another buffer's plan": (
        lambda a: a.buffer.dispatch(a.x, a.foreign.plan),
        ("made by another buffer", "recv.plan"),
    ),
    "repeats of a hash": (
        lambda a: a.buffer.dispatch(a.x, torch.tensor([[3, 3]] * T)),
        ("topk_idx[0] picks expert 3 more than once", "hash", "put -1 in place of the repeats"),
    ),
    "dimensions of x": (lambda a: a.buffer.dispatch(a.x[0], topk()[:1]), ("x has shape [16]", "[tokens, hidden=16]")),
    "tokens of topk_idx": (
        lambda a: a.buffer.dispatch(a.x, topk()[:3]),
        ("topk_idx has shape [3, 2]", "[tokens=4, num_topk=2]"),
    ),
    "dtype of unquantized rows": (
        lambda a: a.buffer.dispatch(a.x.half(), topk(), unquantized=True),
        ("x is float16", "unquantized=True", "x.to(torch.float32)"),
    ),
    "weights require grad": (
        lambda a: a.buffer.dispatch(a.x, topk(), weights=torch.ones(T, K, requires_grad=True)),
        ("requires grad", "crossdock.autograd"),
    ),
    "weights no tensor": (lambda a: a.buffer.dispatch(a.x, topk(), weights=[1.0]), ("weights is a list", "tensor")),
    "sparse x": (
        lambda a: a.buffer.dispatch(a.x.to_sparse(), topk()),
        ("x is a tensor of layout sparse_coo", "x.to_dense()"),
    ),
    "x without values": (
        lambda a: a.buffer.dispatch(FakeTensorMode().from_tensor(a.x), topk()),
        ("x is a FakeTensor", "as a plain tensor"),
    ),
    "negated x": (
        lambda a: a.buffer.dispatch(torch.complex(a.x, a.x).conj().imag, topk()),
        ("x is a negated view", "x.resolve_neg()"),
    ),
    "conjugated extras": (
        lambda a: a.buffer.dispatch(a.x, topk(), extras=[torch.zeros(T, 0, dtype=torch.complex64).conj()]),
        ("extras[0] is a view of conjugates", "extras[0].resolve_conj()"),
    ),
    "x of a transform": (
        lambda a: torch.func.functionalize(lambda x: a.buffer.dispatch(x, topk()).x)(a.x),
        ("torch.func (functionalize) cannot follow", "make it outside"),
    ),
    "device of extras": (
        lambda a: a.buffer.dispatch(a.x, topk(), extras=[torch.zeros(T, device="meta")]),
        ("extras[0] is on meta", "extras[0].cpu()"),
    ),
    "SMs on CPUs": (lambda a: a.buffer.dispatch(a.x, topk(), num_sms=4), ("num_sms=4", "None on CPUs")),
}
BAD_COMBINES = {
    "dtype of y": (
        lambda a: a.buffer.combine(a.recv.x.half(), a.recv.plan),
        ("y is float16", "torch.float32", "y.to(torch.float32)"),
    ),
    "shape of y": (
        lambda a: a.buffer.combine(torch.zeros(1, H), a.recv.plan),
        ("y has shape [1, 16]", "pass the outputs"),
    ),
    "device of y": (lambda a: a.buffer.combine(meta(a.recv.x), a.recv.plan), ("y is on meta", "y.cpu()")),
    "y no tensor": (lambda a: a.buffer.combine(a.recv.x.numpy(), a.recv.plan), ("y is a ndarray", "tensor")),
    "y requires grad": (
        lambda a: a.buffer.combine(a.recv.x.clone().requires_grad_(), a.recv.plan),
        ("requires grad", "records no gradient"),
    ),
    "stale y": (
        lambda a: a.buffer.combine(a.foreign.x, a.foreign.plan),
        ("y is stale", "receive slot", "before their slot"),
    ),
    "another buffer's plan": (
        lambda a: a.buffer.combine(a.recv.x, a.foreign.plan),
        ("made by another buffer", "recv.plan"),
    ),
    "no plan": (lambda a: a.buffer.combine(a.recv.x, topk()), ("plan is a Tensor", "recv.plan")),
    "dtype of bias": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, bias=torch.zeros(H, dtype=torch.int64)),
        ("bias is int64 [16]", "floating-point", "[hidden=16]"),
    ),
    "bias of 8 bits": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, bias=torch.zeros(H).to(torch.float8_e4m3fn)),
        ("bias is float8_e4m3fn [16]", "of 16 bits at least"),
    ),
    "shape of bias": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, bias=torch.zeros(T)),
        ("bias is float32 [4]", "[tokens=4, hidden=16]"),
    ),
    "dtype of weights": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, weights=torch.ones(T, K).half()),
        ("weights is float16", "float32"),
    ),
    "shape of weights": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, weights=torch.ones(T, K + 1)),
        ("weights has shape [4, 3]", "[tokens=4, num_topk=2]"),
    ),
    "dtype of extras": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, extras=[a.recv.x[:, 0].double()]),
        ("extras[0] is float64", "float32"),
    ),
    "length of extras": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, extras=[torch.zeros(a.recv.x.shape[0] + 1)]),
        ("extras[0] has shape", "one entry per row"),
    ),
    "bytes of extras": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, extras=[a.recv.x]),
        ("extras take 64 bytes per row", "extra_bytes"),
    ),
    "hidden of y": (
        lambda a: a.buffer.combine(a.recv.x[:, :8], a.recv.plan),
        ("y has shape", "8]", "pass the outputs"),
    ),
    "device of bias": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, bias=torch.zeros(H, device="meta")),
        ("bias is on meta", "bias.cpu()"),
    ),
    "bias requires grad": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, bias=torch.zeros(H, requires_grad=True)),
        ("requires grad", "crossdock.autograd"),
    ),
    "weights no tensor": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, weights=3.0),
        ("weights is a float", "tensor"),
    ),
    "SMs on CPUs": (lambda a: a.buffer.combine(a.recv.x, a.recv.plan, num_sms=0), ("num_sms=0", "None on CPUs")),
}
BAD_COMBINES |= {
    f"{name} out": (
        lambda a, make=make: a.buffer.combine(a.recv.x, a.recv.plan, out=make(a)),
        (*texts, "None for a new tensor"),
    )
    for name, make, texts in (
        ("dtype of", lambda _: torch.zeros(T, H).half(), ("out is float16 [4, 16]", "float32 [tokens=4, hidden=16]")),
        ("shape of", lambda _: torch.zeros(T + 1, H), ("out is float32 [5, 16]", "[tokens=4, hidden=16]")),
        ("gaps in", lambda _: torch.zeros(T, 2 * H)[:, :H], ("out is float32 [4, 16] with gaps", "a contiguous")),
        ("outputs as", lambda a: torch.as_strided(a.recv.x, (T, H), (H, 1)), ("out overlaps y", "memory of its own")),
        (
            "the slot as",
            lambda a: a.buffer._slots.rows("data", 1 - a.recv._lease.slot, T),
            ("out overlaps the buffer",),
        ),
    )
}
BAD_COMBINES |= {
    "device of out": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, out=torch.zeros(T, H, device="meta")),
        ("out is on meta", "out.cpu()"),
    ),
    "out no tensor": (lambda a: a.buffer.combine(a.recv.x, a.recv.plan, out=3), ("out is a int", "tensor")),
    "out requires grad": (
        lambda a: a.buffer.combine(a.recv.x, a.recv.plan, out=torch.zeros(T, H, requires_grad=True)),
        ("requires grad", "records no gradient"),
    ),
}
BAD_COMBINES["rows to sum where none are summed"] = (
    lambda a: a.buffer.combine(a.recv.x, a.recv.plan, partial_rows=torch.zeros(9, K, dtype=torch.int32)),
    ("partial_rows says which rows this rank sums", "reduce='token'", "reduce='rank'"),
)
BAD_RETURNS = {
    "no extras": (lambda a: a.buffer.return_extras(a.recv.plan, []), ("extras is empty", "go home")),
    "dtype of extras": (
        lambda a: a.buffer.return_extras(a.recv.plan, [a.recv.x[:, 0].half()]),
        ("extras[0] is float16", "float32"),
    ),
    "length of extras": (
        lambda a: a.buffer.return_extras(a.recv.plan, [torch.zeros(a.recv.x.shape[0] + 1)]),
        ("extras[0] has shape", "one entry per row"),
    ),
    "lengths of extras": (
        lambda a: a.buffer.return_extras(a.recv.plan, [a.recv.x[:, 0].clone(), torch.zeros(99)]),
        ("extras[1] has shape [99]", "one entry per row"),
    ),
    "bytes of extras": (
        lambda a: a.buffer.return_extras(a.recv.plan, [a.recv.x]),
        ("extras take 64 bytes per row", "extra_bytes"),
    ),
    "extras no tensors": (lambda a: a.buffer.return_extras(a.recv.plan, ["x"]), ("extras[0] is a str", "tensor")),
    "device of extras": (
        lambda a: a.buffer.return_extras(a.recv.plan, [torch.zeros(a.recv.x.shape[0], device="meta")]),
        ("extras[0] is on meta", "extras[0].cpu()"),
    ),
    "another buffer's plan": (
        lambda a: a.buffer.return_extras(a.foreign.plan, [a.recv.x[:, 0].clone()]),
        ("made by another buffer", "recv.plan"),
    ),
}
BAD_DISPATCHES["a mask of ranks for rows of experts"] = (
    lambda a: a.buffer.dispatch(a.x, torch.ones(T, 1, dtype=torch.bool)),
    ("routing is bool [4, 1], a mask of ranks", "Expanded", "layout=Compact()"),
)
BAD_DISPATCHES["tensors to count in"] = (
    lambda a: a.buffer.dispatch(a.x, topk(), counters=Counters(wait_ns=torch.zeros(99, dtype=torch.int64))),
    ("counters.wait_ns is int64 [99]", "pass a contiguous int64"),
)
BAD_COMBINES["tokens to count"] = (
    lambda a: a.buffer.combine(a.recv.x, a.recv.plan, counters=Counters(torch.zeros(9, dtype=torch.int64))),
    ("counters.num_tokens_per_expert was given", "wait_ns= alone"),
)
AFTER = ("after is a Event", "on CPUs the host does the work", "pass None")
BAD_DISPATCHES["an event on CPUs"] = (lambda a: a.buffer.dispatch(a.x, topk(), after=threading.Event()), AFTER)
BAD_COMBINES["an event on CPUs"] = (
    lambda a: a.buffer.combine(a.recv.x, a.recv.plan, after=threading.Event()),
    AFTER,
)
BAD_RETURNS["an event on CPUs"] = (
    lambda a: a.buffer.return_extras(a.recv.plan, [a.recv.x[:, 0].clone()], after=threading.Event()),
    AFTER,
)
OPAQUE = Opaque(values_per_element=4, block=6, scale_dtype=torch.int16)
BAD_OPAQUE = {
    "rows to be cast": (
        lambda a: a.buffer.dispatch(x_of(0).bfloat16(), topk()),
        ("x is bfloat16", "casts nothing", "data uint8 [tokens, 4] and scale int16 [tokens, 3]", "wire=Fp8"),
    ),
    "rows without scales": (lambda a: a.buffer.dispatch(a.x.data, topk()), ("x is uint8", "Quantized(data, scale)")),
    "dtype of data": (
        lambda a: a.buffer.dispatch(Quantized(a.x.data.view(torch.int8), a.x.scale), topk()),
        ("x is Quantized int8", "data uint8"),
    ),
    "columns of data": (
        lambda a: a.buffer.dispatch(Quantized(a.x.data[:, :3].contiguous(), a.x.scale), topk()),
        ("x has shape [4, 3]", "[tokens, 4 of hidden=16]"),
    ),
    "columns of scales": (
        lambda a: a.buffer.dispatch(Quantized(a.x.data, a.x.scale[:, :2]), topk()),
        ("x.scale is int16 [4, 2]", "[4, 3]"),
    ),
    "dtype of scales": (
        lambda a: a.buffer.dispatch(Quantized(a.x.data, a.x.scale.int()), topk()),
        ("x.scale is int32 [4, 3]", "torch.int16"),
    ),
    "scales no tensor": (
        lambda a: a.buffer.dispatch(Quantized(a.x.data, [1]), topk()),
        ("x.scale is a list", "tensor"),
    ),
}
BAD_SUMS = {
    f"{name} of the rows to sum": (
        lambda a, make=make: a.buffer.combine(a.recv.x, a.recv.plan, partial_rows=make(a.recv.plan.partial_rows)),
        texts,
    )
    for name, make, texts in (
        ("dtype", lambda rows: rows.long(), ("partial_rows is int64", "num_topk=2], as plan.partial_rows")),
        ("pairs", lambda rows: rows[:-1], ("partial_rows is int32", "pass int32 [pairs=")),
        ("picks", lambda rows: rows[:, :1], ("partial_rows is int32", "num_topk=2]")),
        ("numbers", lambda rows: rows + 1000, ("partial_rows[", "y has rows 0 to", "-1 is none")),
        ("device", meta, ("partial_rows is on meta", "partial_rows.cpu()")),
        ("list", lambda rows: rows.tolist(), ("partial_rows is a list", "tensor")),
    )
} | {
    "extras of other rows": (
        lambda a: a.buffer.combine(
            a.recv.x, a.recv.plan, partial_rows=a.recv.plan.partial_rows, extras=[a.recv.x[:, 0].clone()]
        ),
        ("extras go home with the rows that came", "pass one of them"),
    ),
}
BAD_MASKS = {
    "columns of a mask of ranks": (
        lambda a: a.buffer.dispatch(a.x, torch.ones(T, 9, dtype=torch.bool)),
        ("routing is bool [4, 9]", "[tokens=4, ranks="),
    ),
    "tokens of a mask of ranks": (
        lambda a: a.buffer.dispatch(a.x, torch.ones(T - 1, a.buffer.topology.num_ranks, dtype=torch.bool)),
        ("routing is bool [3, ", "[tokens=4, ranks="),
    ),
}
BAD = {
    "dispatch": BAD_DISPATCHES, "combine": BAD_COMBINES, "return_extras": BAD_RETURNS,
    "dispatch of opaque rows": BAD_OPAQUE, "combine where ranks sum": BAD_SUMS, "dispatch by ranks": BAD_MASKS,
}  # fmt: skip
"""All kinds of bad input to a call: the test is made from it, and every one is a sentence on every rank."""
SPECS = {
    "dispatch of opaque rows": replace(SPEC, wire=OPAQUE, combine_wire=Fp32()),
    "combine where ranks sum": replace(SPEC, reduce="rank"),
    "dispatch by ranks": replace(SPEC, layout=Compact()),
}


def rows_of(buffer):
    x = x_of(buffer.rank)
    if buffer.spec.wire is not OPAQUE:
        return x
    return Quantized(x[:, :4].to(torch.uint8), torch.arange(T * 3, dtype=torch.int16).view(T, 3))


def parts_of(rows):
    return tuple(rows) if isinstance(rows, Quantized) else (rows,)


def outputs_of(recv):
    return torch.full(recv.output_rows().shape, 2.0) if isinstance(recv.x, Quantized) else recv.x * 2


def expected_of(buffer):
    """Twice the token, or 2, for each of its rows."""
    each = x_of(buffer.rank) * 2 if buffer.spec.wire is not OPAQUE else torch.full((T, H), 2.0)
    ranks = [{e * buffer.topology.num_ranks // E for e in picks if e >= 0} for picks in topk().tolist()]
    num_ranks = torch.tensor([[len(of_token)] for of_token in ranks])
    return each * ((topk() >= 0).sum(1, keepdim=True) if buffer.spec.layout.per_pick else num_ranks)


def good_round(buffer):
    recv = buffer.dispatch(rows_of(buffer), topk())
    out = buffer.combine(outputs_of(recv), recv.plan)
    return recv, out


def one_is_guilty(group, verb, name):
    """Good, bad, good, bad, reset, good; what was raised, and whether rows and sums were right all along."""
    bad, spec = BAD[verb][name][0], SPECS.get(verb, SPEC)
    raised = []
    with Buffer(group, spec, timeout_s=TIMEOUT_S) as buffer, Buffer(group, spec, timeout_s=TIMEOUT_S) as other:
        foreign = good_round(other)[0]
        expected = expected_of(buffer)
        is_guilty = buffer.rank == buffer.topology.num_ranks - 1
        for resets in (False, True):
            if name == "stale y":
                old = buffer.dispatch(rows_of(buffer), topk())
                foreign = Stale(old.x, old.plan)
                good_round(buffer)
            recv, out = good_round(buffer)
            assert torch.equal(out, expected)
            rows = [part.clone() for part in parts_of(recv.x)]
            began = time.monotonic()
            try:
                if is_guilty:
                    bad(Given(buffer, rows_of(buffer), recv, foreign))
                elif verb.startswith("dispatch"):
                    buffer.dispatch(rows_of(buffer), topk())
                elif verb.startswith("combine"):
                    buffer.combine(recv.x, recv.plan)
                else:
                    buffer.return_extras(recv.plan, [recv.x[:, 0].clone()])
            except CrossdockError as error:
                raised.append((error, time.monotonic() - began))
            assert all(map(torch.equal, parts_of(recv.x), rows))
            if resets:
                buffer.reset()
            assert torch.equal(buffer.combine(outputs_of(recv), recv.plan), expected)
            assert torch.equal(good_round(buffer)[1], expected)
    return raised


CASES = [(verb, name) for verb, table in BAD.items() for name in table]


def test_the_table_has_eighty_kinds_at_least():
    assert len(CASES) >= 80


@pytest.mark.parametrize(("verb", "name"), CASES, ids=[f"{verb}-{name}" for verb, name in CASES])
def test_one_rank_is_told_what_is_wrong_and_all_go_on(world, verb, name):
    texts = BAD[verb][name][1]
    *others, guilty = world.run(one_is_guilty, verb, name)
    assert [type(error) for error, _ in guilty] == [ConfigError] * 2
    for error, _ in guilty:
        for text in texts:
            assert text in str(error), error
    for raised in others:
        assert [(type(error), error.rank) for error, _ in raised] == [(PeerFailed, len(others))] * 2
        for error, seconds in raised:
            assert texts[0] in error.reason
            assert seconds < AT_ONCE_S


def set_up(group, specs, timeout_s=5):
    with Buffer(group, specs[group.rank() if callable(group.rank) else group.rank], timeout_s=timeout_s):
        return "made"


NOT_FOR_THIS_GROUP = {
    "experts": (
        Spec(num_experts=7, num_topk=1, hidden=8, max_tokens=1),
        ("num_experts=7", "num_ranks=", "multiple of"),
    ),
    "capacity": (
        Spec(num_experts=8, num_topk=8, hidden=7168, max_tokens=2**20, layout=Expanded()),
        ("worst case", "GiB", "pass capacity="),
    ),
    "no spec": ("spec", ("spec is a str", "crossdock.Spec")),
}


@pytest.mark.worlds("inproc-2", "processes-2")
@pytest.mark.parametrize("name", NOT_FOR_THIS_GROUP)
def test_what_no_rank_can_have_is_refused_on_all(world, name):
    spec, texts = NOT_FOR_THIS_GROUP[name]
    for error in world.outcomes(set_up, [spec] * world.num_ranks):
        assert type(error) is ConfigError
        for text in texts:
            assert text in str(error)


@pytest.mark.worlds("inproc-4", "processes-2")
def test_ranks_with_different_specs_are_told_in_what_they_differ(world):
    other = Spec(num_experts=E, num_topk=K, hidden=H, max_tokens=9, wire=Fp32(), layout=Compact(), extra_bytes=4)
    specs = [SPEC] * (world.num_ranks - 1) + [other]
    for error in world.outcomes(set_up, specs):
        assert type(error) is ConfigError
        for text in (
            "rank 0",
            f"rank {world.num_ranks - 1}",
            "max_tokens: 6 != 9",
            "layout: Expanded",
            "pass the same",
        ):
            assert text in str(error)
    assert world.run(set_up, [SPEC] * world.num_ranks) == ["made"] * world.num_ranks


def set_up_with_version(group, versions):
    agreement.__version__ = versions[group.rank()]
    try:
        return set_up(group, [SPEC] * len(versions))
    finally:
        agreement.__version__ = versions[0]


@pytest.mark.worlds("processes-2")
def test_ranks_with_different_versions_are_told(world):
    for error in world.outcomes(set_up_with_version, [agreement.__version__, "9.9.9"]):
        assert type(error) is ConfigError
        for text in ("rank 1 runs crossdock 9.9.9", f"rank 0 runs {agreement.__version__}", "install the same version"):
            assert text in str(error)


@pytest.mark.worlds("inproc-2")
def test_a_timeout_that_is_none_is_refused_on_all(world):
    for error in world.outcomes(set_up, [SPEC] * 2, 0):
        assert type(error) is ConfigError
        assert "timeout_s=0" in str(error)


def test_the_group_of_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"not initialised.*init_process_group.*run_local"):
        Buffer(None, SPEC)


def in_a_group_of_others(_group):
    """A group that rank 0 is in alone, as both ranks make it."""
    alone = dist.new_group([0])
    texts = []
    for given in (alone, DeviceMesh("cpu", [0], mesh_dim_names=("ep",))):
        try:
            with Buffer(given, SPEC, timeout_s=5) as buffer:
                texts.append(f"made with {buffer.topology.num_ranks}")
        except ConfigError as error:
            texts.append(str(error))
    return texts


@pytest.mark.worlds("processes-2")
def test_a_process_that_is_not_in_the_group_is_told(world):
    member, other = world.run(in_a_group_of_others)
    assert member == ["made with 1"] * 2
    for text in other:
        assert "this process, global rank 1, is not a member of" in text
        assert "pass the group that this process belongs to" in text


def test_a_hidden_that_the_scale_block_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"hidden=100 is not divisible by the scale block 128.*Bf16"):
        Spec(num_experts=8, num_topk=2, hidden=100, max_tokens=4, wire=Fp8(block=128))


def overflow(group, layout, rows):
    spec = Spec(num_experts=8, num_topk=2, hidden=H, max_tokens=6, wire=Fp32(), layout=layout)
    raised = []
    with Buffer(group, spec, timeout_s=TIMEOUT_S) as buffer:
        x, num_ranks = x_of(buffer.rank), buffer.topology.num_ranks
        light = torch.full((T, 2), -1)
        light[0, 0] = buffer.rank * 8 // num_ranks
        heavy = torch.tensor([[0, 1]] * T)
        expected = x * (light >= 0).sum(1, keepdim=True)
        for resets in (False, True):
            recv = buffer.dispatch(x, light)
            kept = recv.x.clone()
            if rows == "capacity":
                assert buffer.dispatch(x, heavy, rows=rows).num_tokens_per_expert.sum() == 0
            with pytest.raises(CapacityError) as caught:
                buffer.check() if rows == "capacity" else buffer.dispatch(x, heavy, rows=rows)
            raised.append(str(caught.value))
            buffer.check()
            assert torch.equal(recv.x.nan_to_num(), kept.nan_to_num())
            if resets:
                buffer.reset()
            assert torch.equal(buffer.combine(recv.x, recv.plan), expected)
    return raised


@pytest.mark.parametrize("rows", ["exact", "capacity"])
@pytest.mark.parametrize(
    ("layout", "needed"),
    [(Compact(capacity=3), 4), (Expanded(capacity=7), 8), (Padded(capacity=3), 4)],
    ids=["Compact", "Expanded", "Padded"],
)
def test_an_overflow_is_the_same_error_on_all_ranks_and_moves_no_row(world, layout, needed, rows):
    outcomes = world.run(overflow, layout, rows)
    name, total = type(layout).__name__, needed * world.num_ranks
    assert len({text for raised in outcomes for text in raised}) == 1
    for text in (
        f"{total} rows",
        "rank 0",
        f"capacity is {layout.capacity}",
        "no row was moved",
        f"{name}(capacity={total})",
    ):
        assert text in outcomes[0][0]


OUT_OF_STEP = {
    "verbs": lambda a, odd: a.buffer.combine(a.recv.x, a.recv.plan) if odd else a.buffer.dispatch(a.x, topk()),
    "plans": lambda a, odd: a.buffer.dispatch(a.x, a.recv.plan if odd else topk()),
    "rows": lambda a, odd: a.buffer.dispatch(a.x, topk(), rows="capacity" if odd else "exact"),
    "weights": lambda a, odd: a.buffer.dispatch(a.x, topk(), weights=torch.ones(T, K) if odd else None),
    "extras": lambda a, odd: a.buffer.dispatch(a.x, topk(), extras=[torch.zeros(T)] if odd else []),
    "dtypes of extras": lambda a, odd: a.buffer.dispatch(
        a.x, topk(), extras=[torch.zeros(T, dtype=torch.int16 if odd else torch.float16)]
    ),
    "extras on their way home": lambda a, odd: a.buffer.combine(
        a.recv.x, a.recv.plan, **({"extras": [a.recv.x[:, 0].clone()]} if odd else {})
    ),
}


def out_of_step(group, how):
    """Rank 1 does something else than the others, twice."""
    raised = []
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        recv, _ = good_round(buffer)
        at_hand = Given(buffer, x_of(buffer.rank), recv, recv)
        for resets in (False, True):
            with pytest.raises(PeerFailed) as caught:
                OUT_OF_STEP[how](at_hand, buffer.rank == 1)
            raised.append(caught.value)
            if resets:
                buffer.reset()
            assert torch.equal(good_round(buffer)[1], at_hand.x * 2 * (topk() >= 0).sum(1, keepdim=True))
    return raised


@pytest.mark.worlds("inproc-2", "inproc-4", "processes-2")
@pytest.mark.parametrize("how", OUT_OF_STEP)
def test_ranks_that_do_different_things_are_all_told(world, how):
    for rank, raised in enumerate(world.run(out_of_step, how)):
        for error in raised:
            text = "same calls in the same order" if how in ("verbs", "plans") else "the same on all ranks"
            assert text in error.reason
            assert world.num_ranks > 2 or error.rank == 1 - rank


def stale(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        recv = buffer.dispatch(x_of(buffer.rank), topk())
        own = buffer.dispatch(x_of(buffer.rank), topk(), copy=True)
        for _ in range(SPEC.num_slots):
            good_round(buffer)
        assert recv.is_stale
        texts = []
        for use in (lambda: recv.x, recv.output_rows, own.output_rows):
            with pytest.raises(ConfigError) as caught:
                use()
            texts.append(str(caught.value))
        out = buffer.combine(own.x, own.plan)
        assert torch.equal(out, x_of(buffer.rank) * (topk() >= 0).sum(1, keepdim=True))
        return texts


def test_stale_rows_say_so_and_a_copy_stays(world):
    for texts in world.run(stale):
        for text in texts:
            assert "stale" in text
            assert "num_slots dispatches later" in text
            assert "copy=True" in text


def too_many_started(group):
    with Buffer(group, SPEC, timeout_s=TIMEOUT_S) as buffer:
        x = x_of(buffer.rank)
        pending = [buffer.dispatch_start(x, topk()) for _ in range(SPEC.num_slots)]
        with pytest.raises(ConfigError) as caught:
            buffer.dispatch_start(x, topk())
        for call in pending:
            recv = call.wait()
        assert torch.equal(buffer.combine(recv.x, recv.plan), x * (topk() >= 0).sum(1, keepdim=True))
        return str(caught.value)


def test_more_calls_than_slots_are_refused_before_anything_is_begun(world):
    for text in world.run(too_many_started):
        assert "2 calls were started and not waited for" in text
        assert "num_slots=2" in text
        assert "wait()" in text


def use_after_close(group):
    buffer = Buffer(group, SPEC, timeout_s=TIMEOUT_S)
    recv, _ = good_round(buffer)
    buffer.close()
    buffer.close()
    texts = []
    for use in (
        lambda: buffer.dispatch(x_of(0), topk()),
        lambda: buffer.combine(recv.x, recv.plan),
        lambda: buffer.abort("why"),
        buffer.reset,
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        texts.append(str(caught.value))
    return texts


def test_a_closed_buffer_says_so(world):
    for texts in world.run(use_after_close):
        assert all("closed" in text and "make a new one" in text for text in texts)


def test_narrow_rows_of_the_wrong_shape_are_refused():
    spec = Spec(num_experts=2, num_topk=1, hidden=16, max_tokens=4, wire=Fp8(block=8))
    data, scale = spec.wire.quantize(torch.ones(1, 16))
    bad = {
        "takes torch.float32 [1, 2]": Quantized(data, scale[:, :1]),
        "x.scale is float64 [1, 2]": Quantized(data, scale.double()),
        "x.data is float32": Quantized(torch.ones(1, 16), scale),
        "x is int64": torch.ones(1, 16, dtype=torch.int64),
    }

    def program(group):
        with Buffer(group, spec) as buffer:
            for text, rows in bad.items():
                with pytest.raises(ConfigError) as caught:
                    buffer.dispatch(rows, torch.zeros(1, 1, dtype=torch.int64))
                assert text in str(caught.value)
            return buffer.dispatch(Quantized(data, scale), torch.zeros(1, 1, dtype=torch.int64)).num_rows

    assert run_local(program, 1) == [1]


def test_extras_of_no_rows_may_have_any_strides():
    """A slice that came out empty has the strides of what it was cut from, and says that it is contiguous."""
    none = torch.zeros(2, 4)[:, :0].T
    assert none.shape == (0, 2)

    def program(group):
        with Buffer(group, SPEC) as buffer:
            recv = buffer.dispatch(torch.zeros(0, H), torch.zeros(0, K, dtype=torch.int64), extras=[none.half()])
            return buffer.combine(recv.x, recv.plan, extras=[none])[1][0].shape

    assert run_local(program, 1) == [(0, K, 2)]
