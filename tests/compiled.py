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
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from crossdock import Buffer, Spec, ThreadGroup, Topology, connect
from crossdock.arena import Arena
from crossdock.backends.base import LaunchOptions
from tests.interpreted import parts_on, without_a_gpu

CUDA = GPUTarget("cuda", 90, 32)
AMD = GPUTarget("hip", "gfx942", 64)


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
    spec: Spec,
    num_ranks: int,
    target: GPUTarget,
    *,
    only: Container[str] | None = None,
    then: Callable[[Any], None] = lambda _: None,
    **launch_options: Any,
) -> list[Launch]:
    """Every different launch of a rank's buffer, or those of kernels of some names.

    Args:
        then: what to do with its backend, for launches that its making does not have.
    """
    from crossdock.backends.cuda.calls import CudaCalls
    from crossdock.transport.device import DeviceTransport

    without_a_gpu()
    arena = Arena(spec, Topology(num_ranks=num_ranks))
    segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    words = arena.control_words
    transport = DeviceTransport(
        [segment] * num_ranks, words, map_segments=lambda _: [segment] * num_ranks, rank=0, ranks_here=num_ranks,
        is_alive=lambda _: True, close=lambda: None,
    )  # fmt: skip
    launches: dict[object, Launch] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if only is not None and kernel.fn.__name__ not in only:
            return
        special = Special.of(kernel, args, options, target)
        if (key := special.key) not in launches:
            source = ASTSource(kernel, special.signature, special.constants, special.attributes)
            compiled = triton.compile(source, target=target, options=special.options)
            code = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
            launches[key] = Launch(kernel.fn.__name__, special.named, code, special.options, is_ahead=warmup)

    with _driver_for(target), mock.patch.object(JITFunction, "run", run):
        calls = CudaCalls(transport, words, timeout_s=1)
        then(calls.lay(arena, LaunchOptions(**launch_options), buffer_id=1))
    return list(launches.values())


class Watch:
    """What a buffer whose launches do nothing has launched, and what it has had to compile for that."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        """Kernels, in order."""
        self.compiled: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def lone_buffer(spec: Spec, num_ranks: int = 1, **launch_options: Any) -> Iterator[tuple[Buffer, Watch]]:
    """A Buffer whose launches do nothing, but for a check: a kernel is only launched by a handle as what it was
    compiled as. Of more ranks than one, it is the only one that there is.

    For a process of its own.
    """
    from crossdock.transport.device import DeviceTransport

    without_a_gpu()
    watch = Watch()

    def connect(*_: Any, timeout_s: float, **__: Any) -> connect.Connected:
        arena = Arena(spec, Topology(num_ranks=num_ranks))
        segment = torch.zeros(arena.num_bytes, dtype=torch.uint8)
        words = arena.control_words
        transport = DeviceTransport(
            [segment] * num_ranks, words, map_segments=lambda _: [segment] * num_ranks, rank=0, ranks_here=1,
            is_alive=lambda _: True, close=lambda: None,
        )  # fmt: skip
        return parts_on(transport, words, LaunchOptions(**launch_options), timeout_s=timeout_s, arena=arena)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> _Handle:
        special = Special.of(kernel, args, options, CUDA)
        watch.compiled.add(special.key)
        if not warmup:
            watch.launched.append(kernel.fn.__name__)
        return _Handle(kernel, special, watch)

    kernels = mock.patch.object(JITFunction, "run", run)
    nothing = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what no kernel writes is looked at
    stamped = mock.patch("crossdock.backends.cuda.plan.HostStamp.query", return_value=True)
    with kernels, nothing, stamped, _driver_for(CUDA), mock.patch("crossdock.connection.connect", connect):
        yield Buffer(ThreadGroup.world(1)[0], spec), watch


@dataclass(frozen=True)
class _Handle:
    """Of a compiled kernel."""

    kernel: JITFunction
    special: Special
    watch: Watch
    function = 1
    packed_metadata = ()

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *args: Any) -> None:
        """Launches it, without hooks, as what it was compiled as."""
        assert (y, z, function, metadata, *args[:3]) == (1, 1, 1, (), None, None, None)
        assert x > 0
        self.watch.launched.append(self.kernel.fn.__name__)
        assert len(args) == 3 + len(self.kernel.params)
        for given, param, types, known in zip(
            args[3:], self.kernel.params, self.special.types, self.special.known, strict=True
        ):
            _check(f"{self.kernel.fn.__name__}: {param.name}", given, types, known, is_plain=param.do_not_specialize)


def _check(name: str, given: Any, types: Any, known: Any, *, is_plain: bool) -> None:
    """An argument is as it was compiled: a constant of the same value, a multiple of 16 where that was made use of."""
    if isinstance(types, tuple):
        assert isinstance(given, tuple), name
        for each in zip(given, types, known, strict=True):
            _check(name, *each, is_plain=is_plain)
    elif types == "constexpr":
        assert _plain(given) == _plain(known), f"{name}: {given} by what is {known}"
    else:
        assert isinstance(given, int), name
        assert types != "i32" or -(2**31) <= given < 2**31, f"{name} = {given} is no i32"
        assert known != "D" or given % 16 == 0, f"{name} = {given} by what is for multiples of 16"
        assert is_plain or types.startswith("*") or given != 1, f"{name} = 1 is a constant elsewhere"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, triton.language.constexpr) else value


@dataclass(frozen=True)
class Special:
    """What Triton compiles a kernel for, given its arguments."""

    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    types: tuple[Any, ...]
    known: tuple[Any, ...]
    named: dict[str, Any]
    """Constants by name; those of groups behind a dot."""

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Special:
        """By Triton's own rules."""
        backend = make_backend(target)
        if target.backend == "hip":  # there is no such option; see ``Launcher.bind``
            options = {name: value for name, value in options.items() if name not in ("maxnreg", "launch_pdl")}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, special, more = bind(*args, **options)
        made, signature, constants, attributes = kernel._pack_args(backend, dict(more), bound, special, more)
        types, known = (tuple(each[i] for each in special) for i in range(2))
        named = dict(_named(bound, signature))
        return cls(kernel.fn.__name__, signature, constants, attributes, made.__dict__, types, known, named)

    @property
    def key(self) -> tuple[str, ...]:
        """Two that are equal are the same code."""
        given = {name: self.options[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion", "launch_pdl")
                 if name in self.options}  # fmt: skip
        return (self.name, *map(str, (self.signature, self.constants, self.attributes, given)))


def _named(values: Mapping[str, Any], types: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if hasattr(value, "_asdict"):
            yield from _named(value._asdict(), types[name]._asdict(), f"{group}{name}.")
        elif types[name] == "constexpr":
            yield group + name, _plain(value)


@contextlib.contextmanager
def _driver_for(target: GPUTarget) -> Iterator[None]:
    """Library functions ask the active driver what they are compiled for."""
    from triton.runtime import driver

    fake = mock.Mock()
    fake.get_current_target.return_value = target
    with mock.patch.object(type(driver), "active", fake):
        yield
