"""A run as a value: the command line's configuration, and the job of the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.layout import Compact, Expanded, Layout, Padded
from crossdock.plan import local_counts
from crossdock.routing import hot_expert_load, recorded_load, uniform_load, zipf_load
from crossdock.spec import Spec, Topology
from crossdock.wire import Bf16, Fp8, Fp16, Fp32, Opaque, Wire

WIRES: dict[str, Wire] = {
    "bf16": Bf16(),
    "fp16": Fp16(),
    "fp32": Fp32(),
    "fp8": Fp8(),
    "mxfp8": Opaque(dtype=torch.float8_e4m3fn, block=32, scale_dtype=torch.uint8),
    "nvfp4": Opaque(values_per_element=2, block=16, scale_dtype=torch.float8_e4m3fn),
}
"""The last two are bits to the library: outputs come home in bf16."""
LAYOUTS: dict[str, Layout] = {
    "compact": Compact(),
    "expanded": Expanded(),
    "staged": Expanded(staged=True),
    "padded": Padded(),
}
LOADS = {"uniform": uniform_load, "zipf": zipf_load, "hot": hot_expert_load}
_FOR_CUDA = ("num_sms", "expand", "mover", "mps_percentage", "sweep_sms")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run, in the command line's terms; ``tokens`` are tokens per rank."""

    ranks: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    wire: str
    layout: str
    load: str
    seed: int
    repeats: int
    baseline: str
    device: str = "cpu"
    reduce: str = "token"
    alignment: int = 1
    num_sms: int | None = None
    expand: str | None = None
    mover: str | None = None
    mps_percentage: float | None = None
    sweep_sms: tuple[int, ...] = ()

    def __str__(self) -> str:
        aligned = f" (alignment {self.alignment})" if self.alignment > 1 else ""
        return (
            f"{self.ranks} ranks × {self.tokens} tokens, hidden {self.hidden}, top-{self.topk} of {self.experts} "
            f"experts, {self.wire}, {self.layout}{aligned}, reduce={self.reduce}, {self.load} load"
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input of every rank's program."""

    spec: Spec
    topk_idx: npt.NDArray[np.int64]
    """[P * T, K], the picks of all ranks' tokens, in the order of ranks."""
    seed: int
    repeats: int
    keeps_buffers: bool
    """Whether the baseline reuses its buffers between calls."""
    buffer_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``Buffer`` besides group, spec and device."""
    sweep_sms: tuple[int, ...] = ()


def make_job(config: Config) -> Job:
    """The job of a run: the picks of all tokens, and the Spec.

    Layouts with a row per pick get the smallest capacity for these picks, not the worst case of any picks.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    _check(config)
    layout = LAYOUTS[config.layout]
    spec = Spec(
        num_experts=config.experts,
        num_topk=config.topk,
        hidden=config.hidden,
        max_tokens=config.tokens,
        wire=WIRES[config.wire],
        layout=replace(layout, alignment=config.alignment) if isinstance(layout, Expanded) else layout,
        reduce=cast("Literal['token', 'rank']", config.reduce),
    )
    topology = Topology(num_ranks=config.ranks)
    topk_idx = draw_load(config)
    spec = with_room_for(topk_idx, spec, topology)
    spec.capacity(config.ranks)
    options = {"num_sms": config.num_sms, "expand": config.expand, "mover": config.mover}
    return Job(
        spec=spec,
        topk_idx=topk_idx.numpy(),
        seed=config.seed,
        repeats=config.repeats,
        keeps_buffers=config.baseline == "kept",
        buffer_options={name: value for name, value in options.items() if value is not None},
        sweep_sms=config.sweep_sms,
    )


def with_room_for(topk_idx: Tensor, spec: Spec, topology: Topology) -> Spec:
    """The Spec with the smallest capacity for these picks of all ranks, int64 [P * T, K], if it has a row per pick."""
    if not spec.layout.per_pick:
        return spec
    num_local, alignment = spec.num_local_experts(topology.num_ranks), getattr(spec.layout, "alignment", 1)
    per_expert = local_counts(spec, topology, topk_idx)[: spec.num_experts].view(-1, num_local)
    if isinstance(spec.layout, Padded):
        needed = int(per_expert.max())
    else:
        needed = int((-(-per_expert // alignment) * alignment).sum(1).max())
    return replace(spec, layout=replace(spec.layout, capacity=max(1, needed)))


def draw_load(config: Config) -> Tensor:
    """The picks of all ranks' tokens, int64 [P * T, K]; the same for the same seed.

    Raises:
        ConfigError: a file of recorded picks cannot be opened, or does not fit the configuration.
    """
    num_tokens = config.ranks * config.tokens
    if draw := LOADS.get(config.load):
        generator = torch.Generator().manual_seed(config.seed)
        return draw(num_tokens, config.experts, num_topk=config.topk, generator=generator)
    try:
        return recorded_load(config.load, num_tokens, num_experts=config.experts, num_topk=config.topk)
    except OSError as error:
        raise ConfigError(
            f"load={config.load} cannot be opened ({error.strerror}); pass {', '.join(LOADS)}, or an .npy file that "
            f"crossdock.record_load wrote"
        ) from error


def _check(config: Config) -> None:
    if config.repeats < 1:
        raise ConfigError(f"repeats={config.repeats}; pass a positive number")
    if config.alignment != 1 and not isinstance(LAYOUTS[config.layout], Expanded):
        raise ConfigError(f"alignment={config.alignment} with layout={config.layout}; only expanded rows are aligned")
    if config.device == "cuda":
        if config.baseline == "kept":
            raise ConfigError("baseline=kept on CUDA, whose allocator keeps memory by itself; leave it out")
        return
    for name in _FOR_CUDA:
        if (value := getattr(config, name)) not in (None, ()):
            raise ConfigError(f"{name}={value} is for GPUs, and this runs on CPUs; leave it out")
