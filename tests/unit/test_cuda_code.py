"""What Triton makes of every launch of a CUDA buffer, for sm_90 and gfx942, on a machine without either.

Wide stores of rows, no local memory in what moves rows, real loops in every wait, barriers around what orders memory.
What the checks of order look for, and wrong kernels that they find, is in test_cuda_sync.py.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from crossdock import Bf16, Compact, Counters, Expanded, Fp8, Opaque, Padded, Quantized, Spec  # noqa: E402 - behind the skip
from crossdock.backends.base import Call, Outputs  # noqa: E402
from crossdock.consent import PUSHED, Kind, Word  # noqa: E402
from tests.compiled import AMD, CUDA, Launch, compile_launches, lone_buffer  # noqa: E402
from tests.unit.test_cuda_sync import (  # noqa: E402
    amdgcn_steps,
    faults_of_release,
    faults_of_wait,
    faults_of_write_back,
    ptx_steps,
    reached,
)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "compact": ({"layout": Compact(), "wire": Bf16(), "reduce": "rank"}, {}),
    "compact fp8, few SMs": ({"layout": Compact(), "wire": Fp8()}, {"num_sms": 1}),
    "expanded fp8 at the receiver": (
        {"layout": Expanded(alignment=8, capacity=4096), "wire": Fp8(scale="ue8m0", packed=True), "reduce": "rank"},
        {"expand": "receiver"},
    ),
    "padded": ({"layout": Padded(), "wire": Fp8()}, {}),
}
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded, scales column-major": (
        {"layout": Padded(), "wire": Fp8(scale="ue8m0", packed=True, column_major=True)},
        {"expand": "sender"},
    ),
    "expanded at the receiver, scales column-major": (
        {"layout": Expanded(alignment=8, capacity=4096), "wire": Fp8(column_major=True)},
        {"expand": "receiver"},
    ),
    "staged, scales column-major": (
        {"layout": Expanded(alignment=8, capacity=4096, staged=True), "wire": Fp8(column_major=True)},
        {},
    ),
    "expanded at the receiver, opaque": (
        {
            "layout": Expanded(alignment=8, capacity=4096),
            "wire": Opaque(values_per_element=2, block=16, scale_dtype=torch.float8_e4m3fn),
        },
        {"expand": "receiver"},
    ),
}
"""Of these only what moves scales is compiled: all else is as above."""
FEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "expanded by pick, sums by rank": (
        {"layout": Expanded(alignment=8, capacity=4096), "wire": Fp8(), "reduce": "rank"},
        {"expand": "sender"},
    ),
    "padded at the receiver": ({"layout": Padded(), "wire": Bf16()}, {"expand": "receiver"}),
}
"""Of these only what is fused."""
BIASES = (torch.bfloat16, torch.float32)
SCALES = {"push_cast", "push_rows", "expand_rows", "place_rows"}
all_cases = pytest.mark.parametrize("case", [*CASES, *COLUMNS])
MOVERS = {
    "push_rows",
    "return_rows_to",
    "push_sums",
    "sum_rows",
    "push_cast",
    "expand_rows",
    "dispatch_rows",
    "combine_rows",
    "push_outputs",
}
BEGINNERS = {"begin_call", "begin_dispatch", "begin_return"}
PUSHERS = {"push_rows", "push_cast", "return_rows_to", "push_sums", "push_extras"}
"""Whose last program ends the call."""
WAITERS = dict.fromkeys(BEGINNERS | PUSHERS | {"finish_call"}, 2)
"""And how many boxes of words each polls."""
TICKETS = {"begin_dispatch", "begin_return", "remake_plan", "sum_rows"} | PUSHERS
"""Whose last program does what is left."""
WHOLE = {"dispatch_rows": 2, "combine_rows": 2, "push_outputs": 1}
"""The same, of calls of few tokens; their programs also wait for each other."""


def _compiled(case: str, backend: str) -> list[Launch]:
    spec, launch_options = (CASES | COLUMNS | FEW)[case]
    spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=64, **spec)
    target = {"cuda": CUDA, "hip": AMD}[backend]
    only = SCALES if case in COLUMNS else WHOLE if case in FEW else None
    return compile_launches(spec, 8, target, only=only, **launch_options)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process of its own: torch.cuda is replaced there."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    with mock.patch.dict(os.environ, environment), multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ptx(case: str, pool: Any) -> list[Launch]:
    return pool.apply(_compiled, (case, "cuda"))


@pytest.fixture(scope="module")
def amdgcn(case: str, pool: Any) -> list[Launch]:
    """Of the kinds that have every kernel between them: to compile the others too takes minutes."""
    return [] if "compact" in case else pool.apply(_compiled, (case, "hip"))


def test_all_is_compiled_before_anything_is_launched(ptx, amdgcn):
    """Then ranks and threads share the work, and no rank's launches wait for a compiler."""
    assert [launch.name for launch in ptx + amdgcn if not launch.is_ahead] == []


