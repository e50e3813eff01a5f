"""Gradients of experts that several ranks hold a copy of.

Letters: E logical experts, L experts of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from crossdock.errors import ConfigError
from crossdock.nn.experts import local
from crossdock.nn.placement import Placement
from crossdock.transport.base import Group, group_of


@torch.no_grad()
def sum_replica_gradients(
    parameters: Iterable[Tensor],
    placement: Placement,
    group: dist.ProcessGroup | DeviceMesh | Group | None,
) -> None:
    """Gives every copy of an expert the sum of all copies' gradients, in place. Collective.

    To be called between backward and the optimizer's step: each copy has seen its own share of the tokens. All copies
    get the same bits, so copies that began as equals and have the same optimizer stay equals. Sums are float32 or
    wider. Only gradients of experts with more than one copy travel: one all-reduce per parameter through a process
    group, of as many matrices as there are such experts. A missing gradient counts as zero, and is made.

    Args:
        parameters: of this rank's experts, ``[L, ...]`` each, or DTensors of which this rank has ``[L, ...]``; those
            that want no gradient are left out. In the same order on all ranks.
        placement: of the layer.
        group: the buffer's, ``buffer.group``.

    Raises:
        ConfigError: a parameter does not hold one matrix per physical expert of this rank.
    """
    members = group_of(group)
    num_local = placement.num_physical // members.size
    here = placement.physical_to_logical[members.rank * num_local :][:num_local]  # [L]
    is_copied = placement.num_replicas > 1  # [E]
    rows = is_copied[here].nonzero().squeeze(1)
    places = (is_copied.cumsum(0) - 1)[here[rows]]  # of the experts with copies, which each row is
    num_copied = int(is_copied.sum())
    for parameter in parameters:
        if not (parameter.requires_grad and num_copied):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = local(parameter.grad)
        if grad.shape[0] != num_local:
            raise ConfigError(
                f"a parameter has {grad.shape[0]} experts on rank {members.rank}, the placement gives each of "
                f"{members.size} ranks {num_local}; pass the parameters of the layer's experts"
            )
        dtype = torch.promote_types(grad.dtype, torch.float32)
        its_rows, its_places = rows.to(grad.device), places.to(grad.device)
        own = grad.new_zeros(num_copied, *grad.shape[1:], dtype=dtype)
        own.index_add_(0, its_places, grad[its_rows].to(dtype))
        grad[its_rows] = _summed(own, group)[its_places].to(grad.dtype)


def _summed(own: Tensor, group: dist.ProcessGroup | DeviceMesh | Group | None) -> Tensor:
    """The ranks' tensors added up; of a group that gathers values, in the order of ranks."""
    if isinstance(group, Group):
        first, *others = group.all_gather(own.cpu())  # ranks' devices may have other numbers here
        total = first.clone()
        for other in others:
            total += other
        return total.to(own.device)
    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    if own.is_cuda and "nccl" not in str(dist.get_backend_config(process_group)):  # as where ranks share a GPU
        on_host = own.cpu()
        dist.all_reduce(on_host, group=process_group)
        return own.copy_(on_host)
    dist.all_reduce(own, group=process_group)
    return own
