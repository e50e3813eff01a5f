"""What Triton makes of ``kernels/sync.py`` for sm_90 and gfx942: orderings, scopes, barriers, loops, in its code.

No GPU is needed. A kernel's code is read as a list of steps, the same kinds for PTX and amdgcn, and each check returns
the faults that it finds in them; kernels that are wrong on purpose show that it does find them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

triton = pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

import triton.language as tl  # noqa: E402 - behind the skip
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from crossdock.backends.cuda.kernels.sync import (  # noqa: E402
    OK,
    is_last_program,
    post_words,
    stamped,
    wait_words,
    words_at,
)

CUDA = GPUTarget("cuda", 90, 32)
AMD = GPUTarget("hip", "gfx942", 64)
SHAPES = ((1, 4), (3, 1), (3, 4), (8, 8), (256, 4))
"""Ranks and warps; with 256 and 4 an atomic's result stays in its thread, and no barrier comes from handing it on."""

BLOCK = tl.constexpr(1024)
TYPES = {"ticket": "*i32", "word": "i64", "offset": "i64", "expected": "i64", "max_polls": "i64"}


@triton.jit
def store_rows(x):
    tl.store(x + tl.arange(0, BLOCK), tl.full([BLOCK], 1, tl.int64))


@triton.jit
def post(x, segments, offset, word, P: tl.constexpr):
    store_rows(x)
    post_words(segments, offset, stamped(word, 5), P)


@triton.jit
def wait(x, y, words, aborts, expected, max_polls, failure, P: tl.constexpr):
    status, seen = wait_words(words, aborts, expected, True, 0, max_polls, 1, failure, P)
    if status == OK:
        tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.sum(seen))


@triton.jit
def last_reads(x, y, ticket):
    store_rows(x)
    if is_last_program(ticket):
        tl.store(y + tl.arange(0, BLOCK), tl.load(x + BLOCK - 1 - tl.arange(0, BLOCK)))


@triton.jit
def post_without_barrier(x, segments, offset, word, P: tl.constexpr):
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    store_rows(x)
    values = tl.zeros_like(addresses) + word
    tl.atomic_xchg(words_at(addresses, offset), values, mask=lanes < P, sem="release", scope="sys")


@triton.jit
def post_too_early(x, segments, offset, word, P: tl.constexpr):
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    tl.debug_barrier()
    store_rows(x)
    values = tl.zeros_like(addresses) + word
    tl.atomic_xchg(words_at(addresses, offset), values, mask=lanes < P, sem="release", scope="sys")


@triton.jit
def post_barrier_only(x, segments, offset, word, P: tl.constexpr):
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    store_rows(x)
    tl.debug_barrier()
    values = tl.zeros_like(addresses) + word
    tl.atomic_xchg(words_at(addresses, offset), values, mask=lanes < P, sem="release", scope="sys")


@triton.jit
def post_on_one_gpu(x, segments, offset, word, P: tl.constexpr):
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    store_rows(x)
    tl.debug_barrier()
    values = tl.zeros_like(addresses) + word
    tl.atomic_xchg(words_at(addresses, offset), values, mask=lanes < P, sem="release", scope="gpu")


@triton.jit
def post_by_store(x, segments, offset, word, P: tl.constexpr):
    lanes = tl.arange(0, triton.next_power_of_2(P))
    addresses = tl.load(segments + lanes, mask=lanes < P, other=0)
    store_rows(x)
    tl.debug_barrier()
    tl.store(words_at(addresses, offset), tl.zeros_like(addresses) + word, mask=lanes < P)


@triton.jit
def wait_volatile(x, y, words, expected, P: tl.constexpr):
    lanes = tl.arange(0, P)
    while tl.min(tl.load(words + lanes, volatile=True), axis=0) != expected:
        pass
    seen = tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="acquire", scope="sys")
    tl.debug_barrier()
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.sum(seen))


@triton.jit
def wait_once(x, y, words, expected, P: tl.constexpr):
    lanes = tl.arange(0, P)
    seen = tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="acquire", scope="sys")
    tl.debug_barrier()
    if tl.min(seen, axis=0) == expected:
        tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def wait_unused(x, y, words, expected, P: tl.constexpr):
    lanes = tl.arange(0, P)
    least = tl.full([], 0, tl.int64)
    while least != expected:
        least = tl.min(tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="relaxed", scope="sys"), axis=0)
    tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="acquire", scope="sys")
    tl.debug_barrier()
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def wait_unused_scalar(x, y, words, expected, P: tl.constexpr):
    lanes = tl.arange(0, P)
    least = tl.full([], 0, tl.int64)
    while least != expected:
        least = tl.min(tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="relaxed", scope="sys"), axis=0)
    tl.atomic_add(words, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def wait_without_barrier(x, y, words, expected, P: tl.constexpr):
    lanes = tl.arange(0, P)
    least = tl.full([], 0, tl.int64)
    while least != expected:
        least = tl.min(tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="relaxed", scope="sys"), axis=0)
    seen = tl.atomic_or(words + lanes, tl.zeros([P], tl.int64), sem="acquire", scope="sys")
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))
    tl.store(y + lanes, seen)


