"""Dispatch and combine captured in a CUDA graph once, and replayed with other tokens; on CPUs they are called again.

    $ torchrun --nproc-per-node 2 examples/cuda_graph.py
    step 0: [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]
    step 1: [17.0, 19.0, 21.0, 23.0, 25.0, 27.0, 29.0, 31.0]
    step 2: [33.0, 35.0, 37.0, 39.0, 41.0, 43.0, 45.0, 47.0]

Each line has the first value of each token's sum, which is twice that of the token. Where there are GPUs, rank r uses
number r, or shares one with others; ranks that share one want MPS:

    $ crossdock mps -- torchrun --nproc-per-node 2 examples/cuda_graph.py
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import crossdock as cd

NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN, NUM_STEPS = 8, 8, 2, 16, 3


def take_device() -> torch.device:
    """This rank's GPU, made the current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A call that gives what ``run`` gives, from the same tensors; on a GPU by replaying a graph of it."""
    if device.type == "cpu":
        return run
    run()  # once before: libraries set up what must not be set up in a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")  # where ranks share a GPU NCCL refuses
    rank, num_ranks, device = dist.get_rank(), dist.get_world_size(), take_device()
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_TOKENS // num_ranks,
        wire=cd.Fp32(),
        layout=cd.Expanded(),
    )
    mine = slice(rank * spec.max_tokens, (rank + 1) * spec.max_tokens)
    x = torch.empty(spec.max_tokens, HIDDEN, device=device)  # inputs stay where they are, and get other values
    topk_idx = torch.empty(spec.max_tokens, NUM_TOPK, dtype=torch.int64, device=device)
    weights = torch.full((spec.max_tokens, NUM_TOPK), 0.5, device=device)

    with cd.Buffer(None, spec, device=device) as buffer:

        def run() -> Tensor:
            recv = buffer.dispatch(x, topk_idx, rows="capacity")  # the host is not told how many rows come
            return buffer.combine(2 * recv.x, recv.plan, weights=weights)

        def give(step: int) -> None:
            generator = torch.Generator().manual_seed(step)
            picks = cd.uniform_load(NUM_TOKENS, NUM_EXPERTS, num_topk=NUM_TOPK, generator=generator)
            values = torch.arange(NUM_TOKENS).float().unsqueeze(1).expand(-1, HIDDEN) + NUM_TOKENS * step + 0.5
            topk_idx.copy_(picks[mine])
            x.copy_(values[mine])

        give(0)
        step_again = captured(run, device)
        for step in range(NUM_STEPS):
            give(step)
            out = step_again().cpu()
            buffer.check()  # raises what a step has found since the last check
            everybodys = [torch.empty_like(out) for _ in range(num_ranks)]
            dist.all_gather(everybodys, out)
            if rank == 0:
                print(f"step {step}: {torch.cat(everybodys)[:, 0].tolist()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
