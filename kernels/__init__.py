"""Quantization kernels: a Triton kernel, its launcher and a torch reference for each operation."""

from __future__ import annotations

from .dequantize import dequantize as dequantize
from .feedback import feedback_round as feedback_round
from .formats import CodeFormat as CodeFormat
from .formats import Grid as Grid
from .formats import Quantized as Quantized
from .packing import pack as pack
from .packing import unpack as unpack
from .statistics import RowStatistics as RowStatistics
from .statistics import row_statistics as row_statistics
from .sums import tree_sum as tree_sum
from .tap_sums import TapSums as TapSums
from .tap_sums import tap_sums as tap_sums
from .ternary import ternary as ternary
from .uniform import uniform as uniform