@triton.jit
def ticket_without_barrier(x, y, ticket):
    store_rows(x)
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(y + tl.arange(0, BLOCK), tl.load(x + BLOCK - 1 - tl.arange(0, BLOCK)))


@dataclass(frozen=True)
class Step:
    """An instruction that has to do with order.

    Fields: kind (label, jump, branch, end, barrier, atomic, load, store of global memory; on AMD also write back,
    invalidate, wait for what is under way); target of a label, jump or branch; order (of an atomic: any of release,
    acquire); scope (sys, gpu); is_used: whether a later instruction reads an atomic's result; text.
    """

    kind: str
    text: str
    target: str = ""
    order: frozenset[str] = frozenset()
    scope: str = ""
    is_used: bool = False


def ptx_steps(code: str) -> list[Step]:
    lines = [re.sub(r"//.*", "", line).strip() for line in code.splitlines()]
    lines = [line for line in lines if line and not line.startswith(".")]
    steps = []
    for i, line in enumerate(lines):
        if match := re.match(r"(\$L\w+):", line):
            steps.append(Step("label", line, target=match[1]))
        elif match := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line):
            steps.append(Step("branch" if line.startswith("@") else "jump", line, target=match[1]))
        elif line == "ret;":
            steps.append(Step("end", line))
        elif line.startswith("griddepcontrol.launch_dependents"):
            steps.append(Step("launch", line))
        elif re.search(r"\bbar(?:rier)?(?:\.warp)?\.sync\b", line):
            steps.append(Step("barrier", line))
        elif match := re.search(r"\b(?:atom|red)((?:\.\w+)+)\s+(%\w+)?", line):
            words = set(match[1].split("."))
            order = {"release", "acquire"} if "acq_rel" in words else words & {"release", "acquire"}
            is_used = match[2] is not None and any(re.search(match[2] + r"\b", later) for later in lines[i + 1 :])
            scope = "sys" if "sys" in words else "gpu"
            steps.append(Step("atomic", line, order=frozenset(order), scope=scope, is_used=is_used))
        elif match := re.search(r"\b(ld|st)(?:\.volatile)?\.global\b", line):
            steps.append(Step({"ld": "load", "st": "store"}[match[1]], line))
    return steps


def amdgcn_steps(code: str) -> list[Step]:
    code = code.replace("; wave barrier", "s_barrier")  # of a program of one wave, where it takes no instruction
    lines = [re.sub(r"(;|//).*", "", line).strip() for line in code.splitlines()]
    lines = [" ".join(line.split()) for line in lines if line and not re.match(r"\.(?!LBB)|s_nop", line)]
    steps = []
    for line in lines:
        name = line.split()[0]
        scope = "sys" if re.search(r"\bsc0 sc1\b", line) else "gpu" if re.search(r"\bsc1\b", line) else ""
        if match := re.match(r"(\.LBB\w+):", line):
            steps.append(Step("label", line, target=match[1]))
        elif match := re.match(r"s_(c?)branch\w*\s+(\.LBB\w+)", line):
            steps.append(Step("branch" if match[1] else "jump", line, target=match[2]))
        elif name == "s_endpgm":
            steps.append(Step("end", line))
        elif name == "s_barrier":
            steps.append(Step("barrier", line))
        elif name == "buffer_wbl2":
            steps.append(Step("write back", line, scope=scope))
        elif name == "buffer_inv":
            steps.append(Step("invalidate", line, scope=scope))
        elif name == "s_waitcnt" and "vmcnt(0)" in line:
            steps.append(Step("wait", line))
        elif "_atomic_" in name or (name.startswith("global_load") and scope == "sys"):  # an atomic load looks so
            is_sys = scope != "" if "_atomic_" in name else scope == "sys"  # sc1: system; sc0: returns what was there
            steps.append(Step("atomic", line, scope="sys" if is_sys else "gpu"))
        elif re.match(r"(global|buffer|flat)_(load|store)", name):
            steps.append(Step("load" if "_load" in name else "store", line))
        else:
            steps.append(Step("other", line))
    steps = [replace(step, is_used=step.kind == "atomic" and _is_read(steps, i)) for i, step in enumerate(steps)]
    return _with_orders([step for step in steps if step.kind != "other"])


