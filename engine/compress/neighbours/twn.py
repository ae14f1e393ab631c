"""twn-exact: the ternary weights of least squared error."""

from __future__ import annotations

from dfmpc.kernels.formats import CodeFormat, Grid, Quantized
from dfmpc.kernels.segments import nothing, require_finite
from dfmpc.kernels.uniform import uniform
from torch import Tensor

from ...job.neighbours import TwnExactPlan
from ..encode import encode
from ..scale_search import ternary_optimum


def twn_exact(rows: Tensor, format: CodeFormat, plan: TwnExactPlan, taps: int) -> Quantized:  # noqa: ARG001 - interface
    """Ternary weights (Li, Zhang, Liu: "Ternary Weight Networks", arXiv 1605.04711), eq. 3, without its approximation.

    TWN minimises ‖w − α t‖², t in {−1, 0, 1}: α is the mean of |w| over the k weights with t ≠ 0, which are the k
    largest, and k maximises (Σ_{top k} |w|)² / k. TWN takes |w| > 0.7·mean|w| for want of a closed form; sorting finds
    the best k itself. Widths other than 2 are DoReFa's round to nearest, as in dfmpc.
    """
    if format.grid is not Grid.TERNARY:
        return uniform(rows, format.bits, format.grid, group_size=format.group_size, layer_wise=format.layer_wise)
    if rows.numel() == 0:
        return nothing(format, rows)
    require_finite(rows.abs().amax(1, keepdim=True))
    found = ternary_optimum(rows, group_size=format.group_size, layer_wise=format.layer_wise)
    return encode(rows, found.levels, format, found.scale)
