"""Bytes of memory per rank: a Buffer for each Spec, Buffers over one Connection, and what DeepEP's hints ask for.

``python -m benchmarks.memory`` prints a table for DeepSeek-V3's sizes, and how long it takes to lay a Spec over a
connection that has some already. Nothing moves, so it says the same on every machine but for that time.
"""

# Printing is what it is for.
# ruff: noqa: T201

from __future__ import annotations

import statistics
import time
from itertools import cycle

from crossdock import (
    Arena,
    Bf16,
    Buffer,
    Compact,
    Connection,
    Expanded,
    Fp8,
    Padded,
    Spec,
    ThreadGroup,
    Topology,
    run_local,
)
from crossdock.layout import Layout
from crossdock.wire import Wire

HIDDEN, NUM_EXPERTS, NUM_TOPK = 7168, 256, 8
PREFILL, DECODE = 4096, 128
STAGED = Expanded(staged=True)
MIB = 1 << 20


def specs_of(num_ranks: int) -> dict[str, Spec]:
    """A server's four: prefill and decode, bf16 and FP8. Prefill has room for four times the mean load of a rank."""
    rows = 4 * PREFILL * min(NUM_TOPK, num_ranks)
    kinds: list[tuple[str, int, Wire, Layout]] = [
        ("prefill bf16", PREFILL, Bf16(), Compact(capacity=rows)),
        ("prefill FP8", PREFILL, Fp8(), Compact(capacity=rows)),
        ("decode bf16", DECODE, Bf16(), Padded()),
        ("decode FP8", DECODE, Fp8(), Padded()),
    ]
    return {
        name: Spec(
            num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, hidden=HIDDEN, max_tokens=tokens, wire=wire, layout=layout
        )
        for name, tokens, wire, layout in kinds
    }


def training_specs(num_ranks: int) -> dict[str, Spec]:
    """A row for each pick, so that no routing is too much: the worst case in the arena, and rows that are staged."""
    worst = Expanded(capacity=num_ranks * PREFILL * NUM_TOPK)  # no routing needs more, and Spec cuts it down
    kinds = [(f"{name} {wire}", layout, form) for name, layout in (("worst case", worst), ("staged", STAGED))
             for wire, form in (("bf16", Bf16()), ("FP8", Fp8()))]  # fmt: skip
    return {
        name: Spec(
            num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, hidden=HIDDEN, max_tokens=PREFILL, wire=wire, layout=layout
        )
        for name, layout, wire in kinds
    }


def deepep_low_latency() -> int:
    """DeepEP V1's hint for low-latency calls: ``LowLatencyLayout`` in its csrc/config.hpp, commit 030cdf0.

    Twice (odd and even calls): a send buffer for a combine of all experts, and a receive buffer of as many messages.
    """
    dispatch_message = 16 + 2 * HIDDEN
    combine_message = 4 * (HIDDEN // 128) + 2 * HIDDEN
    num_messages = NUM_EXPERTS * DECODE
    return 2 * (num_messages * combine_message + num_messages * max(dispatch_message, combine_message))


def print_memory() -> None:
    """Both tables."""
    for num_ranks in (8, 64):
        ranks = Topology(num_ranks=num_ranks)
        sizes = {name: Arena(spec, ranks).num_body_bytes for name, spec in specs_of(num_ranks).items()}
        print(f"\n{num_ranks} ranks, MiB per rank")
        for name, size in sizes.items():
            print(f"  {name:<34}{size / MIB:>10,.0f}")
        apart = max(size for name, size in sizes.items() if "prefill" in name) + max(
            size for name, size in sizes.items() if "decode" in name
        )
        print(f"  {'a Buffer for each':<34}{sum(sizes.values()) / MIB:>10,.0f}")
        print(f"  {'one Connection, all share':<34}{max(sizes.values()) / MIB:>10,.0f}")
        print(f"  {'one Connection, decode apart':<34}{apart / MIB:>10,.0f}")
        print(f"  {'DeepEP V1 hint, low latency alone':<34}{deepep_low_latency() / MIB:>10,.0f}")
        for name, spec in training_specs(num_ranks).items():
            print(f"  {'Expanded, ' + name:<34}{Arena(spec, ranks).num_body_bytes / MIB:>10,.0f}")


def lay(group: ThreadGroup) -> tuple[float, float, float]:
    """Milliseconds to lay one more Spec; microseconds of a call of one Spec (mean of two), and of both in turn."""
    small = {"num_experts": 16, "num_topk": 4, "hidden": 256, "max_tokens": 32}
    specs = [Spec(**small), Spec(**small, layout=Padded())]
    import torch  # noqa: PLC0415 - the tables need none of it

    x, topk_idx = torch.ones(32, 256, dtype=torch.bfloat16), torch.arange(4).expand(32, 4)
    with Connection(group, 64 * MIB) as connection:
        Buffer(connection, specs[0])
        laid_ms, buffers = [], []
        for i in range(20):
            began = time.perf_counter()
            buffers.append(Buffer(connection, specs[i % 2]))
            laid_ms.append(1e3 * (time.perf_counter() - began))
        of_calls = []
        for turn in (buffers[:1], buffers[1:2], buffers[:2]):
            plans = {buffer: buffer.dispatch(x, topk_idx).plan for buffer in turn}
            began = time.perf_counter()
            for _, buffer in zip(range(400), cycle(turn), strict=False):
                buffer.dispatch(x, plans[buffer])
            of_calls.append(1e6 * (time.perf_counter() - began) / 400)
    return statistics.median(laid_ms), statistics.mean(of_calls[:2]), of_calls[2]


if __name__ == "__main__":
    print_memory()
    for rank, (laid_ms, alone_us, in_turn_us) in enumerate(run_local(lay, 2)):
        print(f"rank {rank}: a Spec is laid in {laid_ms:.2f} ms")
        print(f"        a cached dispatch: {alone_us:.0f} us, of two Specs in turn {in_turn_us:.0f} us")