def _is_read(steps: list[Step], i: int) -> bool:
    """Whether an instruction that comes after reads a register that this one writes, before another writes there."""
    text = steps[i].text
    if "_atomic_" in text and not re.search(r"\bsc0\b", text):
        return False
    first, last = (re.findall(r"\d+", _operands(text)[0]) * 2)[:2]
    name = re.compile(rf"\bv(?:{first}|{last}|\[{first}:{last}\])(?!\w)")

    def reads(step: Step) -> bool:
        operands = _operands(step.text)
        return any(map(name.search, operands if re.match(r"\w+_(write|store)", step.text) else operands[1:]))

    def writes(step: Step) -> bool:
        return name.search(_operands(step.text)[0]) is not None

    return any(reads(steps[j]) for j in reached(steps, i, is_end=writes))


def _operands(instruction: str) -> list[str]:
    return instruction.partition(" ")[2].split(",")


def _with_orders(steps: list[Step]) -> list[Step]:
    """Atomics as release where a write back stands before them, as acquire where an invalidation follows a wait."""
    result = []
    for i, step in enumerate(steps):
        if step.kind == "atomic":
            before = [other for other in steps[:i] if other.kind != "wait"][-1:]
            after = steps[i + 1 : i + 3]
            order = set()
            if before and before[0].kind == "write back" and before[0].scope == step.scope:
                order.add("release")
            if [other.kind for other in after] == ["wait", "invalidate"] and after[1].scope == step.scope:
                order.add("acquire")
            step = replace(step, order=frozenset(order))  # noqa: PLW2901
        result.append(step)
    return result


def reached(steps: list[Step], start: int, is_end: Callable[[Step], bool] = lambda _: False) -> set[int]:
    """The steps that can come after one, up to those that end it; itself among them if it is in a loop."""
    places = {step.target: i for i, step in enumerate(steps) if step.kind == "label"}
    seen: set[int] = set()
    todo = [start]
    while todo:
        i = todo.pop()
        if i != start and is_end(steps[i]):
            continue
        after = [places[steps[i].target]] if steps[i].kind in ("jump", "branch") else []
        if steps[i].kind not in ("jump", "end"):
            after.append(i + 1)
        after = [j for j in after if j < len(steps)]
        todo += [j for j in after if j not in seen]
        seen.update(after)
    return seen


def faults_of_release(steps: list[Step], scope: str) -> list[str]:
    """Of atomics that release: there is one; behind a barrier on every way to it, and no store is between the two."""
    faults = []
    releasing = [i for i, step in enumerate(steps) if "release" in step.order and step.scope == scope]
    if not releasing:
        faults.append(f"no release at {scope} scope")

    def is_barrier(step: Step) -> bool:
        return step.kind == "barrier"

    if any(i in reached(steps, 0, is_barrier) for i in releasing):
        faults.append("no barrier before the release")
    stores = [i for i, step in enumerate(steps) if step.kind == "store"]
    if any(not reached(steps, i, is_barrier).isdisjoint(releasing) for i in stores):
        faults.append("a store between barrier and release")
    return faults


def faults_of_write_back(steps: list[Step], scope: str) -> list[str]:
    """AMD: before each barrier that leads to a release, each wave's stores are written back, and waited for."""
    faults = []
    for i, step in enumerate(steps):
        if "release" in step.order and step.scope == scope:
            barriers = [j for j in range(i) if steps[j].kind == "barrier"]
            steps_before = steps[: barriers[-1] if barriers else 0]
            before = [step for step in steps_before if step.kind in ("store", "write back", "wait")]
            while [step.kind for step in before[-2:]] == ["wait", "wait"]:  # also for what was loaded
                before.pop()
            if [step.kind for step in before[-2:]] != ["write back", "wait"] or before[-2].scope != "sys":
                faults.append("stores still under way at the barrier")
    return faults


def faults_of_poll(steps: list[Step], num_polled: int) -> list[str]:
    """There are loops, and in them as many atomics at system scope, whose results are used, as boxes are polled."""
    looped = [step for i, step in enumerate(steps) if i in reached(steps, i)]
    polls = [step for step in looped if step.kind == "atomic" and step.scope == "sys" and step.is_used]
    faults = [] if len(polls) >= num_polled else ["no loop around an atomic"]
    if any(step.kind == "load" for step in looped):
        faults.append("a load in a loop")
    return faults


