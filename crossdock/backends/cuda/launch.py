"""The only place with ``[grid]``: a rank's stream, what its kernels share, and how one is launched.

Letters: P ranks, W counts, B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton import AsyncCompileMode, JITFunction

from crossdock._env import num_cores
from crossdock.arena import Arena
from crossdock.backends.cuda.config import LaunchConfig, counts_at_once
from crossdock.backends.cuda.kernels import calls
from crossdock.backends.cuda.kernels.sync import ABORTED, FAILURE_WORDS, OK
from crossdock.layout import Expanded, Padded
from crossdock.transport.device import DeviceTransport

try:
    from torch._C import _cuda_getCurrentRawStream as _current_stream
except ImportError:  # torch without CUDA

    def _current_stream(device: int) -> int:
        handle: int = torch.cuda.current_stream(device).cuda_stream
        return handle


_POLL_S = 0.3e-6
"""A poll of words takes at least that long, on an H200 with 2 to 8 ranks on it."""


@dataclass(eq=False)
class Prepared:
    """A kernel with all that is the same in many launches of it."""

    kernel: Any
    grid: tuple[int, ...]
    fixed: tuple[Any, ...]
    """The kernel's first arguments."""
    sizes: dict[str, Any]
    """Its last ones, constants."""
    options: dict[str, Any]
    addresses: Sequence[int] = ()
    """The first arguments with addresses for tensors."""
    runner: Callable[..., None] | None = None
    """Launches what is compiled; None as long as it is not."""

    @property
    def is_compiled(self) -> bool:
        """Whether it takes addresses in place of tensors."""
        return self.runner is not None


