"""Many tensors in few launches: one for each grid, width and type among them (table.Batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .factors import factor_columns
from .formats import CodeFormat, Grid, Quantized
from .launch import use_triton
from .segments import code_format, nothing
from .table import batches_of
from .tap_sums import check_taps
from .tapped import with_taps
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
    factor: Tensor | None = None
    """float32 [in]: what multiplies the weight's input channels before everything else; for uniform grids."""
    taps: int = 0
    """Neighbours whose sums are wanted too, for ternary codes; 0: none (``Quantized.taps``)."""

    @property
    def format(self) -> CodeFormat:
        """The format of the codes. Raises ValueError where the request cannot be met."""
        if self.grid is Grid.TERNARY and self.bits != 2:
            raise ValueError(f"bits is {self.bits} for ternary codes; they take 2")
        if self.grid is Grid.TERNARY and self.factor is not None:
            raise ValueError("factor is given for ternary codes; only uniform grids take one")
        self._check_taps()
        return code_format(self.weight, self.grid, self.bits, self.group_size, self.layer_wise)

    def _check_taps(self) -> None:
        if self.taps and self.grid is not Grid.TERNARY:
            raise ValueError(f"taps is {self.taps} for {self.grid} codes; only ternary codes come with tap sums")
        if self.taps:
            check_taps(self.weight, self.taps)

    @property
    def columns(self) -> Tensor | None:
        """The factor of each column, float32 [length] on the CPU. Raises ValueError where there cannot be one."""
        return None if self.factor is None else factor_columns(self.factor.cpu(), self.weight.shape[1])


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
    factors = [request.columns for request in requests]
    results: dict[int, Quantized] = {}
    for batch, places in batches_of(weights, formats, factors):
        if batch.entries[0].format.grid is Grid.TERNARY:
            found = ternary_batch(batch, taps=[requests[place].taps for place in places])
        else:
            found = uniform_batch(batch)
        results |= zip(places, found, strict=True)
    return [results[place] if place in results else _nothing(request) for place, request in enumerate(requests)]


def _nothing(request: Request) -> Quantized:
    return with_taps(nothing(request.format, request.weight), request.weight, request.taps)


def _alone(request: Request) -> Quantized:
    request.format  # noqa: B018  # what cannot be met is said alike everywhere
    weight, size, whole = request.weight, request.group_size, request.layer_wise
    if request.grid is Grid.TERNARY:
        return ternary(weight, group_size=size, layer_wise=whole, taps=request.taps)
    return uniform(weight, request.bits, request.grid, group_size=size, layer_wise=whole, factor=request.factor)
