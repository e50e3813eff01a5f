"""What the verbs accept, checked once, at the border.

Letters: T tokens here, K top-k, H hidden, E experts, R rows received, L local experts, C capacity, M max_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossdock.backends.base import Counters, Outputs
from crossdock.direct import check_no_transform
from crossdock.errors import ConfigError
from crossdock.layout import Padded
from crossdock.masks import listed, made_before
from crossdock.plan import Plan
from crossdock.spec import Spec, Topology
from crossdock.wire import Fp8, Opaque, Quantized

_QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)
_ADDABLE = (*_QUANTIZABLE, torch.float64)


def check_no_grad(*tensors: Tensor | Quantized | None) -> None:
    """The plain verbs record no gradient, so they take no input that wants one, and are part of no transform."""
    check_no_transform(tensors)
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ConfigError(
                "an input requires grad, and this verb records no gradient; use crossdock.autograd.dispatch and "
                "combine, which do, or pass x.detach(), or call it under torch.no_grad()"
            )


def check_trains(spec: Spec) -> None:
    """What autograd and layers dispatch has values, and so gradients."""
    if isinstance(spec.wire, Opaque):
        raise ConfigError(
            f"wire={spec.wire} carries opaque rows, whose values and gradients the library does not know; make the "
            f"Spec with a wire such as Bf16() or Fp8(), or use Buffer.dispatch and combine, which record no gradient"
        )


def check_counters(spec: Spec, device: torch.device, num_ranks: int, counters: Counters, *, brings_rows: bool) -> None:
    """Tensors that a call adds to: contiguous, on its device; of tokens only where rows come."""
    if not isinstance(counters, Counters):
        raise ConfigError(f"counters is a {type(counters).__name__}; pass crossdock.Counters(...)")
    tokens, waits = counters
    if tokens is not None and not brings_rows:
        raise ConfigError(
            "counters.num_tokens_per_expert was given, and a combine brings no tokens; pass wait_ns= alone"
        )
    num_local = spec.num_local_experts(num_ranks)
    for name, tensor, dtypes, size in (
        ("num_tokens_per_expert", tokens, (torch.int32, torch.int64), num_local),
        ("wait_ns", waits, (torch.int64,), num_ranks),
    ):
        if tensor is None:
            continue
        _check_tensor(f"counters.{name}", tensor)
        if tensor.dtype not in dtypes or tuple(tensor.shape) != (size,) or not tensor.is_contiguous():
            raise ConfigError(
                f"counters.{name} is {_name(tensor)} {_shape(tensor)}; pass a contiguous "
                f"{' or '.join(map(_plain, dtypes))} [{size}]"
            )
        check_device(device, {f"counters.{name}": tensor})


def check_device(device: torch.device, tensors: Mapping[str, object]) -> None:
    """What is handed in lies where the buffer moves rows; whether it is a tensor at all is for the others to check.

    Args:
        tensors: by name; tensors, ``Quantized``, or sequences of tensors.
    """
    for name, given in tensors.items():
        if isinstance(given, Tensor):
            if given.device != device:
                pass_it = f"{name}.cpu()" if device.type == "cpu" else f"{name}.to({str(device)!r})"
                raise ConfigError(f"{name} is on {given.device}; this buffer moves rows on {device}: pass {pass_it}")
        elif given is None or (isinstance(given, tuple) and not given):  # there is none, as most often
            continue
        elif isinstance(given, Quantized):
            check_device(device, {f"{name}.data": given.data, f"{name}.scale": given.scale})
        elif isinstance(given, Sequence) and not isinstance(given, str):  # whose parts are strings again
            check_device(device, {f"{name}[{i}]": part for i, part in enumerate(given)})


def check_tokens(spec: Spec, x: Tensor | Quantized, *, unquantized: bool) -> int:
    """Checks rows to dispatch, [T, H] (``unquantized``: in the combine format), and gives T."""
    data = x.data if isinstance(x, Quantized) else x
    _check_tensor("x", data)
    num_columns = spec.hidden if unquantized else spec.wire.num_columns(spec.hidden)
    if isinstance(spec.wire, Opaque) and not unquantized:
        _check_opaque(spec, spec.wire, x)
    if data.dim() != 2 or data.shape[1] != num_columns:
        takes = f"hidden={spec.hidden}" if num_columns == spec.hidden else f"{num_columns} of hidden={spec.hidden}"
        raise ConfigError(f"x has shape {_shape(data)}; this buffer takes [tokens, {takes}]")
    if unquantized:
        if isinstance(x, Quantized) or data.dtype != spec.combine_dtype:
            raise ConfigError(
                f"x is {_name(data)}; with unquantized=True rows travel in the combine format: pass "
                f"x.to({spec.combine_dtype})"
            )
    elif isinstance(x, Quantized):
        _check_quantized(spec, x)
    elif isinstance(spec.wire, Fp8):
        if data.dtype not in _QUANTIZABLE:
            raise ConfigError(
                f"x is {_name(data)}; {spec.wire} casts bfloat16, float16 or float32 rows: pass one of them, or "
                f"Quantized(data, scale)"
            )
    elif data.dtype != spec.wire.dtype:
        raise ConfigError(
            f"x is {_name(data)}, the wire is {spec.wire}; pass x.to({spec.wire.dtype}), or make the Spec with "
            f"another wire"
        )
    return data.shape[0]


def check_ranks(ranks: Sequence[int], *, num_ranks: int) -> None:
    """Ranks to be masked: at least one, each a rank of the group."""
    if not ranks:
        raise ConfigError("mask() was given no rank; pass the ranks that are gone")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ConfigError(f"mask() was given {rank!r}, a {type(rank).__name__}; pass ranks as integers")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"mask() was given rank {rank}; ranks are 0 to {num_ranks - 1}")


def check_topk_idx(spec: Spec, topk_idx: Tensor, num_tokens: int, *, num_ranks: int) -> None:
    """Picks: int64 or int32 [T, K]; or, for Compact, the ranks that a token goes to: bool [T, P]."""
    _check_tensor("topk_idx", topk_idx)
    if topk_idx.dtype == torch.bool:
        if spec.layout.per_pick:
            raise ConfigError(
                f"routing is bool {_shape(topk_idx)}, a mask of ranks, by which only Compact rows go: {spec.layout} "
                f"has rows of experts; pass topk_idx as int64, or make the Spec with layout=Compact()"
            )
        if topk_idx.shape != (num_tokens, num_ranks):
            raise ConfigError(
                f"routing is bool {_shape(topk_idx)}; pass which ranks each token goes to, [tokens={num_tokens}, "
                f"ranks={num_ranks}], or topk_idx as int64"
            )
        return
    if topk_idx.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"topk_idx is {_name(topk_idx)}; pass int64 or int32")
    if topk_idx.shape != (num_tokens, spec.num_topk):
        raise ConfigError(
            f"topk_idx has shape {_shape(topk_idx)}; pass [tokens={num_tokens}, num_topk={spec.num_topk}], with -1 "
            f"where a token has fewer picks"
        )


def check_places(spec: Spec, goes: Tensor) -> None:
    """To how many ranks tokens go, on the host: K at most. On CUDA kernels refuse more."""
    num_places = goes.sum(dim=1)
    if goes.shape[0] and (most := int(num_places.max())) > spec.num_topk:
        raise ConfigError(
            f"routing sends token {int(num_places.argmax())} to {most} ranks; a token goes to at most "
            f"num_topk={spec.num_topk}: make the Spec with num_topk={most}"
        )


def check_weights(spec: Spec, weights: Tensor | None, num_tokens: int) -> None:
    """Weights of picks: float32 [T, K]."""
    if weights is None:
        return
    _check_tensor("weights", weights)
    _check_float32("weights", weights)
    if weights.shape != (num_tokens, spec.num_topk):
        raise ConfigError(
            f"weights has shape {_shape(weights)}; pass one weight per pick, [tokens={num_tokens}, "
            f"num_topk={spec.num_topk}]"
        )


def check_token_extras(spec: Spec, extras: Sequence[Tensor], num_tokens: int) -> None:
    """Opaque tensors that travel with tokens: [T, ...] of any dtype, at most ``spec.extra_bytes`` per token."""
    if not extras:
        return
    for i, extra in enumerate(extras):
        _check_tensor(f"extras[{i}]", extra)
        if extra.dim() < 1 or extra.shape[0] != num_tokens:
            raise ConfigError(
                f"extras[{i}] has shape {_shape(extra)}; pass one entry per token, [tokens={num_tokens}, ...]"
            )
    num_bytes = sum(math.prod(extra.shape[1:]) * extra.element_size() for extra in extras)
    if num_bytes > spec.extra_bytes:
        raise ConfigError(
            f"extras take {num_bytes} bytes per token, the Spec has extra_bytes={spec.extra_bytes}; make the Spec with "
            f"extra_bytes={num_bytes}"
        )


def check_whole_nodes(ranks: set[int], topology: Topology) -> None:
    """Over a rail whole nodes are masked: without one rank, the others of its local index have no way to its node."""
    size = topology.node_size
    for node in {rank // size for rank in ranks}:
        missing = set(range(node * size, (node + 1) * size)) - ranks
        if missing:
            raise ConfigError(
                f"{listed(ranks)} were to be masked, and {listed(missing)} of node {node} not; between nodes rows go "
                f"through the ranks of one local index: mask whole nodes"
            )


def check_plan(plan: Plan, buffer_id: int, masked: tuple[int, ...]) -> None:
    """A plan is good for the buffer that made it, as long as no further rank is masked."""
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan is a {type(plan).__name__}; pass recv.plan of an earlier dispatch of this buffer")
    if plan.buffer_id != buffer_id:
        raise ConfigError("the plan was made by another buffer; pass recv.plan of a dispatch of this one")
    if plan.masked != masked:
        raise made_before(sorted(set(masked) - set(plan.masked)))


def check_outputs(spec: Spec, plan: Plan, y: Tensor) -> None:
    """Experts' outputs of a plan: shaped as the rows that came, in the combine format."""
    _check_format_of_outputs(spec, y)
    *lead, hidden = y.shape or (0,)
    leads = _leads(spec, plan)
    if hidden != spec.hidden or tuple(lead) not in leads:
        shapes = " or ".join(str([*allowed, spec.hidden]) for allowed in leads)
        raise ConfigError(f"y has shape {_shape(y)}; pass the outputs in the places of the rows that came, {shapes}")


