"""A decode loop: two micro-batches write text, and the experts of one run while the other's rows are on their way.

    $ torchrun --nproc-per-node 2 examples/decode.py
    rank 0 writes [[0, 0, 0, 0, 0, 0, 0, 14, 14], [1, 1, 12, 11, 11, 38, 38, 39, 38]] ...
    overlapped and one after the other write the same: True

With 4 ranks rank 0 writes the same. On GPUs a step is one CUDA graph, which is replayed: `Padded` rows have the same
shape at every step, and no host is asked how many came. What changes between steps lies in tensors: the position, the
tokens, and each layer's state. Ranks that share a GPU want MPS:

    $ crossdock mps -- torchrun --nproc-per-node 2 examples/decode.py
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import crossdock as cd

NUM_SEQUENCES, NUM_STEPS, VOCABULARY = 4, 8, 64
NUM_LAYERS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 3, 32, 8, 2
NUM_BATCHES = 2
DECAY = 0.9


class Layer(nn.Module):
    """Linear attention with decay, whose state has one size at every position; then a mixture of experts."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.empty(num_local, HIDDEN, HIDDEN))

    def attend(self, h: Tensor, state: Tensor) -> Tensor:
        """[S, H] -> [S, H]; ``state`` [S, H, H] takes in these tokens, in place."""
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        state.mul_(DECAY).add_(k.unsqueeze(2) * v.unsqueeze(1))
        return h + torch.bmm(q.unsqueeze(1), state).squeeze(1) / HIDDEN


class MicroBatch:
    """Some sequences, and what a step needs of them in tensors that stay where they are."""

    def __init__(self, first: int, device: torch.device) -> None:
        self.tokens = torch.zeros(NUM_SEQUENCES, NUM_STEPS + 1, dtype=torch.int64, device=device)
        self.tokens[:, 0] = torch.arange(first, first + NUM_SEQUENCES, device=device) % VOCABULARY
        self.states = torch.zeros(NUM_LAYERS, NUM_SEQUENCES, HIDDEN, HIDDEN, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.h = torch.empty(NUM_SEQUENCES, HIDDEN, device=device)
        self.weights = torch.empty(NUM_SEQUENCES, NUM_TOPK, device=device)


class Decoder:
    """This rank's part of the model, and the buffer between the ranks."""

    def __init__(self, buffer: cd.Buffer, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)  # the same on all ranks, which keep their experts
        num_ranks, num_local = buffer.topology.num_ranks, NUM_EXPERTS // buffer.topology.num_ranks
        self.buffer = buffer
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(device)
        self.layers = [Layer(num_local).to(device) for _ in range(NUM_LAYERS)]
        for layer in self.layers:
            for weight in (layer.qkv.weight, layer.gate.weight):
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / HIDDEN**0.5)
            whole = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
            layer.experts.data.copy_(whole.chunk(num_ranks)[buffer.rank])

    def send(self, layer: Layer, index: int, batch: MicroBatch) -> cd.Pending[cd.Received]:
        """Attention of a micro-batch, then its rows are on their way to the experts."""
        batch.h = layer.attend(batch.h, batch.states[index])
        topk_idx, batch.weights = cd.softmax_topk(layer.gate(batch.h), NUM_TOPK)
        return self.buffer.dispatch_start(batch.h, topk_idx)

    def answer(self, layer: Layer, rows: cd.Pending[cd.Received], batch: MicroBatch) -> cd.Pending[Tensor]:
        """The experts on the rows that came; their outputs are on their way home."""
        recv = rows.wait()
        y = recv.output_rows()  # [L, C, H], where the tokens' owners pull from
        torch.bmm(recv.x, layer.experts, out=y)
        return self.buffer.combine_start(y.relu_(), recv.plan, weights=batch.weights, bias=batch.h)

    def step(self, batches: list[MicroBatch]) -> None:
        """The next token of each sequence. Two micro-batches at a time: as many as the buffer has slots."""
        for batch in batches:
            batch.h = self.embedding[batch.tokens.gather(1, batch.position.expand(NUM_SEQUENCES, 1)).squeeze(1)]
        for index, layer in enumerate(self.layers):
            rows = [self.send(layer, index, batch) for batch in batches]  # while B attends, A's rows travel
            sums = [self.answer(layer, *pair) for pair in zip(rows, batches, strict=True)]
            for batch, pending in zip(batches, sums, strict=True):
                batch.h = pending.wait()
        for batch in batches:
            batch.position += 1
            written = (batch.h @ self.embedding.T).argmax(dim=1, keepdim=True)
            batch.tokens.scatter_(1, batch.position.expand(NUM_SEQUENCES, 1), written)


def take_device() -> torch.device:
    """This rank's GPU, made the current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def captured(run: Callable[[], None], batches: list[MicroBatch], device: torch.device) -> Callable[[], object]:
    """What does the same as ``run`` each time it is called; on a GPU a graph."""
    if device.type == "cpu":
        return run
    kept = [(batch.tokens.clone(), batch.states.clone(), batch.position.clone()) for batch in batches]
    run()  # once before: libraries set up what must not be set up in a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch, (tokens, states, position) in zip(batches, kept, strict=True):
        batch.tokens.copy_(tokens)
        batch.states.copy_(states)
        batch.position.copy_(position)
    return graph.replay


@torch.no_grad()
def write(decoder: Decoder, device: torch.device, *, overlapped: bool) -> Tensor:
    """All sequences of this rank, [B, S, N]; each micro-batch with the other, or alone. Collective."""
    first = decoder.buffer.rank * NUM_BATCHES * NUM_SEQUENCES
    batches = [MicroBatch(first + number * NUM_SEQUENCES, device) for number in range(NUM_BATCHES)]
    for together in [batches] if overlapped else [[batch] for batch in batches]:
        step = captured(lambda: decoder.step(together), together, device)  # noqa: B023 - called within this turn
        for _ in range(NUM_STEPS):
            step()
    decoder.buffer.check()  # raises what a step has found
    return torch.stack([batch.tokens for batch in batches]).cpu()


def main() -> None:
    """What each process runs."""
    dist.init_process_group("gloo")  # where ranks share a GPU NCCL refuses
    torch.set_num_threads(1)  # ranks of one host share its cores
    device = take_device()
    spec = cd.Spec(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens=NUM_SEQUENCES,
        wire=cd.Fp32(),
        layout=cd.Padded(),
        num_slots=NUM_BATCHES,
    )
    with cd.Buffer(None, spec, device=device) as buffer:
        decoder = Decoder(buffer, device)
        written = write(decoder, device, overlapped=True)
        same = torch.tensor(torch.equal(written, write(decoder, device, overlapped=False))).int()
        dist.all_reduce(same, dist.ReduceOp.MIN)  # on all ranks
        if buffer.rank == 0:
            print("rank 0 writes", written[0, :2].tolist(), "...")
            print("overlapped and one after the other write the same:", bool(same))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
