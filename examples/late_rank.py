"""A rank that is late in every step, and an expert that gets more rows than others: what ``crossdock trace`` is for.

    $ torchrun --nproc-per-node 4 examples/late_rank.py
    20 steps of 4 ranks

It knows nothing of traces. ``crossdock trace FOLDER -- torchrun --nproc-per-node 4 examples/late_rank.py`` traces it,
and says that rank 2 is late to combines.
"""

import time

import torch
import torch.distributed as dist

import crossdock as cd

STEPS, NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 20, 256, 32, 4, 2048
LATE_RANK, LATE_S = 2, 0.05


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    spec = cd.Spec(
        num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, hidden=HIDDEN, max_tokens=NUM_TOKENS, layout=cd.Expanded()
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(NUM_TOKENS, HIDDEN, generator=generator).bfloat16()
    topk_idx = cd.hot_expert_load(NUM_TOKENS, NUM_EXPERTS, num_topk=NUM_TOPK, generator=generator, hot_expert=5)
    with cd.Buffer(None, spec) as buffer:
        for _ in range(STEPS):
            recv = buffer.dispatch(x, topk_idx)
            y = 2 * recv.x  # this rank's experts
            if rank == LATE_RANK:
                time.sleep(LATE_S)
            buffer.combine(y, recv.plan)
        if rank == 0:
            print(f"{STEPS} steps of {num_ranks} ranks")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
