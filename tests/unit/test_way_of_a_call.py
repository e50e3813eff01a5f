"""How far it is from a verb to what moves its rows: frames of ours on the stack, and the files that they are in."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import crossdock
from crossdock import Buffer, Compact, Expanded, Fp8, Padded, Spec, ThreadGroup
from crossdock.backends.cpu import rows

MOST = 6
LAYOUTS = [Compact(), Expanded(), Padded()]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
HOME = str(Path(crossdock.__file__).parent)


def _ours(frame) -> list[tuple[str, str]]:
    """File and function of each of our frames, the innermost first."""
    ours = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(HOME):
            ours.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return ours


def watch(name: str):
    """Notes the stack whenever torch is asked for that operation."""
    real, stacks = getattr(torch, name), []

    def noted(*args, **kwargs):
        stacks.append(_ours(sys._getframe(1)))
        return real(*args, **kwargs)

    return mock.patch.object(torch, name, noted), stacks


@layouts
@pytest.mark.parametrize("wire", [crossdock.Fp32(), Fp8(block=8)], ids=repr)
def test_a_dispatch_reaches_its_stores_in_few_frames(layout, wire):
    spec = Spec(num_experts=4, num_topk=2, hidden=16, max_tokens=4, layout=layout, wire=wire)
    x, topk_idx = torch.ones(4, 16), torch.tensor([[0, 1], [2, 3], [1, 2], [3, -1]])
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        plan = buffer.dispatch(x, topk_idx).plan
        patch, stacks = watch("index_select")
        with patch:
            for routing in (topk_idx, plan):
                buffer.dispatch(x, routing)
                buffer.dispatch_start(x, routing).wait()
    assert stacks
    for stack in stacks:
        assert len(stack) <= MOST, stack
        assert len({file for file, _ in stack}) <= MOST
        assert stack[-1][1] in ("dispatch", "dispatch_start", "wait")


@pytest.mark.parametrize("reduce", ["token", "rank"])
@layouts
def test_a_combine_reaches_its_sums_in_few_frames(layout, reduce):
    spec = Spec(num_experts=4, num_topk=2, hidden=16, max_tokens=4, layout=layout, wire=crossdock.Fp32(), reduce=reduce)
    x, topk_idx = torch.ones(4, 16), torch.tensor([[0, 1], [2, 3], [1, 2], [3, -1]])
    stacks = []
    sum_rows = rows.sum_rows

    def noted(*args, **kwargs):
        stacks.append(_ours(sys._getframe(1)))
        return sum_rows(*args, **kwargs)

    with Buffer(ThreadGroup.world(1)[0], spec) as buffer, mock.patch.object(rows, "sum_rows", noted):
        recv = buffer.dispatch(x, topk_idx)
        for y in (torch.ones_like(recv.x), recv.output_rows().fill_(1)):
            buffer.combine(y, recv.plan)
    assert stacks
    for stack in stacks:
        assert len(stack) <= MOST, stack
        assert stack[-1][1] == "combine"
