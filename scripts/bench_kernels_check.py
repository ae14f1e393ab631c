"""The operations that bench_kernels.py times, and whether their results are the references' to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_kernels_shapes import Shapes, sampled
from dfmpc.kernels import (
    Grid,
    Quantized,
    dequantize,
    row_statistics,
    ternary,
    uniform,
)
from dfmpc.kernels.dequantize import dequantize_reference
from dfmpc.kernels.formats import TapSums, TapSumsOfBoth
from dfmpc.kernels.optimum import LONGEST, optimal_thresholds_reference, optimal_thresholds_triton
from dfmpc.kernels.segments import code_format
from dfmpc.kernels.statistics import row_statistics_reference
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference
from torch import Tensor

SAMPLE = 48
"""Rows of a tensor whose results are computed once more, by the reference on the CPU."""


def _itself(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True)
class Operation:
    """``run`` works on one tensor where the kernels run, ``reference`` on rows of it on the CPU."""

    name: str
    run: Callable[[Any], Any]
    reference: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = _itself
    """What ``run`` and ``reference`` take, made of a weight."""
    suits: Callable[[int], bool] = bool
    """Whether it is timed on rows of so many elements: where its kernel runs and the package would ask for it."""


def _uniform(bits: int) -> Operation:
    def run(weight: Tensor) -> Quantized:
        return uniform(weight, bits, Grid.DOREFA, group_size=weight.shape[1])

    def reference(weight: Tensor) -> Quantized:
        return uniform_reference(weight, bits, Grid.DOREFA, group_size=weight.shape[1])

    return Operation(f"uniform {bits}", run, reference)


def _factored(bits: int) -> Operation:
    def run(weight: Tensor, of: Callable[..., Quantized] = uniform) -> Quantized:
        factor = torch.linspace(0.5, 2, weight.shape[1])
        return of(weight, bits, Grid.DOREFA, group_size=weight.shape[1], factor=factor)

    return Operation(f"factored {bits}", run, lambda weight: run(weight, uniform_reference))


def _optimum() -> Operation:
    def run(weight: Tensor, of: Callable[..., Tensor] = optimal_thresholds_triton) -> Tensor:
        return of(weight, code_format(weight, Grid.TERNARY, 2, weight.shape[1], layer_wise=False))

    return Operation(
        "optimum", run, lambda weight: run(weight, optimal_thresholds_reference), suits=lambda length: length <= LONGEST
    )


def _tapped() -> Operation:
    """Ternary codes with the tap sums of 5×5 and 3×3 layers: what runs before the analytic calibrator."""

    def run(weight: Tensor, of: Callable[..., Quantized] = ternary) -> Quantized:
        length = weight.shape[1]
        return of(weight, group_size=length, taps=25 if length % 25 == 0 else 9)

    return Operation(
        "tapped ternary",
        run,
        lambda weight: run(weight, ternary_reference),
        suits=lambda length: length % 25 == 0 or length % 9 == 0,
    )


def _codes(weight: Tensor) -> Quantized:
    return uniform(weight, 4, Grid.DOREFA, group_size=weight.shape[1])


def operations_on(shapes: Shapes) -> list[Operation]:
    """Return what is timed on ``shapes``."""
    return [each for each in operations() if each.suits(shapes.longest)]


def operations() -> list[Operation]:
    """Return what is timed, on the shapes that it takes."""
    return [
        Operation(
            "ternary",
            lambda weight: ternary(weight, group_size=weight.shape[1]),
            lambda weight: ternary_reference(weight, group_size=weight.shape[1]),
        ),
        _tapped(),
        _uniform(4),
        _uniform(6),
        _factored(4),
        _optimum(),
        *_sweep(),
        Operation(
            "dequantize 4",
            lambda found: dequantize(found.format, found.codes, found.scale, None),
            lambda found: dequantize_reference(found.format, found.codes, found.scale, None),
            _codes,
        ),
        Operation(
            "statistics",
            lambda weight: row_statistics(weight, weight.shape[1]),
            lambda weight: row_statistics_reference(weight, weight.shape[1]),
        ),
    ]


def grouped_operations() -> dict[str, tuple[Operation, Callable[[list[Tensor]], list[Quantized]]]]:
    """Return what is timed over all layers of a model at once, with its call."""
    from dfmpc.kernels.group import Request, quantize_group  # noqa: PLC0415

    def together(grid: Grid, bits: int) -> Callable[[list[Tensor]], list[Quantized]]:
        return lambda weights: quantize_group([Request(w, grid, bits, group_size=w.shape[1]) for w in weights])

    formats = {"ternary": (Grid.TERNARY, 2), "uniform 4": (Grid.DOREFA, 4)}
    chosen = {operation.name: operation for operation in operations()}
    return {name: (chosen[name], together(*format)) for name, format in formats.items()}


def _sweep() -> list[Operation]:
    try:
        from dfmpc.kernels.sweep import sweep, sweep_reference  # noqa: PLC0415 - absent in older checkouts
    except ImportError:
        return []
    return [
        Operation(
            "sweep",
            lambda weight: sweep(weight, grid=Grid.DOREFA, group_size=weight.shape[1]),
            lambda weight: sweep_reference(weight, grid=Grid.DOREFA, group_size=weight.shape[1]),
        )
    ]


def difference(operation: Operation, weights: Sequence[Tensor], results: Sequence[Any]) -> str:
    """Return what differs from the reference in a sample of rows, or nothing."""
    for weight, result in zip(weights, results, strict=True):
        rows = sampled(weight.shape[0], SAMPLE if len(weights) == 1 else 8)
        picked = torch.tensor(rows, device=weight.device)
        expected = tensors_of(operation.reference(operation.prepare(weight[picked].cpu())))
        for name, tensor in tensors_of(result).items():
            if not same_bits(tensor[picked.to(tensor.device)].cpu(), expected[name]):
                return f"{operation.name}: {name} of a {list(weight.shape)} tensor"
    return ""


def tensors_of(result: Any) -> dict[str, Tensor]:
    """Return the tensors of a result by their names; all have the rows first."""
    if isinstance(result, Tensor):
        return {"values": result}
    found = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, TapSums | TapSumsOfBoth):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(value).items()}
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same bytes (NaN equals NaN, 0 and -0 differ)."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