def test_rows_are_stored_in_words_of_16_bytes(ptx):
    movers = [launch for launch in ptx if launch.name in MOVERS]
    assert {"push_rows", "sum_rows"} <= {launch.name for launch in movers}
    _check_stores(movers)


def _check_stores(movers: list[Launch]) -> None:
    for launch in movers:
        stores = re.findall(r"st\.global[\w:.]*\.(v\d)\.[bfu](\d+)", launch.code)
        widths = {int(count[1:]) * int(bits) for count, bits in stores}
        assert 128 in widths, (launch.name, launch.constants)


def test_rows_over_a_table_of_addresses_are_loaded_in_words_of_16_bytes(ptx):
    for launch in ptx:
        if launch.name in ("sum_rows", "combine_rows"):
            assert len(re.findall(r"ld\.global[\w:.]*\.v4\.b32", launch.code)) >= _constant(launch, "J")
            assert "ld.global.b16" not in launch.code


def test_what_moves_rows_uses_no_local_memory(ptx):
    for launch in ptx:
        assert not re.search(r"\b(?:ld|st)\.local\b|\.local \.align", launch.code), launch.name


@pytest.mark.skipif(triton.__version__ < "3.7", reason="once is enough")
def test_whole_calls_keep_nearly_all_in_registers(ptx, tmp_path):
    """They have 64 of them, so that programs of many ranks run at once; by the assembler that comes with Triton."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for launch in ptx:
        if launch.name in WHOLE:
            source = tmp_path / "kernel.ptx"
            source.write_text(launch.code)
            command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            (spilled,) = map(int, re.findall(r"(\d+) bytes spill stores", said))
            assert spilled <= 256, (launch.name, launch.constants)


def _constant(launch: Launch, name: str) -> Any:
    """One of a group for rows, or of a kernel's own."""
    (value,) = (value for path, value in launch.constants.items() if path in (f"how.{name}", f"how.cast.{name}", name))
    return value


def _waits(launch: Launch) -> bool:
    return launch.name in WHOLE or launch.constants.get("how.ends.AWAITS", launch.constants.get("ends.AWAITS", 1)) != 0


def _posts(launch: Launch) -> bool:
    return launch.constants.get("how.ends.POSTS", launch.constants.get("ends.POSTS", True))


def _of_both(ptx: list[Launch], amdgcn: list[Launch]) -> list[tuple[list[Launch], Any]]:
    """What was compiled, and how its code is read."""
    return [each for each in ((ptx, ptx_steps), (amdgcn, amdgcn_steps)) if each[0]]


def test_every_wait_is_a_loop_that_polls_and_then_acquires(ptx, amdgcn):
    for launches, steps_of in _of_both(ptx, amdgcn):
        boxes = WAITERS | WHOLE
        waits = [launch for launch in launches if launch.name in boxes and _waits(launch)]
        assert BEGINNERS | {"finish_call", "push_rows"} <= {launch.name for launch in waits} <= set(boxes)
        for launch in waits:
            _check_wait(launch, steps_of, boxes[launch.name])


def _check_wait(launch: Launch, steps_of: Any, num_boxes: int) -> None:
    # Of counts, once words are here, loads are in loops too; of polls, test_cuda_sync.py looks for them.
    faults = set(faults_of_wait(steps_of(launch.code), num_boxes=num_boxes))
    assert faults <= {"a load in a loop"}, (launch.name, launch.constants)