def check_partial_rows(spec: Spec, plan: Plan, given: Outputs) -> None:
    """Which rows of y [N, H], however many, a rank sums: int32 [pairs, K], for each pair of the plan at least."""
    y, partial_rows = given.y, given.partial_rows
    assert partial_rows is not None
    if not spec.ranks_sum_picks:
        raise ConfigError(
            f"partial_rows says which rows this rank sums, and with reduce={spec.reduce!r} and {spec.layout} it sums "
            f"none; make the Spec with reduce='rank' and Expanded() or Padded(), or leave partial_rows out"
        )
    if given.extras is not None:
        raise ConfigError("extras go home with the rows that came, and partial_rows with others; pass one of them")
    _check_format_of_outputs(spec, y)
    if y.dim() != 2 or y.shape[1] != spec.hidden:
        raise ConfigError(f"y has shape {_shape(y)}; with partial_rows= pass [rows, hidden={spec.hidden}]")
    _check_tensor("partial_rows", partial_rows)
    shape, num_pairs = tuple(partial_rows.shape), plan.num_partial_rows
    if partial_rows.dtype != torch.int32 or shape[1:] != (spec.num_topk,) or shape[0] < num_pairs:
        raise ConfigError(
            f"partial_rows is {_name(partial_rows)} {list(shape)}; pass int32 [pairs={num_pairs} or more, "
            f"num_topk={spec.num_topk}], as plan.partial_rows has them"
        )


