"""Quantization kernels: a Triton kernel, its launcher and a torch reference for each operation.

Formats come at once and need no torch; an operation, which does, is loaded on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .formats import CodeFormat as CodeFormat
from .formats import Grid as Grid
from .formats import Quantized as Quantized
from .formats import TapSums as TapSums

if TYPE_CHECKING:
    from .compensate import LowLayer as LowLayer
    from .compensate import NormVectors as NormVectors
    from .compensate import Solution as Solution
    from .compensate import compensate as compensate
    from .dequantize import dequantize as dequantize
    from .feedback import feedback_round as feedback_round
    from .moments import LayerInput as LayerInput
    from .moments import OutputMoments as OutputMoments
    from .moments import moments as moments
    from .packing import pack as pack
    from .packing import unpack as unpack
    from .statistics import RowStatistics as RowStatistics
    from .statistics import row_statistics as row_statistics
    from .sums import tree_sum as tree_sum
    from .sweep import Sweep as Sweep
    from .sweep import sweep as sweep
    from .tap_sums import tap_sums as tap_sums
    from .ternary import ternary as ternary
    from .uniform import uniform as uniform

_HOMES = {
    "LowLayer": ".compensate",
    "NormVectors": ".compensate",
    "Solution": ".compensate",
    "compensate": ".compensate",
    "dequantize": ".dequantize",
    "feedback_round": ".feedback",
    "LayerInput": ".moments",
    "OutputMoments": ".moments",
    "moments": ".moments",
    "pack": ".packing",
    "unpack": ".packing",
    "RowStatistics": ".statistics",
    "row_statistics": ".statistics",
    "tree_sum": ".sums",
    "Sweep": ".sweep",
    "sweep": ".sweep",
    "tap_sums": ".tap_sums",
    "ternary": ".ternary",
    "uniform": ".uniform",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Some operations bear their module's name: here the name means the operation, whoever imports first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
