"""Compiles every kernel launch of the CUDA backend without a GPU, for tests of the generated code.

A buffer's warm-up goes through all launches. Here each launch is compiled instead of run, with the types, alignments
and constants of its arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from crossdock import Buffer, Spec, ThreadGroup, Topology, connect
from crossdock.arena import Arena
from crossdock.backends.base import LaunchOptions
from tests.interpreted import parts_on, without_a_gpu

CUDA = GPUTarget("cuda", 90, 32)
AMD = GPUTarget("hip", "gfx942", 64)

_POINTERS = {
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.float32: "*fp32",
    torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched, and its code."""

    name: str
    constants: dict[str, Any]
    code: str
    """PTX, or amdgcn."""
    options: dict[str, Any]
    is_ahead: bool
    """Whether it was to be compiled before anything of its kind was launched."""


def compile_launches(
    spec: Spec, num_ranks: int, target: GPUTarget, *, only: Container[str] | None = None, **launch_options: Any
) -> list[Launch]:
    """Every different launch of a rank's buffer, or those of kernels of some names."""
    from crossdock.backends.cuda import calls as cuda
    from crossdock.transport.device import DeviceTransport

    without_a_gpu()
    arena = Arena(spec, Topology(num_ranks=num_ranks))
    segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    transport = DeviceTransport(
        [segment] * num_ranks, arena, rank=0, ranks_here=num_ranks, is_alive=lambda _: True, close=lambda: None
    )
    launches: dict[object, Launch] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if only is not None and kernel.fn.__name__ not in only:
            return
        signature, constants, attributes, compile_options = _specialized(kernel, args, options)
        key = (kernel.fn.__name__, *map(str, (signature, constants, attributes, compile_options)))
        if key not in launches:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=target, options=compile_options)
            code = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
            launches[key] = Launch(kernel.fn.__name__, constants, code, compile_options, is_ahead=warmup)

    with _driver_for(target), mock.patch.object(JITFunction, "run", run):
        cuda.connect(transport, arena, LaunchOptions(**launch_options), buffer_id=1, timeout_s=1)
    return list(launches.values())


@contextlib.contextmanager
def lone_buffer(spec: Spec, **launch_options: Any) -> Iterator[Buffer]:
    """A Buffer of one rank whose launches do nothing, but for a check: a kernel is only launched by a handle as what it
    was compiled as.

    For a process of its own.
    """
    from crossdock.transport.device import DeviceTransport

    without_a_gpu()

    def connect(members: Any, arena: Arena, *_: Any, number: int, timeout_s: float) -> connect.Connected:
        segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
        transport = DeviceTransport([segment], arena, rank=0, ranks_here=1, is_alive=lambda _: True, close=lambda: None)
        return parts_on(transport, arena, LaunchOptions(**launch_options), number=number, timeout_s=timeout_s)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> _Handle:
        return _Handle(kernel, _specialized(kernel, args, options)[:3])

    kernels = mock.patch.object(JITFunction, "run", run)
    nothing = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what no kernel writes is looked at
    with kernels, nothing, mock.patch("crossdock.connection.connect", connect):
        yield Buffer(ThreadGroup.world(1)[0], spec)


@dataclass(frozen=True)
class _Handle:
    """Of a compiled kernel."""

    kernel: JITFunction
    compiled_as: tuple[Any, ...]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, stream: int) -> None:
            if (launched_as := _specialized(self.kernel, args, {}, self.compiled_as[0])[:3]) != self.compiled_as:
                raise AssertionError(f"{self.kernel.fn.__name__}: {launched_as} by what is {self.compiled_as}")

        return launch


def _specialized(
    kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], types: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """As Triton would see the arguments: pointers and whole numbers that are multiples of 16 are known to be.

    Args:
        types: of what takes addresses in place of tensors, those of its parameters.
    """
    names = [param.name for param in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name], size = _POINTERS[value.dtype], value.data_ptr()
        elif types is not None and types[param.name].startswith("*"):
            signature[param.name], size = types[param.name], value
        else:
            signature[param.name], size = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
        if size % 16 == 0 and not param.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


@contextlib.contextmanager
def _driver_for(target: GPUTarget) -> Iterator[None]:
    """Library functions ask the active driver what they are compiled for."""
    from triton.runtime import driver

    fake = mock.Mock()
    fake.get_current_target.return_value = target
    with mock.patch.object(type(driver), "active", fake):
        yield
