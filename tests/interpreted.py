"""The CUDA backend on a machine without a GPU: kernels run in Triton's interpreter, on shared memory.

Launches, plans, words, consent and failures are those of the backend. Streams and events do nothing, because a launch
is complete when it returns. Ranks must be processes: the interpreter is not thread-safe.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any
from unittest import mock

import numpy as np
import torch

from crossdock import Buffer, Connection, Spec, connect
from crossdock.arena import Arena, Control
from crossdock.backends.base import LaunchOptions
from crossdock.transport import shm


class _Nothing:
    """A stream, or an event: all that was issued is done."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    cuda_stream = 0

    def query(self) -> bool:
        return True

    def synchronize(self, *_: object) -> None:
        pass

    record = wait = wait_stream = wait_event = synchronize


_NUM_SMS = 2
"""Of the GPU that ranks seem to share."""


def make_buffer(group: Any, spec: Spec, *, is_fused: bool = True, own_sms: int | None = None, **options: Any) -> Buffer:
    """A Buffer of a process of ``tests.world``, on the CUDA backend. Collective.

    Args:
        is_fused: whether calls of few tokens are; all of a test are few.
        own_sms: those of a GPU that each rank seems to have for itself; None: ranks share one.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    without_a_gpu()
    patch_language_once()
    launch_options = LaunchOptions(
        **{name: options.pop(name) for name in ("expand", "num_sms", "mover") if name in options}
    )
    from crossdock.backends.cuda import config

    few = mock.patch.object(config, "_FUSED_PICKS", config._FUSED_PICKS if is_fused else 0)
    sms = mock.patch.object(torch.cuda, "get_device_properties", return_value=device_with(own_sms or _NUM_SMS))
    with few, sms, connecting(launch_options, warms_up=options.pop("warms_up", False), is_alone=own_sms is not None):
        return Buffer(group, spec, **options)


def make_connection(group: Any, num_bytes: int, **options: Any) -> Connection:
    """A Connection of a process of ``tests.world``, whose Buffers are on the CUDA backend. Collective."""
    os.environ["TRITON_INTERPRET"] = "1"
    without_a_gpu()
    patch_language_once()
    with connecting(LaunchOptions()):
        return Connection(group, num_bytes, **options)


def connecting(launch_options: LaunchOptions, *, warms_up: bool = False, is_alone: bool = False) -> Any:
    """While connections of processes are on the CUDA backend, over shared memory.

    Args:
        warms_up: whether a Buffer does every kind of call on no rows first. There is nothing to compile here, and it
            takes six times as long as a call.
        is_alone: whether each rank seems to have a GPU of its own.
    """

    def connect(
        members: Any, control: Any, num_bytes: int, _device: Any, *, number: int, timeout_s: float, **_: object
    ) -> connect.Connected:
        from crossdock.transport.device import DeviceTransport

        hosts: list[Any] = []

        def map_segments(num_bytes: int) -> list[torch.Tensor]:
            name = f"crossdock-test-{number:016x}-{len(hosts)}"
            hosts.append(shm.connect(members, control, num_bytes, name=name))
            mapped = hosts[-1].segments.side_by_side()
            return [mapped.segment(rank, num_bytes) for rank in range(members.size)]

        def close() -> None:
            for host in hosts:
                host.close()

        transport = DeviceTransport(
            map_segments(num_bytes),
            control,
            map_segments=map_segments,
            rank=members.rank,
            ranks_here=1 if is_alone else members.size,
            is_alive=hosts[0].is_alive,
            close=close,
        )
        return parts_on(transport, control, launch_options, timeout_s=timeout_s, warms_up=warms_up)

    return mock.patch("crossdock.connection.connect", connect)


def parts_on(
    transport: Any,
    control: Control,
    launch_options: LaunchOptions,
    *,
    timeout_s: float,
    arena: Arena | None = None,
    warms_up: bool = True,
) -> connect.Connected:
    """The CUDA backend over memory that need not be a GPU's.

    Args:
        arena: in place of a Buffer's own.
    """
    from crossdock.backends.cuda.calls import CudaBackend, CudaCalls

    calls = CudaCalls(transport, control, timeout_s=timeout_s)

    def lay(of_buffer: Arena, _: LaunchOptions, *, buffer_id: int) -> Any:
        warm_up = CudaBackend.warm_up if warms_up else (lambda _: None)
        with mock.patch.object(CudaBackend, "warm_up", warm_up):
            return calls.lay(arena or of_buffer, launch_options, buffer_id=buffer_id)

    return connect.Connected(transport=transport, consent=calls.consent, lay=lay)


@functools.cache
def patch_language_once() -> None:
    """Takes out what the interpreter does over and over, at every operation: more than half of its time.

    And it leaves the constants of groups wrapped, which its numbers (Python's) cannot be divided by.
    """
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages_of(fn: Any) -> list[Any]:
        return [value for value in fn.__globals__.values() if value is language or value is language.core]

    def patch_what_is_not(fn: Any) -> Any:
        """Looking through the whole language, at every call of a function in a kernel too, finds nothing but once."""
        is_patched = not any(language.core.is_builtin(module.load) for module in languages_of(fn))
        return interpreter._LangPatchScope() if is_patched else patch(fn)

    interpreter._patch_lang = patch_what_is_not
    convert = interpreter._implicit_cvt

    def convert_unwrapped(arg: Any) -> Any:
        return arg.value if isinstance(arg, language.constexpr) else convert(arg)

    interpreter._implicit_cvt = convert_unwrapped
    dtype_of = functools.cache(interpreter._get_np_dtype)  # which makes a table of all of them anew
    addresses = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: addresses if kind.scalar.is_ptr() else dtype_of(kind.scalar)
    language.core.tensor.__init__ = _init_tensor
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _init_tensor(tensor: Any, handle: Any, kind: Any) -> None:
    """As Triton's own, with a shape's constants made once."""
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.numel, tensor.shape = _constants_of(tuple(kind.shape) if kind.is_block() else ())


@functools.cache
def _constants_of(shape: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
    from triton.language import constexpr

    return constexpr(math.prod(shape)), tuple(map(constexpr, shape))


def _check_overflow(_: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """As Triton's own, which makes ten operations of the interpreter of it."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](
        lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
    )
    fits = (kind.get_int_min_value() <= exact) & (exact <= kind.get_int_max_value())
    assert fits.all(), f"{kind} overflow detected for operation {operation.__name__}"


def without_a_gpu() -> None:
    """torch.cuda as the backend uses it, for a machine that has none; in a process that is made for that."""
    if isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _Nothing):
        return
    from crossdock.backends.cuda import stream

    stream._current_stream = lambda _: 0  # a torch for CUDA asks the driver, which is not there
    nothing = _Nothing()
    torch.cuda.Stream = torch.cuda.Event = _Nothing
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *_: nothing
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.memory_snapshot = list
    torch.cuda.get_device_properties = lambda _: device_with(_NUM_SMS)
    for name in ("empty", "zeros"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def device_with(num_sms: int) -> Any:
    """What is asked of a device's properties."""
    return mock.Mock(multi_processor_count=num_sms, major=9)


def _unpinned(make: Any) -> Any:
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*args, **options)

    return made