def check_row_numbers(partial_rows: Tensor, *, num_rows: int) -> None:
    """The rows that are summed, on the host: 0 .. N - 1, or negative for none. On CUDA those beyond count as none."""
    if partial_rows.numel() and (most := int(partial_rows.max())) >= num_rows:
        pair, pick = divmod(int(partial_rows.argmax()), partial_rows.shape[1])
        raise ConfigError(
            f"partial_rows[{pair}, {pick}] = {most}; y has rows 0 to {num_rows - 1}, and -1 is none: pass a y that has "
            f"all rows"
        )


def check_lone_extras(spec: Spec, plan: Plan, extras: Sequence[Tensor]) -> tuple[int, ...]:
    """Extras that go home without outputs: at least one. Gives the leading dimensions that they must share."""
    if not extras:
        raise ConfigError("extras is empty; pass the tensors that are to go home")
    leads = _leads(spec, plan)
    _check_tensor("extras[0]", extras[0])
    shape = tuple(extras[0].shape)
    return next((lead for lead in leads if shape[: len(lead)] == lead), leads[0])


def check_combine_weights(spec: Spec, plan: Plan, weights: Tensor | None, *, lead: tuple[int, ...]) -> None:
    """Weights of a combine: of picks here [T, K]; unless tokens' owners sum all, of rows that came, in their shape."""
    if weights is None or spec.reduce == "token":
        check_weights(spec, weights, plan.num_tokens)
        return
    _check_tensor("weights", weights)
    _check_float32("weights", weights)
    if tuple(weights.shape) != lead:
        raise ConfigError(
            f"weights has shape {_shape(weights)}; with reduce={spec.reduce!r} rows are weighted where they are: pass "
            f"one weight per row that came, {list(lead)} (recv.weights, when dispatch was given weights=)"
        )


