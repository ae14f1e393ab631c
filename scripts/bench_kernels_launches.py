"""Catch the kernel launches that an operation makes, so that they can be repeated and timed without its host work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class _Spy:
    kernel: Any
    caught: Caught

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.caught.launches.append(Launch(self.kernel, grid, arguments, constants))
            return self.kernel[grid](*arguments, **constants)

        return launch


def kernels_by_module() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, kernel) of every kernel that a module of dfmpc.kernels can launch."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dfmpc.kernels.") and module is not None:
            for attribute, value in list(vars(module).items()):
                names = getattr(value, "arg_names", ())
                if attribute.endswith("_kernel") and any(argument.endswith("_ptr") for argument in names):
                    yield module, attribute, value


@contextmanager
def catching() -> Iterator[Caught]:
    """Within this context every launch is made and noted."""
    caught, kernels = Caught(), list(kernels_by_module())
    for module, name, kernel in kernels:
        setattr(module, name, _Spy(kernel, caught))
    try:
        yield caught
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


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