class Launcher:
    """Launches a rank's kernels on ``stream``, in order; has what they share: words, state, the arena's geometry."""

    def __init__(self, arena: Arena, transport: DeviceTransport, config: LaunchConfig, *, timeout_s: float) -> None:
        self.config = config
        """Of the call under way."""
        self.arena = arena
        self.device = transport.device
        self._device_index = self.device.index or 0
        self.stream: torch.cuda.Stream = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        spec = arena.spec
        self.rank, self.num_ranks = transport.rank, transport.num_ranks
        self.num_local = spec.num_local_experts(self.num_ranks)
        self.segments = transport.segments
        self.timeout_s = timeout_s
        self.max_polls = max(1, int(timeout_s / _POLL_S))
        num_state = calls.STATE_WORDS.value
        self.state = torch.zeros(num_state + self.num_ranks, dtype=torch.int64, device=self.device)
        self.waits_ns = self.state[num_state:]
        """``[P]``, how long kernels have waited for each rank."""
        self.failure = torch.zeros(FAILURE_WORDS.value, dtype=torch.int64, device=self.device)
        self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.host_failure = torch.zeros(FAILURE_WORDS.value, dtype=torch.int64, pin_memory=True)
        """The failure of the call that has failed, in host memory; zero while none has."""
        call_words = -(-(self.num_ranks + calls.CALL_WORDS.value) // 2) * 2  # whole multiples of 16 bytes
        self.calls = torch.zeros(spec.num_slots, call_words, dtype=torch.int64, device=self.device)
        self._calls = self.calls.unbind()
        self._num_calls = 0
        self.call = self._calls[0]
        """What kernels keep of the call under way."""
        self.tokens = torch.zeros(self.num_local, dtype=torch.int64, device=self.device)
        """``[L]``, picks of each local expert in all calls."""
        self.counts = torch.zeros(spec.num_counts(arena.topology), dtype=torch.int64, device=self.device)
        """``[W]``, what the next words of a fresh dispatch tell."""
        self.send_starts = torch.zeros(2 * spec.num_experts, dtype=torch.int32, device=self.device)
        """``[2, B]``, where the blocks begin of the plan that is being made."""
        self._regions = {name: arena.view(transport.segment, name) for name in arena.regions}
        self._slot_size = {name: view.nbytes // view.shape[0] for name, view in self._regions.items()}
        self._blocks = {is_pairs: self._blocks_of(is_pairs=is_pairs) for is_pairs in (False, True)}
        self._handles: dict[Any, Any] = {}
        self._to_compile: dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None
        """Kernels, arguments and options of launches that are only to be compiled."""
        self._entered: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)  # what was zeroed here was so on another stream

    @contextmanager
    def all_void(self) -> Iterator[None]:
        """Calls within are void: their kernels touch no peer's memory, and wait for nobody."""
        with torch.cuda.stream(self.stream):
            self.state[calls.STATUS.value] = ABORTED.value
        yield
        with torch.cuda.stream(self.stream):
            self.state[calls.STATUS.value] = OK.value
        self.stream.synchronize()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Launches within do nothing but have their kernels compiled when it ends, beside one another.

        Ranks share a machine's cores, and each begins with another kernel: what one has compiled, the others
        find in Triton's cache.
        """
        self._to_compile = {}
        yield
        launches, self._to_compile = list(self._to_compile.values()), None
        first = self.rank * len(launches) // self.num_ranks
        with ThreadPoolExecutor(max(1, num_cores() // self.num_ranks)) as pool, AsyncCompileMode(pool):
            for kernel, args, options in launches[first:] + launches[:first]:
                if isinstance(kernel, JITFunction):  # an interpreted one is not
                    kernel.warmup(*args, grid=(1,), **options)

    def enter(self) -> None:
        """What the caller has issued on its current stream comes before what is launched from now on.

        Calls of one kernel go on that stream themselves; behind those before, wherever they were.
        """
        if not self.config.is_fused:
            self._entered.record(torch.cuda.current_stream(self.device))
            self.stream.wait_event(self._entered)
        elif _current_stream(self._device_index) != self.stream.cuda_stream:
            current = torch.cuda.current_stream(self.device)
            if not torch.cuda.is_current_stream_capturing():  # which begins when all is done, and allows no such look
                self._entered.record(self.stream)
                current.wait_event(self._entered)
            self.stream = current

    @contextmanager
    def on_current_stream(self) -> Iterator[None]:
        """Launches within go on the caller's current stream, as torch's own do: they are no part of a call."""
        ours, self.stream = self.stream, torch.cuda.current_stream(self.device)
        try:
            yield
        finally:
            self.stream = ours

    @property
    def streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """Where kernels that this host has issued may run, and the graphs that it has replayed.

        A graph runs where it is replayed: on the current stream, or on one that the caller has ordered before it.
        """
        return torch.cuda.current_stream(self.device), self.stream

    @property
    def is_idle(self) -> bool:
        """Whether all that was issued is done."""
        return all(stream.query() for stream in self.streams)

    def synchronize(self) -> None:
        """Waits for all that was issued."""
        for stream in self.streams:
            stream.synchronize()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the current stream, for kernels to write at once."""
        return self.given(self.state.new_empty(shape, dtype=dtype))

    def given(self, tensor: Tensor) -> Tensor:
        """Memory that torch has just given, on the current stream."""
        if torch.are_deterministic_algorithms_enabled():  # torch may have filled it
            self.enter()
        return tensor

    def dense(self, tensor: Tensor) -> Tensor:
        """The tensor without gaps: itself, or a copy that is ours."""
        if tensor.is_contiguous():
            return tensor
        with torch.cuda.stream(self.stream):
            return tensor.contiguous()

    def view(self, region: str, slot: int) -> Tensor:
        """A slot of a region of this rank's own segment."""
        return self._regions[region][slot]

    def next_call(self) -> Tensor:
        """Room for what kernels keep of the next call; as many calls may be in flight as there are slots."""
        self._num_calls += 1
        self.call = self._calls[self._num_calls % len(self._calls)]
        return self.call

    def use_sms(self, num_sms: int | None, default: LaunchConfig) -> None:
        """Chooses the configuration of the call that comes now."""
        self.config = default
        if num_sms is not None:
            self.config = replace(default, num_sms=min(num_sms, default.visible_sms))

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int,
        given: Any = (),
        enable_fp_fusion: Any = True,
        maxnreg: int | None = None,
        early: Any = False,
        **sizes: Any,
    ) -> Any:
        """Launches a kernel on our stream, once compiled by its handle, without Triton's look at every argument.

        Gives the handle; None where there is none.

        Args:
            early: whether the kernel begins with ``await_kernels_before``, and so may be launched before that.
            given: what else than ``sizes`` a compiler may make use of, and may differ between a buffer's launches of
                the kernel: ``kind_of`` the caller's tensors, strides, names of regions.
        """
        key = (id(kernel), num_warps, *sizes.values(), *given)
        handle = self._handles.get(key)
        if handle is not None:
            handle[(*grid, 1, 1)[:3]](*args, *sizes.values(), stream=self.stream.cuda_stream)
            return handle
        options: dict[str, Any] = sizes | {"num_warps": num_warps}
        options |= {} if enable_fp_fusion else {"enable_fp_fusion": False}
        options |= {} if maxnreg is None else {"maxnreg": maxnreg}
        options |= {"launch_pdl": True} if early and self.config.launches_early else {}
        if self._to_compile is not None:
            self._to_compile[key] = (kernel, args, options)
            return None
        with torch.cuda.stream(self.stream):
            handle = kernel[grid](*args, **options)
        if handle is not None:
            self._handles[key] = handle
        return handle

    def run(self, launch: Prepared, *args: Any) -> None:
        """``launch`` of what has been prepared, with the arguments of a call, between the first and the sizes.

        Compiled kernels are given addresses: about each tensor Triton asks the driver.
        """
        if launch.runner is not None:
            ours, sizes = _addresses(args), launch.sizes.values()
            launch.runner(*launch.addresses, *ours, *sizes, stream=self.stream.cuda_stream)
            return
        handle = self.launch(launch.kernel, launch.grid, *launch.fixed, *args, **launch.options, **launch.sizes)
        if handle is not None:
            launch.addresses = _addresses(launch.fixed)
            launch.runner = handle[(*launch.grid, 1, 1)[:3]]

    def blocks(self, *, is_pairs: bool) -> dict[str, int]:
        """By what rows are sorted where they land, and how segments are aligned."""
        return self._blocks[is_pairs]

    def _blocks_of(self, *, is_pairs: bool) -> dict[str, int]:
        layout, num_experts = self.arena.spec.layout, self.num_local * self.num_ranks
        by_rank = is_pairs or not layout.per_pick
        alignment = layout.alignment if isinstance(layout, Expanded) and not is_pairs else 1
        return {
            "L": self.num_local,
            "N": 1 if by_rank else self.num_local,
            "FIRST": num_experts if by_rank else 0,
            "ALIGNMENT": 0 if isinstance(layout, Padded) and not is_pairs else alignment,
            "AT_ONCE": counts_at_once(self.num_ranks, self.counts.shape[0]),
        }

    def blocks_of_rows(self) -> dict[str, int]:
        """The same, of rows with one pick each."""
        blocks = self.blocks(is_pairs=False)
        return {name: blocks[name] for name in ("L", "ALIGNMENT", "AT_ONCE")}

    def slot_bytes(self, region: str) -> int:
        return self._slot_size[region]


def kind_of(tensor: Tensor | None) -> tuple[torch.dtype | None, bool]:
    """What a compiler may make use of in a tensor that is not ours: its type, and whether it begins at 16 bytes."""
    return (None, True) if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)


def _addresses(arguments: Sequence[Any]) -> list[int]:
    """Of tensors where they begin; numbers as they are."""
    return [argument if isinstance(argument, int) else argument.data_ptr() for argument in arguments]