def check_bias(spec: Spec, plan: Plan, bias: Tensor | None) -> None:
    """What is added to every sum: [T, H] or [H], floating-point, of 16 bits at least."""
    if bias is None:
        return
    _check_tensor("bias", bias)
    if bias.dtype not in _ADDABLE or tuple(bias.shape) not in ((plan.num_tokens, spec.hidden), (spec.hidden,)):
        raise ConfigError(
            f"bias is {_name(bias)} {_shape(bias)}; pass a floating-point [tokens={plan.num_tokens}, "
            f"hidden={spec.hidden}] or [hidden={spec.hidden}], of 16 bits at least"
        )


def check_out(spec: Spec, plan: Plan, given: Outputs, segment: Tensor | None) -> None:
    """Where sums are written: contiguous [T, H] in the combine format, in memory of its own.

    Args:
        segment: this rank's, which peers write.
    """
    out = given.out
    assert out is not None
    _check_tensor("out", out)
    is_dense = out.is_contiguous()
    if out.dtype != spec.combine_dtype or tuple(out.shape) != (plan.num_tokens, spec.hidden) or not is_dense:
        raise ConfigError(
            f"out is {_name(out)} {_shape(out)}{'' if is_dense else ' with gaps'}; pass a contiguous "
            f"{_plain(spec.combine_dtype)} [tokens={plan.num_tokens}, hidden={spec.hidden}], or None for a new tensor"
        )
    first, end = _span(out)
    others = given._replace(out=None, extras=None)._asdict() | {"the buffer's own memory": segment}
    others |= {f"extras[{i}]": extra for i, extra in enumerate(given.extras or ())}
    for name, tensor in others.items():
        if tensor is not None:
            begin, behind = _span(tensor)
            if first < behind and begin < end:
                raise ConfigError(f"out overlaps {name}; pass memory of its own, or None for a new tensor")


