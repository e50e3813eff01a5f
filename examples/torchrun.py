"""Ranks that are processes: one dispatch and one combine under torchrun.

    $ torchrun --nproc-per-node 2 examples/torchrun.py
    tokens per expert: [2, 4, 1, 2, 1, 2, 2, 2]
    combined: [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]

Rank 0 prints how many tokens came to each of the eight experts, and the first value of each of the eight tokens, which
all experts double. With 4 ranks (`--nproc-per-node 4`) tokens and experts are spread otherwise, and it prints the same;
so it does on several machines, each of which runs it with `--nnodes` (docs/nodes.md).
"""

import torch
import torch.distributed as dist

import crossdock as cd

NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 8, 8, 2, 16


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_TOKENS // num_ranks,
        wire=cd.Fp32(),
        layout=cd.Expanded(),
        reduce="node",  # on each machine first, then over machines
    )
    generator = torch.Generator().manual_seed(0)  # the same on all ranks, which take a slice each
    topk_idx = cd.uniform_load(NUM_TOKENS, NUM_EXPERTS, num_topk=NUM_TOPK, generator=generator)
    x = torch.arange(NUM_TOKENS).float().unsqueeze(1).expand(-1, HIDDEN) + 0.5
    weights = torch.full((NUM_TOKENS, NUM_TOPK), 0.5)

    mine = slice(rank * spec.max_tokens, (rank + 1) * spec.max_tokens)
    topology = cd.Topology.of(dist.group.WORLD)  # which ranks share memory
    with cd.Buffer(None, spec, topology=topology) as buffer:  # None: torch.distributed's default group
        recv = buffer.dispatch(x[mine].contiguous(), topk_idx[mine], weights=weights[mine])
        y = 2 * recv.x  # this rank's experts
        out = buffer.combine(y, recv.plan, weights=recv.weights)
        stats = buffer.gather_stats()

    everybodys = [torch.empty_like(out) for _ in range(num_ranks)]
    dist.all_gather(everybodys, out)
    if rank == 0:
        print("tokens per expert:", stats.num_tokens_per_expert.tolist())
        print("combined:", torch.cat(everybodys)[:, 0].tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