def faults_of_acquire(steps: list[Step], scope: str, num_acquires: int = 1) -> list[str]:
    """Of atomics that acquire: there are as many; results are used; a barrier comes before any load or store."""
    faults = []
    acquiring = [i for i, step in enumerate(steps) if "acquire" in step.order and step.scope == scope]
    if len(acquiring) < num_acquires:
        faults.append(f"no acquire at {scope} scope")
    for i in acquiring:
        after = [step.kind for step in steps[i + 1 :] if step.kind in ("barrier", "load", "store")]
        if not steps[i].is_used:
            faults.append("the acquire's result is not used")
        if after[:1] != ["barrier"]:
            faults.append("no barrier after the acquire")
    return faults


def faults_of_post(steps: list[Step], target: GPUTarget) -> list[str]:
    write_back = faults_of_write_back(steps, "sys") if target == AMD else []
    return faults_of_release(steps, "sys") + write_back


def faults_of_wait(steps: list[Step], *, num_boxes: int = 1) -> list[str]:
    return faults_of_poll(steps, num_boxes) + faults_of_acquire(steps, "sys", num_boxes)


def faults_of_ticket(steps: list[Step], target: GPUTarget) -> list[str]:
    write_back = faults_of_write_back(steps, "gpu") if target == AMD else []
    return faults_of_release(steps, "gpu") + write_back + faults_of_acquire(steps, "gpu")


def steps_of(kernel: triton.JITFunction, target: GPUTarget, *, num_ranks: int = 8, num_warps: int = 4) -> list[Step]:
    """The kernel compiled as on a machine with that GPU."""
    signature = {name: "constexpr" if name == "P" else TYPES.get(name, "*i64") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {"P": num_ranks} if "P" in signature else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(get_current_target=lambda: target))
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    return amdgcn_steps(compiled.asm["amdgcn"]) if target == AMD else ptx_steps(compiled.asm["ptx"])


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


on_both = pytest.mark.parametrize("target", [CUDA, AMD], ids=lambda target: str(target.arch))
in_shapes = pytest.mark.parametrize(("num_ranks", "num_warps"), SHAPES)


@on_both
@in_shapes
def test_posting_releases_to_the_system_what_the_program_stored(target, num_ranks, num_warps):
    steps = steps_of(post, target, num_ranks=num_ranks, num_warps=num_warps)
    assert faults_of_post(steps, target) == []


@on_both
@in_shapes
def test_waiting_polls_in_a_loop_and_acquires_for_the_program(target, num_ranks, num_warps):
    steps = steps_of(wait, target, num_ranks=num_ranks, num_warps=num_warps)
    assert faults_of_wait(steps, num_boxes=2) == []


@on_both
def test_a_record_is_released_with_its_status(target):
    assert faults_of_post(steps_of(wait, target), target) == []


@on_both
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_a_ticket_orders_the_programs_of_a_grid(target, num_warps):
    assert faults_of_ticket(steps_of(last_reads, target, num_warps=num_warps), target) == []


@on_both
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (post_without_barrier, "no barrier before the release"),
        (post_too_early, "a store between barrier and release"),
        (post_on_one_gpu, "no release at sys scope"),
        (post_by_store, "no release at sys scope"),
    ],
)
def test_wrong_posting_is_found(target, kernel, fault):
    assert fault in faults_of_release(steps_of(kernel, target), "sys")


def test_stores_of_other_waves_still_under_way_are_found():
    assert faults_of_write_back(steps_of(post_barrier_only, AMD), "sys") == ["stores still under way at the barrier"]


@on_both
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (wait_volatile, "no loop around an atomic"),
        (wait_once, "no loop around an atomic"),
        (wait_unused, "the acquire's result is not used"),
        (wait_without_barrier, "no barrier after the acquire"),
    ],
)
def test_wrong_waiting_is_found(target, kernel, fault):
    assert fault in faults_of_wait(steps_of(kernel, target, num_ranks=256))


@pytest.mark.parametrize(
    ("target", "fault"), [(CUDA, "no acquire at sys scope"), (AMD, "the acquire's result is not used")]
)
def test_an_acquire_that_vanishes_is_found(target, fault):
    assert fault in faults_of_wait(steps_of(wait_unused_scalar, target))


@on_both
def test_a_ticket_without_a_barrier_is_found(target):
    assert "no barrier before the release" in faults_of_release(steps_of(ticket_without_barrier, target), "gpu")