def check_copy(rows: Tensor | Quantized, out: Tensor | Quantized) -> None:
    """Where rows that came are copied to: shaped as they are, in memory as ``dispatch(copy=True)`` gives it."""
    if isinstance(rows, Quantized) != isinstance(out, Quantized):
        raise ConfigError(f"out is a {type(out).__name__}; pass a {type(rows).__name__}, as recv.x is")
    names = ("out.data", "out.scale") if isinstance(rows, Quantized) else ("out",)
    pairs = zip(rows, out, strict=True) if isinstance(rows, Quantized) else [(rows, out)]
    for name, (want, given) in zip(names, pairs, strict=True):
        _check_tensor(name, given)
        has_gaps = want.is_contiguous() and not given.is_contiguous()  # scales that are not may go anywhere
        if has_gaps or (given.dtype, given.shape, given.device) != (want.dtype, want.shape, want.device):
            raise ConfigError(
                f"{name} is {_name(given)} {_shape(given)} on {given.device}{' with gaps' if has_gaps else ''}; pass a "
                f"contiguous {_name(want)} {_shape(want)} on {want.device}, as recv.x is"
            )


def check_row_extras(extras: Sequence[Tensor], *, lead: tuple[int, ...], limit: int) -> None:
    """Small float32 tensors that go home with rows: [*lead, ...] as the rows came."""
    num_bytes = 0
    for i, extra in enumerate(extras):
        _check_tensor(f"extras[{i}]", extra)
        _check_float32(f"extras[{i}]", extra)
        if tuple(extra.shape[: len(lead)]) != lead:
            raise ConfigError(
                f"extras[{i}] has shape {_shape(extra)}; pass one entry per row that came, {[*lead, '...']}"
            )
        num_bytes += math.prod(extra.shape[len(lead) :]) * extra.element_size()
    if num_bytes > limit:
        raise ConfigError(
            f"extras take {num_bytes} bytes per row; {limit} can come home (4 per pick and extra_bytes): make the Spec "
            f"with a larger extra_bytes"
        )


def flat_extras(extras: Sequence[Tensor] | None, lead: Sequence[int]) -> tuple[Tensor, ...]:
    """Extras [*lead, ...] as [R, ...]."""
    return tuple(extra.reshape(math.prod(lead), *extra.shape[len(lead) :]) for extra in extras) if extras else ()


def check_row_count(spec: Spec, rows: str | None, routing: Tensor | Plan) -> None:
    """Raises ConfigError for what is no way to count rows, or needs room for more than staged rows have."""
    if rows not in (None, "exact", "capacity"):
        raise ConfigError(f"rows={rows!r}; pass 'exact' or 'capacity'")
    if not spec.is_staged or rows != "capacity":
        return
    if spec.layout.capacity is None:
        raise ConfigError(
            f"rows='capacity' with {spec.layout}, which says for how many rows to make a tensor where the host is not "
            f"told how many come; make the Spec with Expanded(capacity=..., staged=True), or pass rows='exact'"
        )
    if isinstance(routing, Plan) and routing.num_rows is not None and routing.num_rows > routing.extent.slot_rows:
        raise ConfigError(
            f"rows='capacity' is room for {routing.extent.slot_rows} rows, and the plan has {routing.num_rows}; leave "
            f"rows out with this plan"
        )


def fits_lead(spec: Spec, plan: Plan, lead: Sequence[int]) -> bool:
    """Whether rows of the plan may have these leading dimensions."""
    if len(lead) == 1:
        num_rows, slot_rows = plan.num_rows, plan.extent.slot_rows
        is_slot = lead[0] == slot_rows and (num_rows is None or num_rows <= slot_rows)
        return (is_slot or lead[0] == num_rows) and not isinstance(spec.layout, Padded)
    return tuple(lead) in _leads(spec, plan)


