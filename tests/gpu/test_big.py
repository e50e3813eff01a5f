"""Rows that lie beyond 2**31 elements, and 2**32 bytes, of a slot; inputs and checks stay on the device.

Letters: T tokens here, H hidden, R rows, C capacity.
"""

import gc

import pytest
import torch

from crossdock import Bf16, Expanded, Fp8, Padded, Quantized, Spec
from tests.world import device, open_buffer

H = 7168
LIMIT = 2**31
CHUNK = 4096
"""Rows that are compared at a time."""


def rows_of(numbers):
    """[n, H] bfloat16: row n has values of its own, integers below 16, exact in FP8 whose scales are powers of 2."""
    columns = torch.arange(H, device=device())
    return ((numbers.unsqueeze(1) * 31 + columns * 7 + numbers.unsqueeze(1) * columns % 13) % 16).to(torch.bfloat16)


def fill(x, first_number):
    for start in range(0, x.shape[0], CHUNK):
        end = min(start + CHUNK, x.shape[0])
        x[start:end] = rows_of(torch.arange(first_number + start, first_number + end, device=device()))


def count_wrong(rows, numbers, times=1):
    """Rows that are not those of their numbers."""
    wrong = torch.zeros((), dtype=torch.int64, device=device())
    for start in range(0, rows.shape[0], CHUNK):
        want = rows_of(numbers[start : start + CHUNK]) * times
        wrong += (rows[start : start + CHUNK] != want).any(1).sum()
    return int(wrong)


def free():
    gc.collect()
    torch.cuda.empty_cache()


def send_all_to_one(group, spec):
    """Every token of all ranks goes to the last rank, and comes return_row doubled, pulled and pushed."""
    with open_buffer(group, spec, timeout_s=60) as buffer:
        last = buffer.topology.num_ranks - 1
        x = torch.empty(spec.max_tokens, H, dtype=torch.bfloat16, device=device())
        fill(x, buffer.rank * spec.max_tokens)
        topk_idx = torch.full((spec.max_tokens, 1), spec.num_experts - 1, device=device())
        recv = buffer.dispatch(x, topk_idx)
        num_rows, wrong = recv.x.shape[0], [count_wrong(recv.x, recv.src_idx)]
        assert torch.equal(recv.src_idx, torch.arange(num_rows, dtype=torch.int32, device=device()))
        again = buffer.dispatch(x, recv.plan)  # in the slot behind
        wrong.append(count_wrong(again.x, again.src_idx))
        y = again.output_rows()
        for start in range(0, num_rows, CHUNK):
            torch.mul(again.x[start : start + CHUNK], 2, out=y[start : start + CHUNK])
        numbers = torch.arange(spec.max_tokens, device=device()) + buffer.rank * spec.max_tokens
        wrong.append(count_wrong(buffer.combine(y, again.plan), numbers, times=2))
        wrong.append(count_wrong(buffer.combine(again.x, again.plan), numbers))
        buffer.check()
        del x, y, recv, again
    free()
    return num_rows if buffer.rank == last else None, wrong


@pytest.mark.worlds("cuda-2")
def test_rows_beyond_2_31_elements_of_a_slot_come_and_go(world):
    max_tokens = 151_552
    num_rows = world.num_ranks * max_tokens
    assert num_rows * H > LIMIT
    spec = Spec(num_experts=2, num_topk=1, hidden=H, max_tokens=max_tokens, layout=Expanded(capacity=num_rows))
    for rank, (got, wrong) in enumerate(world.run(send_all_to_one, spec)):
        assert wrong == [0, 0, 0, 0], rank
        assert got == (num_rows if rank == world.num_ranks - 1 else None)


def last_block(recv, wire, num_rows):
    """The rows of the last expert [n, H] in bfloat16, and how many elements of the segment lie before them."""
    if isinstance(recv.x, Quantized):
        data, scale = recv.x.data[-1, :num_rows], recv.x.scale[-1, :num_rows]
        return wire.dequantize(Quantized(data, scale)), data.storage_offset()
    rows = recv.x[-1, :num_rows]
    return rows, rows.storage_offset()


def use_the_last_expert(group, spec, num_tokens):
    """A few tokens, whose rows lie in the last block of the slot, that begins beyond the limit."""
    with open_buffer(group, spec, timeout_s=60) as buffer:
        num_local = spec.num_local_experts(buffer.topology.num_ranks)
        numbers = torch.arange(num_tokens, device=device()) + buffer.rank * spec.max_tokens
        topk_idx = torch.arange(1, 3, device=device()).expand(num_tokens, 2) * num_local - 1  # each rank's last
        wrong, starts = [], []
        for _ in range(spec.num_slots + 1):
            recv = buffer.dispatch(rows_of(numbers), topk_idx)
            counts = recv.num_tokens_per_expert.tolist()
            came, start = last_block(recv, spec.wire, counts[-1])
            starts.append(start)
            wrong.append(count_wrong(came, recv.src_idx[-1, : counts[-1]]))
            recv.output_rows()[-1, : counts[-1]] = 2 * came
            wrong.append(count_wrong(buffer.combine(recv.output_rows(), recv.plan), numbers, times=4))
            (return_row,) = buffer.return_extras(recv.plan, [recv.src_idx.float().unsqueeze(-1)])
            wrong.append(int((return_row.squeeze(-1) != numbers.unsqueeze(1)).sum()))
        buffer.check()
        del recv, came
    free()
    return counts, wrong, min(starts)


@pytest.mark.worlds("cuda-2")
@pytest.mark.parametrize("wire", [Bf16(), Fp8(block=128, pow2=True)], ids=repr)
def test_rows_in_a_block_that_begins_beyond_2_31_elements_come_and_go(world, wire):
    num_tokens, num_experts, capacity = 100, 16, 43_008
    num_local = num_experts // world.num_ranks
    assert (num_local - 1) * capacity * H > LIMIT
    spec = Spec(
        num_experts=num_experts, num_topk=2, hidden=H, max_tokens=capacity // world.num_ranks, wire=wire,
        layout=Padded(capacity=capacity),
    )  # fmt: skip
    for counts, wrong, start in world.run(use_the_last_expert, spec, num_tokens):
        assert counts == [0] * (num_local - 1) + [num_tokens * world.num_ranks]
        assert not any(wrong)
        assert start > LIMIT