def test_words_are_released_behind_a_barrier(ptx, amdgcn):
    for launches, steps_of in _of_both(ptx, amdgcn):
        for launch in launches:
            steps = steps_of(launch.code)
            if launch.name in {*WAITERS, *WHOLE, "begin_combine", "place_rows"} and _posts(launch):
                assert faults_of_release(steps, "sys") == [], launch.name
                if launches is amdgcn:
                    assert faults_of_write_back(steps, "sys") == [], launch.name
            if launch.name in {*WHOLE, *TICKETS} and _posts(launch):  # the go and the ticket
                assert faults_of_release(steps, "gpu") == [], launch.name


def test_what_is_launched_early_waits_for_the_kernels_before_and_lets_the_next_one_be_launched_last(ptx):
    for launch in ptx:
        assert launch.options.get("launch_pdl", False) == (launch.name in WHOLE), launch.name
        before, *behind = launch.code.split("griddepcontrol.wait")
        assert len(behind) == (launch.name in WHOLE), launch.name
        if behind:
            assert not re.search(r"\b(?:ld|st|atom|red)\.(?:global|relaxed|acquire|release|acq_rel)", before), (
                launch.name
            )
            # Shares are done: what is left is the ticket, and, for the last program, which rows are a token's.
            steps = ptx_steps(launch.code)
            (last,) = (i for i, step in enumerate(steps) if step.kind == "launch")
            wide = [i for i in reached(steps, last) if re.search(r"\bld\.global[\w:.]*\.v[24]", steps[i].text)]
            assert not wide, launch.name


def test_sums_are_of_products_that_are_rounded_by_themselves(ptx):
    for launch in ptx:
        if launch.name in ("sum_rows", "push_sums", "combine_rows", "push_outputs"):
            assert not re.search(r"\bfma\.rn\.f32\b", launch.code), launch.name


def test_casts_divide_without_branches_and_round_as_asked(ptx):
    """By reciprocals that are rounded correctly; of other scales than powers of two, corrected once for bfloat16."""
    for launch in ptx:
        if launch.name == "push_cast" or (launch.name == "dispatch_rows" and _constant(launch, "BLOCK")):
            num_casts = 2 * launch.code.count("cvt.rn.satfinite.e4m3x2.f32")
            num_corrections = 0 if _constant(launch, "POW2") else 2
            assert len(re.findall(r"\bfma\.rn\.f32\b", launch.code)) == num_corrections * num_casts
            assert 1 <= launch.code.count("div.rn.f32") < num_casts
            assert not re.search(r"div\.(?:full|approx)", launch.code)


@pytest.mark.parametrize("case", FEW)
def test_fused_calls_of_other_layouts_are_such_code_too(case, pool, tmp_path):
    ptx, amdgcn = (pool.apply(_compiled, (case, backend)) for backend in ("cuda", "hip"))
    assert {launch.name for launch in ptx} == set(WHOLE)
    test_all_is_compiled_before_anything_is_launched(ptx, amdgcn)
    test_rows_over_a_table_of_addresses_are_loaded_in_words_of_16_bytes(ptx)
    _check_stores(ptx)
    test_what_moves_rows_uses_no_local_memory(ptx)
    test_words_are_released_behind_a_barrier(ptx, amdgcn)
    test_what_is_launched_early_waits_for_the_kernels_before_and_lets_the_next_one_be_launched_last(ptx)
    test_sums_are_of_products_that_are_rounded_by_themselves(ptx)
    test_casts_divide_without_branches_and_round_as_asked(ptx)
    for launches, steps_of in _of_both(ptx, amdgcn):
        for launch in launches:
            _check_wait(launch, steps_of, WHOLE[launch.name])
    if triton.__version__ >= "3.7":
        test_whole_calls_keep_nearly_all_in_registers(ptx, tmp_path)


def test_scales_that_arrive_column_major_are_moved_without_local_memory(pool):
    """And rows that are cast are stored in words of 16 bytes all the same."""
    names = set()
    for case in COLUMNS:
        for backend in ("cuda", "hip"):
            launches = pool.apply(_compiled, (case, backend))
            names |= {launch.name for launch in launches}
            for launch in launches:
                assert not re.search(r"\b(?:ld|st)\.local\b|\.local \.align|scratch_(?:load|store)", launch.code), (
                    launch
                )
                if launch.name == "push_cast" and backend == "cuda":
                    assert re.search(r"st\.global[\w:.]*\.v4\.b32", launch.code)
    assert names == SCALES


