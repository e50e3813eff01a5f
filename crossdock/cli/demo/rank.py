"""What each rank of the demo does: train a model whose experts are spread over the ranks, then write text with it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.arena import Arena, Control
from crossdock.buffer import Buffer
from crossdock.cli.demo.estimate import HOLD_OUT, TRAIN, WRITE
from crossdock.cli.demo.generate import MicroBatch, draw_noise, generate
from crossdock.cli.demo.model import Shape, Transformer
from crossdock.cli.demo.parameters import initial_values, share
from crossdock.cli.demo.train import Ranks, Recipe, held_out_loss, train
from crossdock.cli.demo.watch import Span, Watch, WatchedBuffer
from crossdock.cli.world import Member
from crossdock.connection import Connection
from crossdock.layout import Expanded, Padded
from crossdock.nn import ExpertParallel, Gate, GroupedExperts
from crossdock.spec import Spec, Topology
from crossdock.trace import write_spans
from crossdock.wire import Fp32

MICRO_BATCHES = 2
_RECENT = 10
"""Steps that the progress line speaks of."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told."""

    shape: Shape
    recipe: Recipe
    train_text: npt.NDArray[np.uint8]
    held_out_text: npt.NDArray[np.uint8]
    prompts: npt.NDArray[np.int64]
    """[sequences of all ranks, N], -1 where a byte is to be written."""
    trace: str | None = None
    """The folder for the trace of training; None: no trace."""
    over_hosts: bool = False
    """Whether ranks are on several hosts, which then are nodes."""

    def noise(self) -> Tensor:
        """What the bytes are drawn with, [sequences of all ranks, N, 256]."""
        num_sequences, length = self.prompts.shape
        return draw_noise(num_sequences, length, self.recipe.seed)


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What one rank has to show."""

    losses: list[float]
    """Of each step, over all ranks' tokens."""
    held_out_loss: float
    spans: list[Span]
    counts: npt.NDArray[np.int32]
    """[steps, layers, P, E]: rows that each rank sent to each expert. The same on all ranks."""
    values: dict[str, npt.NDArray[np.float32]]
    """This rank's share of the trained parameters."""
    written: npt.NDArray[np.int64]
    """[sequences of this rank, N]: its prompts, completed."""
    generate_s: float


