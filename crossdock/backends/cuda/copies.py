"""Dispatched rows as whole blocks, packed here and copied by the GPU's copy engines (``mover="copy"``).

Letters: T tokens here, P ranks, Q rows sent.
"""

from __future__ import annotations

import torch

from crossdock.backends.base import Batch
from crossdock.backends.cuda.consent import DeviceConsent
from crossdock.backends.cuda.plan import DevicePlan
from crossdock.backends.cuda.sends import SendKinds
from crossdock.consent import Word
from crossdock.scales import as_integers
from crossdock.transport.device import DeviceTransport
from crossdock.wire import Fp8, Quantized


def push_blocks(
    kinds: SendKinds,
    transport: DeviceTransport,
    plan: DevicePlan,
    batch: Batch,
    room: torch.Tensor,
    stream: int,
    consent: DeviceConsent,
) -> None:
    """Packs rows in this rank's sending order, and copies the block of each peer as a whole. The host waits for words.

    Blocks of scales that arrive column-major have gaps there, and so are copied by a kernel of torch's.

    Args:
        room: what kernels keep of the call; stream: the current one.
    """
    arena, rank, num_ranks = kinds.arena, transport.rank, transport.num_ranks
    spec, region, x = arena.spec, arena.region_of_rows(unquantized=batch.unquantized), batch.x
    if not isinstance(x, Quantized) and isinstance(spec.wire, Fp8) and not batch.unquantized:
        x = spec.wire.quantize(x)
    parts = [(x.data, region), (x.scale, "scale")] if isinstance(x, Quantized) else [(x, region)]
    seen = room[:num_ranks].tolist()
    counts = plan.counts[:, spec.num_experts :].cpu()  # [P, P] rows
    if consent.failure() is not None or not bool(counts.any()):
        return
    starts = counts.cumsum(1)[rank] - counts[rank]
    there = (counts.cumsum(0) - counts)[rank]
    num_sent = int(counts[rank].sum())
    for given, name in parts:
        rows = given.contiguous()
        packed = torch.empty(num_sent, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        if plan.num_tokens:
            kinds.bind_pack(rows)(plan.num_tokens, stream, rows, packed, plan.memory, plan.num_tokens)
        for step in range(num_ranks):
            peer = (rank + 1 + step) % num_ranks
            num_rows, first = int(counts[rank, peer]), int(starts[peer])
            if num_rows:
                slot = arena.view(transport.views[peer], name)[Word.of(seen[peer]).slot]
                source, at = packed[first : first + num_rows], int(there[peer])
                if name == "scale":
                    source = as_integers(source)
                    target = as_integers(arena.scales.of_block(slot, slice(at, at + num_rows)))
                else:
                    source, target = source.view(torch.uint8), slot[at : at + num_rows].view(torch.uint8)
                target.copy_(source, non_blocking=True)