def _launch_what_comes_late(backend: Any) -> None:
    """Sums of the caller's rows, and tensors to count in."""
    spec, on = backend._spec, backend._on
    extent = backend._on.arena.extent
    plan, call = backend._planner.blank(1, 0, extent), Call(0, Word(Kind.COMBINE, 0, PUSHED))
    y, rows = torch.zeros(3, spec.hidden, dtype=spec.combine_dtype), torch.zeros(1, spec.num_topk, dtype=torch.int32)
    for weights in (None, torch.zeros(3)):
        backend._return(call, plan, Outputs(y, weights, partial_rows=rows), pushes=True, sums=True)
    for tokens in (None, *(torch.zeros(on.num_local, dtype=dtype) for dtype in (torch.int32, torch.int64))):
        counters = Counters(tokens, torch.zeros(on.num_ranks, dtype=torch.int64))
        backend._counters.end(counters, backend._counters.begin(0), plan.memory, 0)


def _compiled_late(backend: str, max_tokens: int) -> list[Launch]:
    spec = CASES["expanded fp8 at the receiver"][0]
    spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=max_tokens, **spec)
    target = {"cuda": CUDA, "hip": AMD}[backend]
    return compile_launches(spec, 8, target, only=LATE, then=_launch_what_comes_late, expand="receiver")


LATE = {"push_sums", "push_outputs", "note_waits", "add_counters"}


@pytest.mark.parametrize(("max_tokens", "pushes"), [(64, "push_outputs"), (1024, "push_sums")])
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_what_is_compiled_when_it_first_comes_uses_no_local_memory(backend, max_tokens, pushes, pool):
    launches = pool.apply(_compiled_late, (backend, max_tokens))
    late = [launch for launch in launches if not launch.is_ahead]
    assert {launch.name for launch in late} == {pushes, "note_waits", "add_counters"}
    assert sum(launch.constants.get("how.GIVEN", False) for launch in late) == 2
    for launch in late:
        assert not re.search(r"\b(?:ld|st)\.local\b|\.local \.align|scratch_(?:load|store)", launch.code), launch.name