def run_rank(member: Member, job: Job) -> RankRun:
    """Trains and writes, over one connection: training and decoding share its memory. Collective."""
    shape, device = job.shape, member.device
    watch = Watch(torch.cuda.synchronize) if device.type == "cuda" else Watch()
    at_once = -(-job.recipe.num_sequences // member.num_ranks)
    through_host = device.type == "cuda" and not member.has_nccl
    ranks = Ranks(member.rank, member.num_ranks, _sum_through_host if through_host else dist.all_reduce)
    losses, counts = [], []
    prompts = torch.from_numpy(job.prompts)
    own = [whole.chunk(member.num_ranks)[member.rank].to(device) for whole in (prompts, job.noise())]
    parts = [part.chunk(MICRO_BATCHES) for part in own]
    topology = Topology.of(dist.group.WORLD) if job.over_hosts else Topology(num_ranks=member.num_ranks)
    specs = training_spec(shape, at_once * shape.context), decoding_spec(shape, len(parts[0][0]))
    if job.over_hosts:
        specs = replace(specs[0], reduce="node"), replace(specs[1], reduce="node")
    num_bytes = max(num_body_bytes(spec, topology) for spec in specs)
    with Connection(
        None, num_bytes, device=device, max_experts=shape.num_experts, trace=job.trace, topology=topology
    ) as connection:
        buffer, decoding = WatchedBuffer(connection, specs[0], watch), Buffer(connection, specs[1])
        model = expert_parallel_model(shape, buffer).to(device)
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        model.load_state_dict(share(initial_values(shape, job.recipe.seed), member.rank, member.num_ranks))

        def balance(rate: float) -> None:
            counts.append(_of_all_nodes(torch.stack(buffer.take_counts()), topology, member.rank, shape.num_experts))
            for gate, of_layer in zip(gates, counts[-1], strict=True):
                gate.balance(of_layer.sum(0), rate)

        member.tell(TRAIN)
        progress = Progress(watch, num_tokens=job.recipe.num_sequences * shape.context)
        for loss in train(
            model, torch.from_numpy(job.train_text), job.recipe, ranks=ranks, watch=watch, balance=balance
        ):
            losses.append(loss)
            member.tell(TRAIN, len(losses), loss, *progress.look())
        spans = list(watch.spans)
        member.tell(HOLD_OUT)
        held_out = held_out_loss(model, torch.from_numpy(job.held_out_text), ranks=ranks, at_once=at_once)
        member.tell(WRITE)
        batches = [MicroBatch(model, *part) for part in zip(*parts, strict=True)]
        began = watch.now()
        generate(model, decoding, batches)
        generate_s = watch.now() - began
    if job.trace is not None:
        of_program = [(span.name, span.start, span.end) for span in spans if span.name not in ("dispatch", "combine")]
        write_spans(job.trace, member.rank, of_program, num_ranks=member.num_ranks)
    return RankRun(
        losses=losses,
        held_out_loss=held_out,
        spans=spans,
        counts=torch.stack(counts).to("cpu", torch.int32).numpy(),
        values={name: value.cpu().numpy() for name, value in model.state_dict().items()},
        written=torch.cat([batch.tokens for batch in batches]).cpu().numpy(),
        generate_s=generate_s,
    )


def num_body_bytes(spec: Spec, topology: Topology) -> int:
    """Bytes that a Spec needs of a connection of these ranks."""
    control = Control(
        topology=topology,
        max_experts=spec.num_experts,
        max_in_flight=spec.num_slots,
        over_rail=topology.num_nodes > 1,
    )
    return Arena(spec, topology, control).num_body_bytes


def _of_all_nodes(counts: Tensor, topology: Topology, rank: int, num_experts: int) -> Tensor:
    """[layers, P, E] of all experts. In one domain every plan has them; a node has those of its own experts."""
    if topology.num_nodes == 1:
        return counts[:, :, :num_experts]
    node, local = divmod(rank, topology.node_size)
    own = num_experts // topology.num_nodes
    whole = counts.new_zeros(*counts.shape[:2], num_experts)
    if local == 0:  # one rank speaks for its node
        whole[:, :, node * own : (node + 1) * own] = counts[:, :, :own]
    dist.all_reduce(whole)
    return whole


def _sum_through_host(tensor: Tensor) -> None:
    """Ranks that share a GPU: NCCL refuses them, and not every torch's gloo takes CUDA tensors."""
    on_host = tensor.cpu()
    dist.all_reduce(on_host)
    tensor.copy_(on_host)


def expert_parallel_model(shape: Shape, buffer: Buffer) -> Transformer:
    """The model, whose blocks hold this rank's experts; all of them use one buffer."""
    num_local = buffer.spec.num_local_experts(buffer.topology.num_ranks)

    def make_moe() -> ExpertParallel:
        gate = Gate(
            shape.hidden,
            shape.num_experts,
            shape.num_topk,
            num_groups=shape.num_groups,
            num_topk_groups=shape.num_topk_groups,
            score="sigmoid",
        )
        return ExpertParallel(gate, GroupedExperts(num_local, shape.hidden, shape.intermediate), buffer)

    return Transformer(shape, make_moe)


def training_spec(shape: Shape, max_tokens: int) -> Spec:
    """For training: a row for each pick, expert-major; a rank sums its rows of a token, and one comes back."""
    return Spec(
        num_experts=shape.num_experts,
        num_topk=shape.num_topk,
        hidden=shape.hidden,
        max_tokens=max_tokens,
        wire=Fp32(),
        layout=Expanded(),
        reduce="rank",
    )


def decoding_spec(shape: Shape, max_tokens: int) -> Spec:
    """For a few tokens at a time: fixed blocks of rows, and a receive slot for each micro-batch."""
    return Spec(
        num_experts=shape.num_experts,
        num_topk=shape.num_topk,
        hidden=shape.hidden,
        max_tokens=max_tokens,
        wire=Fp32(),
        layout=Padded(),
        num_slots=MICRO_BATCHES,
    )


class Progress:
    """How fast training goes, and how much of it is communication, over the last steps."""

    def __init__(self, watch: Watch, *, num_tokens: int) -> None:
        self._watch = watch
        self._num_tokens = num_tokens
        self._num_seen = 0
        self._steps: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def look(self) -> tuple[float, float]:
        """Tokens per second, and the share of time in dispatch and combine; to be called after each step."""
        new, self._num_seen = self._watch.spans[self._num_seen :], len(self._watch.spans)
        moving_s = sum(span.end - span.start for span in new if span.name in ("dispatch", "combine"))
        self._steps.append((sum(span.end - span.start for span in new if span.name == "step"), moving_s))
        step_s, moving_s = (sum(part) for part in zip(*self._steps, strict=True))
        return self._num_tokens * len(self._steps) / step_s, moving_s / step_s
