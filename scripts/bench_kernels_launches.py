"""Catch the kernel launches that an operation makes, so that they can be repeated and timed without its host work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface


@dataclass(frozen=True)
class Launch:
    """One launch with its grid and arguments; repeating it writes the same outputs again."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def again(self) -> None:
        """Launch once more."""
        self.kernel[self.grid](*self.arguments, **self.constants)

    @property
    def tensors(self) -> list[Tensor]:
        """Inputs and outputs alike."""
        return [argument for argument in self.arguments if isinstance(argument, Tensor)]


@dataclass
class Caught:
    """The launches of one call, and the tensors they work on."""

    launches: list[Launch] = field(default_factory=list)

    def again(self) -> None:
        """Launch all of them again."""
        for launch in self.launches:
            launch.again()

    def moved_bytes(self, inputs: list[Tensor]) -> int:
        """Bytes of ``inputs`` and of every other tensor the kernels got, each counted once: read + written."""
        given = [tensor for launch in self.launches for tensor in launch.tensors]
        device = given[0].device if given else None
        tensors = [*(tensor for tensor in inputs if tensor.device == device), *given]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def catching() -> Iterator[Caught]:
    """Within this context every launch of our kernels is made and noted."""
    caught, plain = Caught(), KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        run = plain(kernel, grid)

        def launch(*arguments: Any, **constants: Any) -> Any:
            caught.launches.append(Launch(kernel, grid, arguments, constants))
            return run(*arguments, **constants)

        return launch if kernel.fn.__module__.startswith("dfmpc.kernels") else run

    holders = [kind for kind in (KernelInterface, InterpretedFunction) if "__getitem__" in vars(kind)]
    before = [vars(kind)["__getitem__"] for kind in holders]
    for kind in holders:
        kind.__getitem__ = getitem
    try:
        yield caught
    finally:
        for kind, method in zip(holders, before, strict=True):
            kind.__getitem__ = method


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this context torch.empty gives NaN, 0xFF or -1: an output that nobody writes is found out."""
    plain = torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        fresh = plain(*arguments, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 255 if fresh.dtype is torch.uint8 else -1)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = plain