def _at(offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """The same, ``offset`` elements behind an address that is a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    memory[offset:].view_as(tensor).copy_(tensor)
    return memory[offset:].view_as(tensor)


def _kinds_of(spec: Spec, wide: torch.Tensor) -> list[torch.Tensor | Quantized]:
    """Rows ``[T, H]`` in all ways in which they may be given to a dispatch."""
    if isinstance(spec.wire, Fp8):
        return [wide, spec.wire.quantize(wide)]
    if isinstance(spec.wire, Opaque):
        num_columns, num_scales = spec.wire.num_columns(spec.hidden), spec.wire.num_scales(spec.hidden)
        data = torch.zeros(wide.shape[0], num_columns, dtype=spec.wire.dtype)
        return [Quantized(data, torch.zeros(wide.shape[0], num_scales).to(spec.wire.scale_dtype))]
    return [wide]


def _call_oddly(case: str, hidden: int) -> int:
    """Calls with inputs of every kind of address and stride; how many launches were looked up."""
    spec, launch_options = (CASES | COLUMNS)[case]
    if isinstance(spec["layout"], Expanded):
        spec = spec | {"layout": Expanded(alignment=3)}  # slots that begin at no multiple of 16 bytes
    if isinstance(spec["wire"], Fp8) and hidden % 128:
        spec = spec | {"wire": replace(spec["wire"], block=4)}
    spec = Spec(num_experts=16, num_topk=3, hidden=hidden, max_tokens=21, extra_bytes=13, num_slots=3, **spec)
    with lone_buffer(spec, **launch_options) as (buffer, watch):
        for offset in (0, 1, 8, 4, 2):
            for num_tokens, dtype in ((21, torch.int64), (1, torch.int32), (0, torch.int64)):
                wide = _at(offset, torch.zeros(num_tokens, hidden + offset, dtype=spec.combine_dtype))[:, :hidden]
                topk_idx = _at(offset, torch.zeros(num_tokens, 3, dtype=dtype) - 1)
                weights = _at(offset, torch.zeros(num_tokens, 3))
                extras = [_at(offset, torch.zeros(num_tokens, n, dtype=torch.uint8)) for n in (3, 10)]
                kinds: list[torch.Tensor | Quantized] = []
                for x in _kinds_of(spec, wide):
                    if isinstance(x, Quantized):
                        kinds.append(Quantized(_at(offset, x.data), _at(offset, x.scale)))
                        kinds.append(Quantized(x.data, x.scale.t().contiguous().t()))
                    else:
                        kinds.append(x)
                for x in [*kinds, *kinds]:  # what has been compiled is launched as it was, by addresses
                    plan = buffer.dispatch(x, topk_idx, weights=weights, rows="capacity").plan
                    buffer.dispatch(x, plan, extras=extras[: 1 + offset % 2])
                recv = buffer.dispatch(wide, plan, unquantized=True, weights=weights, rows="capacity")
                rows = recv.src_idx.shape
                y = _at(offset, torch.zeros(*rows, hidden, dtype=spec.combine_dtype))
                at_rows = _at(offset, torch.zeros(rows))
                given = at_rows if spec.reduce == "rank" else weights
                bias = _at(offset, torch.zeros(hidden, dtype=spec.combine_dtype))
                out = _at(offset, torch.zeros(num_tokens, hidden, dtype=spec.combine_dtype))
                buffer.combine(y, plan, weights=given, bias=bias, out=out)
                buffer.combine(y, plan, bias=bias.expand(num_tokens, hidden).contiguous(), extras=[at_rows])
                for _ in range(2):
                    buffer.combine(recv.output_rows(), plan, weights=given)
                    buffer.combine(recv.output_rows(), plan, weights=given, out=out)
        return len(watch.compiled)


@all_cases
@pytest.mark.parametrize("hidden", [20, 7168])
def test_what_a_launch_is_looked_up_by_is_all_that_a_compiler_may_use(case, hidden, pool):
    assert pool.apply(_call_oddly, (case, hidden)) > 20


def _call_plainly(case: str) -> list[str]:
    """What has to be compiled for calls with contiguous inputs, behind the making of the buffer."""
    spec, launch_options = (CASES | COLUMNS)[case]
    spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=64, extra_bytes=20, **spec)
    with lone_buffer(spec, **launch_options) as (buffer, watch):
        warm = set(watch.compiled)
        for num_tokens, dtype in ((64, torch.int64), (1, torch.int32), (0, torch.int64)):
            wide = torch.zeros(num_tokens, 7168, dtype=spec.combine_dtype)
            topk_idx = torch.full((num_tokens, 8), -1, dtype=dtype)
            weights = torch.zeros(num_tokens, 8)
            extras = [torch.zeros(num_tokens, 4), torch.zeros(num_tokens, dtype=torch.uint8)]
            for x in _kinds_of(spec, wide):
                plan = buffer.dispatch(x, topk_idx, rows="capacity").plan
                buffer.dispatch(x, topk_idx, weights=weights, extras=extras, rows="exact")
                buffer.dispatch(x, plan, weights=weights, extras=extras[:1], rows="capacity")
            recv = buffer.dispatch(wide, plan, unquantized=True, weights=weights, rows="capacity")
            y = torch.zeros(*recv.src_idx.shape, 7168, dtype=spec.combine_dtype)
            at_rows = torch.zeros(recv.src_idx.shape)
            given = at_rows if spec.reduce == "rank" else weights
            biases = [torch.zeros(*lead, 7168, dtype=dtype) for lead in ((), (num_tokens,)) for dtype in BIASES]
            for bias in (None, *biases):
                for outputs in (y, recv.output_rows()):
                    buffer.combine(outputs, plan, bias=bias)
                    buffer.combine(outputs, plan, weights=given, bias=bias)
            buffer.combine(y, plan, extras=[at_rows])
            buffer.return_extras(plan, [at_rows])
        return sorted(map(str, watch.compiled - warm))


@all_cases
def test_calls_with_contiguous_inputs_compile_nothing_behind_the_making_of_a_buffer(case, pool):
    assert pool.apply(_call_plainly, (case,)) == []


def _started(buffer: Any, x: Any, topk_idx: torch.Tensor, y: torch.Tensor) -> None:
    plan = buffer.dispatch_start(x, topk_idx).wait().plan
    buffer.dispatch_start(x, plan).wait()
    buffer.combine_start(y, plan).wait()
