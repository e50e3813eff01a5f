"""From a layer that holds all experts to one that holds this rank's: `torch`'s parallelize_module.

Letters: E experts, L experts of a rank.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from crossdock.buffer import Buffer
from crossdock.errors import ConfigError
from crossdock.nn.layer import ExpertParallel


class ShardExperts(ParallelStyle):
    """Splits a layer's experts over a mesh and hands it the buffer to reach them with; in place. Collective.

    Every parameter of ``layer.experts``, ``[E, ...]``, becomes a DTensor of which this rank keeps ``[L, ...]``
    (``Shard(0)``); the values are those of the mesh's first rank, as everywhere in ``parallelize_module``. DTensors,
    because they say what they are part of: ``torch.distributed.checkpoint`` saves the whole stack and loads it on
    another number of ranks, and ``clip_grad_norm_`` sums the norm over the mesh, where with plain parameters each rank
    would clip by a norm of its own and the gates would drift apart. It takes plain tensors and DTensors only apart:
    the gate's parameters stay as they are, for data parallelism to shard or replicate (torchtitan's own
    ``clip_grad_norm_`` makes the two groups by the mesh's name, "ep").

    Args:
        buffer: borrowed by the layer; made for the mesh, with the layer's number of physical experts.

    Raises:
        ConfigError: when applied, if module, mesh and buffer do not fit together.

    Example::

        mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("ep",))
        buffer = crossdock.Buffer(mesh, spec)
        for block in model.blocks:
            parallelize_module(block, mesh, {"moe": ShardExperts(buffer)})
    """

    def __init__(self, buffer: Buffer) -> None:
        super().__init__()
        self.buffer = buffer

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, ExpertParallel):
            raise ConfigError(
                f"ShardExperts is for crossdock.nn.ExpertParallel, and was applied to {type(module).__name__}; name "
                f"that layer in the plan"
            )
        num_ranks = self.buffer.topology.num_ranks
        if device_mesh.ndim != 1 or device_mesh.size() != num_ranks:
            raise ConfigError(
                f"the mesh has shape {tuple(device_mesh.shape)}, the buffer {num_ranks} ranks; pass the 1-D mesh that "
                f"the buffer was made for"
            )
        coordinate = device_mesh.get_coordinate()
        if coordinate is None or coordinate[0] != self.buffer.rank:  # a mesh need not name its ranks in rising order
            place = "not in the mesh" if coordinate is None else f"number {coordinate[0]} of the mesh"
            raise ConfigError(
                f"this process is {place} and rank {self.buffer.rank} of the buffer; pass the mesh that the buffer was "
                f"made for, with its ranks in rising order"
            )
        for name, parameter in module.experts.named_parameters():
            if parameter.shape[:1] != (module.num_experts,):
                raise ConfigError(
                    f"experts.{name} has shape {list(parameter.shape)}; to be sharded it must hold all "
                    f"{module.num_experts} experts, one per row"
                )
        for owner in module.experts.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                shard = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
                owner.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        module.buffer = self.buffer
        return module
