"""The memory map: regions apart from each other, aligned, and printed as they are."""

import math
import re

import pytest
import torch

from crossdock import Arena, Compact, Expanded, Fp8, Fp32, Padded, Spec, Topology
from tests.cases import same_bits

SPECS = [
    Spec(
        num_experts=16,
        num_topk=4,
        hidden=h,
        max_tokens=5,
        wire=wire,
        layout=layout,
        reduce=reduce,
        extra_bytes=x,
        num_slots=n,
    )
    for h, wire, layout, reduce, x, n in [
        (24, Fp8(block=8), Compact(), "token", 0, 2),
        (7, Fp32(), Expanded(alignment=3), "rank", 5, 3),
        (20, Fp8(block=4, scale="ue8m0", packed=True), Expanded(), "token", 14, 1),
        (20, Fp8(block=4, scale="ue8m0"), Padded(), "rank", 1, 6),
        (4096, Fp32(), Padded(capacity=3), "token", 3, 2),
        (24, Fp8(block=8, column_major=True), Compact(capacity=7), "token", 0, 3),
        (20, Fp8(block=4, scale="ue8m0", column_major=True), Padded(capacity=3), "token", 1, 2),
        (20, Fp8(block=4, scale="ue8m0", packed=True, column_major=True), Expanded(alignment=3), "rank", 0, 2),
    ]
]
ARENAS = [Arena(spec=spec, topology=Topology(num_ranks=p)) for spec in SPECS for p in (1, 2, 8, 16)]
ARENAS.append(Arena(spec=SPECS[0], topology=Topology(num_ranks=16, scale_up=4)))


@pytest.mark.parametrize("arena", ARENAS, ids=lambda a: f"{type(a.spec.layout).__name__}-{a.topology.num_ranks}")
def test_regions_lie_apart_and_aligned(arena):
    end = 0
    for region in arena.regions.values():
        assert end <= region.offset < end + math.lcm(4096, arena.spec.hidden * 4)
        assert region.offset % 64 == 0
        end = region.offset + region.num_bytes
    assert end <= arena.num_bytes < end + 4096
    assert arena.num_bytes % 4096 == 0
    row_bytes = arena.spec.hidden * arena.spec.combine_dtype.itemsize
    assert arena.row_bytes == row_bytes
    assert [arena[name].offset % row_bytes for name in ("outputs", "returned")] == [0, 0]


@pytest.mark.parametrize("arena", ARENAS, ids=lambda a: f"{type(a.spec.layout).__name__}-{a.topology.num_ranks}")
def test_views_are_where_the_map_says(arena):
    """Each view, filled with its own number, is found at its printed offset, and nothing is lost to another."""
    segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    views = {name: arena.view(segment, name) for name in arena.regions}
    for n, view in enumerate(views.values(), start=1):
        view.view(torch.uint8).fill_(n)
    lines = re.findall(r"^ *([\d,]+) +([\d,]+)  (\w+)", str(arena), flags=re.MULTILINE)
    assert [name for _, _, name in lines] == list(views)
    seen = torch.zeros_like(segment)
    for n, (offset, num_bytes, name) in enumerate(lines, start=1):
        start, size = int(offset.replace(",", "")), int(num_bytes.replace(",", ""))
        seen[start : start + size] = n
        assert size == views[name].nbytes
    assert same_bits(seen, segment)
    assert str(arena).splitlines()[-1].split() == [
        f"{arena.num_bytes:,}", "bytes", "in", "each", "of", str(arena.topology.num_ranks), "ranks'", "segments"
    ]  # fmt: skip


def test_a_literal_map():
    arena = Arena(
        spec=Spec(num_experts=8, num_topk=2, hidden=64, max_tokens=16, extra_bytes=3), topology=Topology(num_ranks=4)
    )
    assert {name: (r.offset, r.shape) for name, r in arena.regions.items()} == {
        "words": (0, (4, 4)),
        "arrived": (128, (4, 4)),
        "aborts": (256, (4,)),
        "closed": (320, (4,)),
        "masks": (384, (3, 4)),  # two words, and 31 ranks in each that follows
        "restarts": (512, (2, 4)),
        "reasons": (576, (4, 512)),
        "counts": (2624, (4, 4, 13)),  # 8 experts, 4 ranks, and who brings too many
        "data": (8192, (2, 64, 64)),  # 4 ranks of 16 tokens
        "metadata": (24576, (2, 64, 24)),  # source; 2 ids and 2 weights; 3 bytes of extras; to a multiple of 8
        "outputs": (27648, (2, 64, 64)),
        "returned": (44032, (2, 32, 64)),  # 16 tokens, rows from 2 ranks at most
        "returned_extras": (53248, (2, 32, 16)),  # 2 float32 and 3 bytes, to a multiple of 8
    }
    assert arena.num_bytes == 57344
