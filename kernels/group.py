"""Many tensors in few launches: one for each grid, width and type among them (table.Batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .formats import CodeFormat, Grid, Quantized
from .launch import use_triton
from .segments import code_format, nothing
from .table import batches_of
from .ternary import ternary, ternary_batch
from .uniform import uniform, uniform_batch


@dataclass(frozen=True)
class Request:
    """One tensor to be quantized: what ``ternary`` and ``uniform`` are asked for."""

    weight: Tensor
    """float32, float16 or bfloat16 [rows, length]."""
    grid: Grid
    bits: int
    group_size: int
    layer_wise: bool = False

    @property
    def format(self) -> CodeFormat:
        """The format of the codes. Raises ValueError where the request cannot be met."""
        if self.grid is Grid.TERNARY and self.bits != 2:
            raise ValueError(f"bits is {self.bits} for ternary codes; they take 2")
        return code_format(self.weight, self.grid, self.bits, self.group_size, self.layer_wise)


def quantize_group(requests: Sequence[Request]) -> list[Quantized]:
    """Return what ``ternary`` or ``uniform`` gives for every request, in few launches where they run on a GPU.

    Tensors may come from one model or several; they must stay as they are until this returns.

    Raises:
        ValueError: a request cannot be met.
        NonFiniteError: a weight holds NaN or Inf.
    """
    if not all(use_triton(request.weight) for request in requests):
        return [_alone(request) for request in requests]
    return quantize_group_triton(requests)


def quantize_group_triton(requests: Sequence[Request]) -> list[Quantized]:
    """Launch the kernels over all requests; see ``quantize_group``."""
    formats = [request.format for request in requests]
    weights = [request.weight for request in requests]
    results: dict[int, Quantized] = {}
    for batch, places in batches_of(weights, formats):
        run = ternary_batch if batch.entries[0].format.grid is Grid.TERNARY else uniform_batch
        results |= zip(places, run(batch), strict=True)
    return [
        results[place] if place in results else nothing(format, weight)
        for place, (format, weight) in enumerate(zip(formats, weights, strict=True))
    ]


def _alone(request: Request) -> Quantized:
    request.format  # noqa: B018  # what cannot be met is said alike everywhere
    weight, size, whole = request.weight, request.group_size, request.layer_wise
    if request.grid is Grid.TERNARY:
        return ternary(weight, group_size=size, layer_wise=whole)
    return uniform(weight, request.bits, request.grid, group_size=size, layer_wise=whole)
