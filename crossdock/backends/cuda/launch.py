"""The only place with ``[grid]``: kernels, each bound to all that is the same in many launches of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from triton import AsyncCompileMode, JITFunction

from crossdock._env import num_cores
from crossdock.backends.cuda.config import LaunchConfig
from crossdock.backends.cuda.state import DeviceState
from crossdock.backends.cuda.stream import CallStreams

NUM_KINDS = 64
"""Kinds of launches of each verb that are kept."""
_NUM_GRIDS = 1024
"""Numbers of tokens whose programs are remembered."""


class Compiler(Protocol):
    """Whoever may want kernels compiled that are not launched yet."""

    to_compile: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None
    """Kernels, arguments and options of launches that are only to be compiled; None: launches are launched."""


class Launch:
    """A kernel with everything that does not change between launches of one kind; made by ``Launcher.bind``.

    The first launch compiles it, or finds what has been compiled; later ones are given addresses, and ask nobody.
    """

    def __init__(
        self,
        streams: CallStreams,
        kernel: Any,
        grid: int | Callable[[int], int],
        fixed: tuple[Any, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
        compiler: Compiler | None = None,
    ) -> None:
        self._streams = streams
        self._compiler = compiler
        self._kernel = kernel
        self._grid = grid
        self._grids: dict[int, int] = {} if callable(grid) else {0: grid}
        """Programs, by how many tokens there are."""
        self._fixed = fixed
        self._constants = constants
        self._options = options
        self._run: Callable[..., None] | None = None
        self._function: Any = None
        self._metadata: Any = None
        self._bound: tuple[Any, ...] = ()
        """Fixed arguments as addresses, and constants in their places."""
        self._kept: list[int] = []
        self._tensors: list[int] = []
        self._groups: list[int] = []
        """Which of the arguments that vary are memory of ours, tensors, groups of tensors: the same in all launches."""

    def __call__(self, num_tokens: int, stream: int, *args: Any) -> None:
        """Launches it for so many tokens (or rows) on a stream.

        Args:
            args: the kernel's first arguments, which vary: tensors, numbers, tuples of tensors; ``Kept`` and plans,
                for their memory.
        """
        if num_tokens not in self._grids:
            if len(self._grids) >= _NUM_GRIDS:
                self._grids.clear()
            self._grids[num_tokens] = (self._grid(num_tokens) if callable(self._grid) else self._grid) or 1
        grid = self._grids[num_tokens]
        if self._run is None:
            self._launch_first(grid, stream, args)
            return
        addresses = [*args]
        for i in self._kept:
            addresses[i] = args[i].address
        for i in self._tensors:
            addresses[i] = args[i].data_ptr()
        for i in self._groups:
            addresses[i] = as_addresses(args[i])
        self._run(grid, 1, 1, stream, self._function, self._metadata, None, None, None, *addresses, *self._bound)

    def most_tokens(self, num_programs: int) -> int:
        """For how many tokens it is at most so many programs."""
        if not callable(self._grid):
            return sys.maxsize
        most = num_programs  # a token is a program at least, or a part of one
        while self._grid(most) > num_programs:
            most //= 2
        return most

    def _launch_first(self, grid: int, stream: int, args: tuple[Any, ...]) -> None:
        tensors = [arg.memory if hasattr(arg, "address") else arg for arg in args]
        given, options = (*tensors, *self._fixed), self._constants | self._options
        if self._compiler is not None and self._compiler.to_compile is not None:
            self._compiler.to_compile.append((self._kernel, given, options))
            return
        with self._streams.context(stream):
            handle = self._kernel[(grid,)](*given, **options)
        if handle is not None:  # an interpreted kernel has none
            self._run, self._function, self._metadata = handle.run, handle.function, handle.packed_metadata
            self._bound = (*as_addresses(self._fixed), *self._constants.values())
            self._kept = [i for i, arg in enumerate(args) if hasattr(arg, "address")]
            self._tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
            self._groups = [i for i, arg in enumerate(args) if isinstance(arg, tuple)]


class Launcher:
    """Binds a rank's kernels to what they share, and compiles them."""

    def __init__(self, state: DeviceState, streams: CallStreams, config: LaunchConfig) -> None:
        self.state = state
        self.streams = streams
        self.config = config
        """The default; a call may ask for another number of SMs."""
        self.to_compile: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None
        """See Compiler."""

    def bind(
        self,
        kernel: Any,
        grid: int | Callable[[int], int],
        *fixed: Any,
        num_warps: int,
        enable_fp_fusion: bool = True,
        maxnreg: int | None = None,
        early: bool = False,
        **constants: Any,
    ) -> Launch:
        """A kernel whose last arguments, and constants behind them, are the same in all launches of a kind.

        Args:
            grid: programs, or how many there are for so many tokens; at least one.
            fixed: tensors, numbers, and groups of these and of constants.
            early: whether the kernel begins with ``await_kernels_before``, and so may be launched before that.
        """
        options: dict[str, Any] = {"num_warps": num_warps}
        options |= {} if enable_fp_fusion else {"enable_fp_fusion": False}
        options |= {} if maxnreg is None or torch.version.hip is not None else {"maxnreg": maxnreg}
        options |= {"launch_pdl": True} if early and self.config.launches_early else {}
        return Launch(self.streams, kernel, grid, fixed, constants, options, self)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Launches within do nothing but have their kernels compiled when it ends, beside one another.

        Ranks share a machine's cores, and each begins with another kernel: what one has compiled, the others
        find in Triton's cache.
        """
        self.to_compile = []
        yield
        launches, self.to_compile = self.to_compile, None
        first = self.state.rank * len(launches) // self.state.num_ranks
        with ThreadPoolExecutor(max(1, num_cores() // self.state.num_ranks)) as pool, AsyncCompileMode(pool):
            for kernel, args, options in launches[first:] + launches[:first]:
                if isinstance(kernel, JITFunction):  # an interpreted one is not
                    kernel.warmup(*args, grid=(1,), **options)


def kind_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What a launch is bound for in a tensor that is not ours: type, strides, and where it begins within 16 bytes."""
    return None if tensor is None else (tensor.dtype, tensor.stride(), tensor.data_ptr() & 15)


def as_addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of tensors where they begin, also within groups; all else as it is."""
    return tuple(
        as_addresses(argument)
        if isinstance(argument, tuple)
        else argument.data_ptr()
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    )