def _leads(spec: Spec, plan: Plan) -> list[tuple[int, ...]]:
    """Leading dimensions that rows of the plan may have: those that came, or, as with ``rows="capacity"``, the slot."""
    slot_rows = plan.extent.slot_rows
    if isinstance(spec.layout, Padded):
        num_local = plan.num_tokens_per_expert.shape[0]
        return [(num_local, slot_rows // num_local)]
    if plan.num_rows is None or plan.num_rows == slot_rows:
        return [(slot_rows,)]
    if plan.num_rows > slot_rows:  # of staged rows there may be more than a tensor of ``capacity`` has
        return [(plan.num_rows,)]
    return [(plan.num_rows,), (slot_rows,)]


def _check_quantized(spec: Spec, x: Quantized) -> None:
    wire = spec.wire
    if wire.is_unquantized:
        raise ConfigError(
            f"x is Quantized, the wire is {wire}; make the Spec with wire=Fp8(...) or Opaque(...), or pass a plain "
            f"tensor"
        )
    if x.data.dtype != wire.dtype:
        raise ConfigError(f"x.data is {_name(x.data)}; {wire} takes {wire.dtype}")
    _check_tensor("x.scale", x.scale)
    expected = (x.data.shape[0], wire.num_scales(spec.hidden))
    if tuple(x.scale.shape) != expected or x.scale.dtype != wire.scale_dtype:
        raise ConfigError(
            f"x.scale is {_name(x.scale)} {_shape(x.scale)}; {wire} takes {wire.scale_dtype} {list(expected)}"
        )


def _check_opaque(spec: Spec, wire: Opaque, x: Tensor | Quantized) -> None:
    """Nothing is cast: rows come with scales if the wire has them, and in its dtype."""
    data = x.data if isinstance(x, Quantized) else x
    num_scales = wire.num_scales(spec.hidden)
    if isinstance(x, Quantized) != (num_scales > 0) or data.dtype != wire.dtype:
        rows = f"data {_plain(wire.dtype)} [tokens, {wire.num_columns(spec.hidden)}]"
        takes = rows
        if num_scales:
            takes = f"Quantized(data, scale), {rows} and scale {_plain(wire.scale_dtype)} [tokens, {num_scales}]"
        raise ConfigError(
            f"x is {'Quantized ' if isinstance(x, Quantized) else ''}{_name(data)}; {wire} casts nothing: pass "
            f"{takes}, or make the Spec with wire=Fp8(...), which casts"
        )


def _check_format_of_outputs(spec: Spec, y: Tensor) -> None:
    _check_tensor("y", y)
    if y.dtype != spec.combine_dtype:
        raise ConfigError(f"y is {_name(y)}; outputs go home as {spec.combine_dtype}: pass y.to({spec.combine_dtype})")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the one behind its last."""
    if not tensor.numel():
        return 0, 0
    first = tensor.data_ptr()
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + num_elements * tensor.element_size()


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}; pass a tensor")
    if (kind := _kind_beyond_memory(tensor)) is not None:
        raise ConfigError(
            f"{name} is {kind[0]}, and rows are read and written where a tensor's values lie; pass {name}{kind[1]}"
        )


def _kind_beyond_memory(tensor: Tensor) -> tuple[str, str] | None:
    """What a tensor is whose values do not lie in its memory, and how to have them there; None as nearly always."""
    if torch._C._functorch.is_legacy_batchedtensor(tensor):  # noqa: SLF001 - there is no public way to it
        return "a batch of gradients (is_grads_batched)", " of each by itself"
    if tensor.is_nested:
        return "a nested tensor", ".values() of one of equal rows, or a plain tensor"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        kind = type(tensor).__name__
        return f"a {kind}", {"DTensor": ".to_local()", "AsyncCollectiveTensor": ".wait()"}.get(
            kind, " as a plain tensor"
        )
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {_plain_layout(tensor)}", ".to_dense()"
    if tensor.is_neg():
        return "a negated view, as imag of a conj() is", ".resolve_neg()"
    return ("a view of conjugates", ".resolve_conj()") if tensor.is_conj() else None


def _plain_layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix("torch.")


def _check_float32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise ConfigError(f"{name} is {_name(tensor)}; pass float32")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(tensor: Tensor) -> str:
    return _plain(tensor.dtype)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
