"""What a call costs before its kernels run: launches, operations of torch, and calls of Python functions; all counted.

On a machine without a GPU: launches do nothing, see ``tests/compiled.py``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import multiprocessing
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import crossdock
from crossdock import Bf16, Compact, Expanded, Fp8, Padded, Spec
from crossdock.backends.cuda import calls as cuda_calls
from crossdock.backends.cuda import kernels
from tests.compiled import lone_buffer

MOST_PARAMETERS = 16
VIEWS = {"view", "_unsafe_view", "as_strided", "slice", "select", "alias", "detach", "expand", "unsqueeze", "t",
         "transpose", "permute", "_reshape_alias", "split", "empty", "new_empty", "new_zeros"}  # fmt: skip
"""What launches nothing: views, and memory without contents (which is zeroed here alone)."""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "compact": ({"layout": Compact(), "wire": Bf16(), "reduce": "rank"}, {}),
    "compact, sums by token": ({"layout": Compact(), "wire": Fp8()}, {}),
    "compact, few SMs": ({"layout": Compact(), "wire": Fp8()}, {"num_sms": 1}),
    "expanded": ({"layout": Expanded(alignment=8), "wire": Fp8(scale="ue8m0", packed=True)}, {"expand": "sender"}),
    "expanded, sums by rank": ({"layout": Expanded(), "wire": Bf16(), "reduce": "rank"}, {"expand": "sender"}),
    "expanded at the receiver": (
        {"layout": Expanded(alignment=8), "wire": Fp8(column_major=True), "reduce": "rank"},
        {"expand": "receiver"},
    ),
    "staged at the receiver": ({"layout": Expanded(alignment=8, capacity=65536, staged=True), "wire": Fp8()}, {}),
    "padded": ({"layout": Padded(), "wire": Fp8(column_major=True)}, {"expand": "sender"}),
    "padded at the receiver": ({"layout": Padded(), "wire": Bf16()}, {"expand": "receiver"}),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """A process of its own: torch.cuda is replaced there."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


