"""The memory map: regions apart from each other, aligned, and printed as they are."""

import itertools
import math
import re

import pytest
import torch

from crossdock import Arena, Bf16, Compact, Expanded, Fp8, Fp32, Padded, Spec, Topology
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
STAGED = [
    Arena(
        spec=Spec(
            num_experts=16, num_topk=4, hidden=h, max_tokens=5, wire=wire, layout=Expanded(alignment=3, staged=True),
            reduce=reduce, extra_bytes=3, num_slots=n,
        ),
        topology=Topology(num_ranks=p),
    )
    for p in (1, 8)
    for h, wire, reduce, n in [
        (7, Fp32(), "token", 3),
        (24, Fp8(block=8), "rank", 2),
        (20, Fp8(block=4, scale="ue8m0", packed=True, column_major=True), "token", 1),
    ]
]  # fmt: skip
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


@pytest.mark.parametrize("arena", STAGED, ids=lambda a: f"{a.spec.wire}-{a.topology.num_ranks}")
def test_staged_rows_have_room_for_every_format_and_lie_apart(arena):
    """Each row of each slot in bytes of its own, those of its scales among them; wide rows in the same bytes."""
    spec, num_rows = arena.spec, 5 * arena.topology.num_ranks
    segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    views = {name: arena.view(segment, name) for name in arena.regions}
    parts = [name for name in ("data", "scale") if name in views]
    for slot in range(spec.num_slots):
        for row in range(num_rows):
            for name in parts:
                assert views[name].shape[:2] == (spec.num_slots, num_rows)
                view = views[name][slot, row].view(torch.uint8)
                assert not view.any()
                view.fill_(1)
    num_bytes = sum(views[name][0, 0].nbytes for name in parts)
    assert int(segment.sum()) == spec.num_slots * num_rows * num_bytes
    first, last = arena["data"].offset, arena["metadata"].offset
    assert not segment[:first].any()
    assert not segment[last:].any()
    assert arena.staged_bytes % 16 == 0
    assert ("unquantized" in views) == ("scale" in views)
    if "unquantized" in views:
        views["unquantized"].zero_()
        assert not views["data"].view(torch.uint8).any()
        assert arena["unquantized"].offset == first
    assert "outputs" not in views
    rest = [region for name, region in arena.regions.items() if name not in ("scale", "unquantized")]
    assert all(a.offset + a.num_bytes <= b.offset for a, b in itertools.pairwise(rest))
    assert last >= first + (spec.num_slots * num_rows - 1) * arena.staged_bytes + arena.row_bytes


def test_staged_rows_take_a_ninth_of_their_worst_case():
    """At a large model's sizes: 8 ranks of 4096 tokens, top-8 of 256 experts, hidden 7168."""
    sizes = {}
    for layout in (Expanded(capacity=8 * 4096 * 8), Expanded(staged=True), Expanded(capacity=65536, staged=True)):
        for wire in (Bf16(), Fp8()):
            spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096, layout=layout, wire=wire)
            sizes[layout, wire] = Arena(spec, Topology(num_ranks=8)).num_body_bytes
    of_rows = [size / 2**30 for size in sizes.values()]
    assert [round(size, 2) for size in of_rows] == [14.88, 11.49, 1.76, 1.76, 1.76, 1.76]
    rows, pairs = 2 * 8 * 4096 * 7168 * 2, 2 * 4096 * 8 * 7168 * 2  # staged, and returned
    assert rows + pairs < of_rows[2] * 2**30 < 1.01 * (rows + pairs)


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
