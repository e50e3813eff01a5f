"""Decode with two micro-batches: the experts of one run while the other waits for its peers.

    $ python examples/micro_batches.py
    overlapped and one after the other give the same bits: True

At most two calls are in flight, as many as the Spec has slots (num_slots=2). Between a start and its wait nothing of
the library runs: a rank that has its own work to do then gives its peers time to do theirs.
"""

import torch
from torch import Tensor

import crossdock as cd

NUM_RANKS, NUM_LAYERS, NUM_TOKENS = 2, 3, 4
SPEC = cd.Spec(num_experts=8, num_topk=2, hidden=32, max_tokens=NUM_TOKENS, wire=cd.Fp32(), layout=cd.Padded())


def batch(rank: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H] of one micro-batch, and what a gate says of them: topk_idx and topk_weights, [T, K]."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    x = torch.randn(NUM_TOKENS, SPEC.hidden, generator=generator)
    logits = torch.randn(NUM_TOKENS, SPEC.num_experts, generator=generator)
    return x, *cd.softmax_topk(logits, SPEC.num_topk)


def run_experts(recv: cd.Received, matrices: Tensor) -> Tensor:
    """One matrix per local expert; outputs go where combine leaves them in place and the tokens' owners pull them."""
    y = recv.output_rows()  # [L, C, H]; rows behind an expert's count are computed too, and nobody reads them
    torch.bmm(recv.x, matrices, out=y)
    return y


def one_after_the_other(buffer: cd.Buffer, matrices: Tensor) -> list[Tensor]:
    """The same computation without overlap."""
    outs = []
    for number in range(2):
        x, topk_idx, weights = batch(buffer.rank, number)
        for _ in range(NUM_LAYERS):
            recv = buffer.dispatch(x, topk_idx)
            x = buffer.combine(run_experts(recv, matrices), recv.plan, weights=weights)
        outs.append(x)
    return outs


def overlapped(buffer: cd.Buffer, matrices: Tensor) -> list[Tensor]:
    """Both micro-batches, each half a layer ahead of the other."""
    a, idx_a, weights_a = batch(buffer.rank, 0)
    b, idx_b, weights_b = batch(buffer.rank, 1)
    rows_a = buffer.dispatch_start(a, idx_a)
    for layer in range(NUM_LAYERS):
        rows_b = buffer.dispatch_start(b, idx_b)
        recv = rows_a.wait()
        sums_a = buffer.combine_start(run_experts(recv, matrices), recv.plan, weights=weights_a)
        recv = rows_b.wait()
        y = run_experts(recv, matrices)
        a = sums_a.wait()
        if layer < NUM_LAYERS - 1:
            rows_a = buffer.dispatch_start(a, idx_a)
        b = buffer.combine_start(y, recv.plan, weights=weights_b).wait()
    return [a, b]


def program(group: cd.ThreadGroup) -> bool:
    """What each rank runs: both ways, compared bit for bit."""
    generator = torch.Generator().manual_seed(100 + group.rank)
    matrices = torch.randn(SPEC.num_local_experts(group.size), SPEC.hidden, SPEC.hidden, generator=generator) / 6
    with cd.Buffer(group, SPEC) as buffer:
        pairs = zip(overlapped(buffer, matrices), one_after_the_other(buffer, matrices), strict=True)
        return all(torch.equal(fast, slow) for fast, slow in pairs)


if __name__ == "__main__":
    print("overlapped and one after the other give the same bits:", all(cd.run_local(program, NUM_RANKS)))