class _Operations(TorchDispatchMode):
    """Notes what torch is asked for, but for what launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _spec(case: str, **options: Any) -> tuple[Spec, dict[str, Any]]:
    spec, launch_options = CASES[case]
    given = {"num_experts": 16, "num_topk": 4, "hidden": 256, "max_tokens": 2048, "extra_bytes": 8} | options
    return Spec(**given, **spec), launch_options


def _verbs(buffer: Any, spec: Spec, num_tokens: int) -> dict[str, Callable[[], Any]]:
    """Each call that is counted, of so many tokens."""
    wide = torch.zeros(num_tokens, spec.hidden, dtype=spec.combine_dtype)
    topk_idx = torch.full((num_tokens, spec.num_topk), -1)
    weights = torch.zeros(num_tokens, spec.num_topk)
    plan = buffer.dispatch(wide, topk_idx, rows="capacity").plan
    recv = buffer.dispatch(wide, plan, rows="capacity")
    rows = recv.src_idx.shape
    y, at_rows = torch.zeros(*rows, spec.hidden, dtype=spec.combine_dtype), torch.zeros(rows)
    given = at_rows if spec.reduce == "rank" else weights
    bias = torch.zeros(spec.hidden)

    def outputs() -> torch.Tensor:
        return buffer.dispatch(wide, plan, rows="capacity").output_rows()

    quantized = spec.wire.quantize(wide) if isinstance(spec.wire, Fp8) else wide
    return {
        "fresh": lambda: buffer.dispatch(wide, topk_idx, rows="capacity"),
        "fresh, exact": lambda: buffer.dispatch(wide, topk_idx, rows="exact"),
        "fresh, quantised": lambda: buffer.dispatch(quantized, topk_idx, weights=weights, rows="capacity"),
        "fresh, unquantized": lambda: buffer.dispatch(wide, topk_idx, unquantized=True, rows="capacity"),
        "cached": lambda: buffer.dispatch(wide, plan, rows="capacity"),
        "cached, quantised": lambda: buffer.dispatch(quantized, plan, weights=weights, rows="capacity"),
        "pulled": lambda: buffer.combine(outputs(), plan),
        "pulled, bias": lambda: buffer.combine(outputs(), plan, bias=bias),
        "pushed": lambda: buffer.combine(y, plan),
        "pushed, weights, bias": lambda: buffer.combine(y, plan, weights=given, bias=bias),
        "pushed, extras": lambda: buffer.combine(y, plan, extras=[at_rows]),
        "pulled, extras": lambda: buffer.combine(outputs(), plan, extras=[at_rows]),
        "extras": lambda: buffer.return_extras(plan, [at_rows]),
    }  # fmt: skip


def _costs(case: str, **options: Any) -> dict[str, tuple[list[str], list[str]]]:
    """Launches and operations of torch of each call, in a warm buffer, for another number of tokens each time."""
    spec, launch_options = _spec(case, **options)
    costs = {}
    torch.use_deterministic_algorithms(False)
    with lone_buffer(spec, 1, **launch_options) as (buffer, watch):
        for num_tokens in (spec.max_tokens, 5, 1, 0, 7):
            for name, call in _verbs(buffer, spec, num_tokens).items():
                del watch.launched[:]
                with _Operations() as operations:
                    call()
                costs[name] = [*watch.launched], operations.names
    return costs


def _num_launches(case: str, verb: str) -> int:
    """Launches that a call may take, with those of torch."""
    at_receiver, by_rank = "at the receiver" in case, "sums by rank" in case
    has_pairs = at_receiver or by_rank
    kind = verb.split(",", maxsplit=1)[0]
    if kind == "fresh":  # peers are told of staged rows once there is memory for those that come here
        return 3 + has_pairs + (case.startswith("staged") and verb == "fresh, exact")
    if kind == "cached":
        return 2 + at_receiver
    if kind == "pulled":
        return 2 + at_receiver + 2 + verb.endswith("extras")
    if kind == "pushed":
        return 3 + verb.endswith("extras")
    return 3


@cases
def test_a_call_is_few_launches_and_no_operation_of_torch(case, pool):
    spec = _spec(case)[0]
    for verb, (launched, operations) in pool.apply(_costs, (case,)).items():
        assert operations == [], (verb, operations)
        most = _num_launches(case, verb)
        if (spec.is_staged or spec.reduce == "rank") and spec.layout.per_pick and verb.startswith("pulled"):
            most += 1  # outputs that are summed first, or lie in no slot, are pushed
        assert len(launched) <= most, (verb, launched)


@cases
def test_a_call_of_few_tokens_is_one_launch_or_two_where_it_expands_sums_first_or_pushes(case, pool):
    spec, costs = _spec(case)[0], pool.apply(_costs, (case,), {"max_tokens": 64})
    dispatch = ["dispatch_rows", *(["expand_rows"] if "at the receiver" in case else [])]
    pushed = ["push_outputs", "combine_rows"]
    pulled = pushed if spec.ranks_sum_picks or spec.is_staged else ["combine_rows"]
    wants = {
        "fresh": dispatch,
        "fresh, exact": dispatch,
        "fresh, quantised": dispatch,
        "cached": dispatch,
        "cached, quantised": dispatch,
        "pulled": [*dispatch, *pulled],
        "pulled, bias": [*dispatch, *pulled],
        "pushed": pushed,
        "pushed, weights, bias": pushed,
    }
    if spec.is_staged:  # peers are told of its rows once the host knows how many come, and has made memory for them
        wants["fresh, exact"] = ["begin_dispatch", "place_rows", "push_cast", "finish_call", "expand_rows"]
    assert {verb: costs[verb] for verb in wants} == {verb: (names, []) for verb, names in wants.items()}


def _launched_apart(case: str, **options: Any) -> dict[str, list[str]]:
    """What calls launch that are started and waited for separately, when they are started, and in all."""
    spec, launch_options = _spec(case, **options)
    launched = {}
    torch.use_deterministic_algorithms(False)
    with lone_buffer(spec, 1, **launch_options) as (buffer, watch):
        x, topk_idx = torch.zeros(5, spec.hidden, dtype=spec.combine_dtype), torch.full((5, spec.num_topk), -1)
        plan = buffer.dispatch(x, topk_idx, rows="capacity").plan
        outputs = buffer.dispatch(x, plan, rows="capacity").output_rows()

        def apart(start: Callable[[], Any]) -> list[str]:
            del watch.launched[:]
            pending = start()
            at_start = len(watch.launched)
            pending.wait()
            return [*watch.launched[:at_start], "wait", *watch.launched[at_start:]]

        launched["pulled"] = apart(lambda: buffer.combine_start(outputs, plan))
        launched["pushed"] = apart(lambda: buffer.combine_start(outputs.clone(), plan))
        launched["cached"] = apart(lambda: buffer.dispatch_start(x, plan, rows="capacity"))
        launched["fresh"] = apart(lambda: buffer.dispatch_start(x, topk_idx, rows="capacity"))
    return launched


@cases
def test_a_call_of_few_tokens_that_is_started_does_the_rest_when_it_is_waited_for(case, pool):
    spec = _spec(case)[0]
    dispatch = ["dispatch_rows", "wait", "dispatch_rows", *(["expand_rows"] if "at the receiver" in case else [])]
    pushed = ["push_outputs", "combine_rows", "wait"]
    assert pool.apply(_launched_apart, (case,), {"max_tokens": 64}) == {
        "fresh": dispatch,
        "cached": dispatch,
        "pulled": pushed if spec.ranks_sum_picks or spec.is_staged else ["begin_combine", "wait", "combine_rows"],
        "pushed": pushed,
    }


def _launched() -> Iterator[JITFunction[Any]]:
    """Kernels that are launched: those whose names are bound somewhere behind ``kernels``."""
    home = importlib.import_module("crossdock.backends.cuda").__path__
    names = set()
    for module in pkgutil.iter_modules(home):
        source = inspect.getsource(importlib.import_module(f"crossdock.backends.cuda.{module.name}"))
        names |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    for module in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values():
            if isinstance(value, JITFunction) and value.fn.__name__ in names:
                yield value


def test_kernels_take_few_parameters_beside_constants():
    launched = {kernel.fn.__name__: kernel for kernel in _launched()}
    assert {"push_rows", "dispatch_rows", "begin_dispatch", "finish_call", "copy_rows"} <= launched.keys()
    for name, kernel in launched.items():
        assert sum(not param.is_constexpr for param in kernel.params) <= MOST_PARAMETERS, name


ON_CPUS_ALONE = ("_picks", "check_picks", "drop_masked", "_current_stream")
"""What is called where tensors lie on CPUs, as they do here, or where torch has no CUDA."""


def _calls(case: str, verb: str, *, backend_alone: bool, of: str = "Python", **options: Any) -> Counter[str]:
    """What a warm call calls, for a number of tokens not seen before.

    Args:
        backend_alone: from the backend's verb down, without what Buffer asks it before; else from the public verb down.
        of: functions of ours, in ``"Python"``; or those in ``"C"`` that they call.
    """
    spec, launch_options = _spec(case, **options)
    home, backend = crossdock.__path__[0], cuda_calls.__file__
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, function: Any) -> None:
        code = frame.f_code
        name = code.co_name if of == "Python" else f"{code.co_name} {function}"
        is_ours = code.co_filename.startswith(home) or (code.co_filename == "<string>" and not backend_alone)
        if (
            event != ("call" if of == "Python" else "c_call")
            or not is_ours
            or code.co_name in (*ON_CPUS_ALONE, *(["check_capture"] if backend_alone else []))
        ):
            return
        while backend_alone and frame is not None and frame.f_code.co_filename != backend:
            frame = frame.f_back
        if frame is not None:
            calls[f"{code.co_filename.rpartition('/')[2]}:{name}"] += 1

    torch.use_deterministic_algorithms(False)
    with lone_buffer(spec, 1, **launch_options) as (buffer, _):
        for num_tokens in (5, 9):  # kinds are made, and grids of other numbers of tokens
            call = _verbs(buffer, spec, num_tokens)[verb]
            call()
            call()
        call = _verbs(buffer, spec, 13)[verb]
        sys.setprofile(note)
        call()
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    ("case", "options", "verb", "most"),
    [
        ("compact", {}, "fresh", 11),
        ("compact", {}, "cached", 7),
        ("compact", {}, "pushed", 8),
        ("padded", {"max_tokens": 64}, "fresh", 8),
    ],
)
def test_the_backends_part_of_a_warm_call_is_few_calls_of_python(case, options, verb, most, pool):
    calls = pool.apply(_calls, (case, verb), {"backend_alone": True} | options)
    assert calls.total() <= most, calls
    assert calls.total() > 3


@pytest.mark.parametrize(
    ("case", "options", "verb", "most"),
    [
        ("compact", {}, "fresh", 31),  # 30, but for every 16th, which notes an event
        ("compact", {}, "cached", 27),
        ("compact", {}, "pushed", 26),
        ("compact", {}, "pushed, weights, bias", 28),
        ("compact, sums by token", {}, "fresh", 30),
        ("expanded", {}, "fresh", 30),
        ("expanded at the receiver", {}, "fresh", 31),
        ("expanded at the receiver", {}, "cached", 28),
        ("staged at the receiver", {}, "fresh", 37),
        ("padded", {}, "fresh", 30),
        ("compact", {"max_tokens": 64}, "fresh", 29),
        ("padded", {"max_tokens": 64}, "fresh", 29),
        ("padded", {"max_tokens": 64}, "cached", 27),
        ("padded", {"max_tokens": 64}, "pushed", 41),  # with the programs of a number of tokens that is new
    ],
)
def test_a_warm_call_is_few_calls_of_python_from_the_verb_on(case, options, verb, most, pool):
    """Whatever its numbers of tokens: a kind that is known is neither checked nor bound again."""
    calls = pool.apply(_calls, (case, verb), {"backend_alone": False} | options)
    assert calls.total() <= most, calls
    assert not any(name.endswith((":make", ":_vetted_dispatch", ":_vetted_combine")) for name in calls), calls


@pytest.mark.parametrize(
    ("case", "options", "verb", "most"),
    [
        ("compact", {}, "fresh", 40),
        ("compact", {}, "cached", 28),
        ("compact", {}, "pushed", 32),
        ("compact", {}, "pushed, weights, bias", 44),
        ("expanded at the receiver", {}, "fresh", 39),
        ("staged at the receiver", {}, "fresh", 51),
        ("padded", {"max_tokens": 64}, "fresh", 40),
        ("padded", {"max_tokens": 64}, "cached", 31),
        ("padded", {"max_tokens": 64}, "pushed", 42),
    ],
)
def test_a_warm_call_is_few_calls_of_c(case, options, verb, most, pool):
    """Those that code of ours makes, launches apart; each tensor's address, and each look at one, is among them."""
    calls = pool.apply(_calls, (case, verb), {"backend_alone": False, "of": "C"} | options)
    assert calls.total() <= most, calls
    assert calls.total() > 15
