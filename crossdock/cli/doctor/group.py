"""All ranks of a torchrun together: what differs between them, a round trip in every transport, each pair's link."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from crossdock.buffer import Buffer
from crossdock.cli.doctor import links
from crossdock.cli.doctor.facts import Links, RankFacts, RoundTrip
from crossdock.cli.doctor.host import namespaces
from crossdock.connect import cuda_problem
from crossdock.errors import ConfigError, CrossdockError
from crossdock.layout import Compact
from crossdock.spec import Spec
from crossdock.transport.base import ProcessGroup
from crossdock.version import __version__
from crossdock.wire import Fp32

_HIDDEN, _TOKENS = 256, 16
_TIMEOUT_S = 60.0


def check_together(on_progress: Callable[[str], None]) -> tuple[list[RankFacts], list[str], list[RoundTrip]]:
    """Facts by rank, what ranks disagree in, and a round trip for each transport. The same on all ranks. Collective.

    Raises:
        ConfigError: this process was not started by torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "--group wants ranks, and RANK and WORLD_SIZE are not set here; start them: "
            "torchrun --nproc-per-node 2 -m crossdock doctor --group"
        )
    device = _take_gpu()
    with _process_group(device) as backend:
        group = ProcessGroup(None)
        everybody = group.all_gather(_facts_of(group.rank, device))
        on_gpus = all(group.all_gather(device.type == "cuda"))
        has_kernels = all(group.all_gather(cuda_problem(device) is None))
        trips = [_try(on_progress, "gloo", lambda: _messages("gloo", torch.device("cpu")))]
        if on_gpus and "nccl" in backend:
            trips.append(_try(on_progress, "nccl", lambda: _messages("nccl", device)))
        trips.append(_try(on_progress, "shared memory", _shared_memory))
        if on_gpus and has_kernels:
            trips.append(_try(on_progress, "kernels on GPUs", lambda: _kernels(device)))
    return everybody, disagreements(everybody), trips


def disagreements(everybody: list[RankFacts]) -> list[str]:
    """What must be the same on all ranks and is not.

    >>> def rank(number, torch):
    ...     return RankFacts(rank=number, host="a", device="cpu", versions={"torch": torch}, namespaces={})
    >>> disagreements([rank(0, "2.13.0"), rank(1, "2.12.0")])
    ['torch is 2.13.0 on rank 0 and 2.12.0 on rank 1; install one everywhere']
    """
    first = everybody[0]
    return [
        f"{name} is {version} on rank 0 and {facts.versions.get(name)} on rank {facts.rank}; install one everywhere"
        for name, version in first.versions.items()
        for facts in everybody
        if facts.versions.get(name) != version
    ]


def _facts_of(rank: int, device: torch.device) -> RankFacts:
    of_device = str(device)
    if device.type == "cuda":
        of_device = f"{device}, {torch.cuda.get_device_properties(device).name}"
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        device=of_device,
        versions={"python": platform.python_version(), "torch": torch.__version__, "crossdock": __version__},
        namespaces=namespaces(),
    )


def _take_gpu() -> torch.device:
    """This rank's GPU, made the current one; the CPU where there is none."""
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(device: torch.device) -> Iterator[str]:
    """The default group on gloo, with NCCL for CUDA tensors where each rank has a GPU of its own."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own_gpu = device.type == "cuda" and local_size <= torch.cuda.device_count() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT_S))
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def _try(on_progress: Callable[[str], None], transport: str, run: Callable[[], Links]) -> RoundTrip:
    """What a transport gives, or why it does not; the same on all ranks, of which the lowest that failed is quoted."""
    on_progress(transport)
    problem, found = None, None
    try:
        found = run()
    except (CrossdockError, RuntimeError) as error:  # gloo and NCCL raise RuntimeError
        problem = str(error).partition("\n")[0]
    problems = ProcessGroup(None).all_gather(problem)
    first = next((f"rank {rank}: {said}" for rank, said in enumerate(problems) if said is not None), None)
    return RoundTrip(transport=transport, problem=first, links=found if first is None else None)


def _messages(what: str, device: torch.device) -> Links:
    """Each rank sends its number to each, and gets all numbers."""
    size = dist.get_world_size()
    sent = torch.full((size,), dist.get_rank(), device=device)
    got = list(torch.empty(size, dtype=sent.dtype, device=device).chunk(size))
    dist.all_gather(got, sent[:1].contiguous())
    _expect(torch.cat(got).cpu(), torch.arange(size))
    return links.by_messages(what, device)


def _shared_memory() -> Links:
    _send_rows(torch.device("cpu"))
    return links.by_shared_memory()


def _kernels(device: torch.device) -> Links:
    _send_rows(device)
    return links.by_kernels(device)


def _send_rows(device: torch.device) -> None:
    """Every token goes to every rank and back, through a Buffer; their sum is P times the token, in float32 exactly."""
    rank, size = dist.get_rank(), dist.get_world_size()
    spec = Spec(
        num_experts=size,
        num_topk=size,
        hidden=_HIDDEN,
        max_tokens=_TOKENS,
        wire=Fp32(),
        layout=Compact(),
        reduce="rank",
    )
    x = torch.arange(_TOKENS * _HIDDEN, device=device).view(_TOKENS, _HIDDEN).float() + rank
    picks = torch.arange(size, device=device).expand(_TOKENS, size).contiguous()
    with Buffer(None, spec, device=device, timeout_s=_TIMEOUT_S) as buffer:
        recv = buffer.dispatch(x, picks)
        assert isinstance(recv.x, torch.Tensor)  # the wire is float32
        out = buffer.combine(recv.x, recv.plan)
        _expect(out.cpu(), (size * x).cpu())


def _expect(got: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(got, wanted):
        num_wrong = int((got != wanted).sum())
        raise CrossdockError(
            f"{num_wrong} of {wanted.numel()} values came back changed; this is a bug, or a broken link"
        )


def say(transport: str) -> None:
    """Says on rank 0's stderr what is tried."""
    if os.environ.get("RANK") == "0":
        print(f"crossdock doctor: {transport}", file=sys.stderr)
