"""twn-exact: the ternary weights of least squared error."""

from __future__ import annotations

import torch
from dfmpc.kernels.formats import CodeFormat, Grid, Quantized
from dfmpc.kernels.sums import exponents, fineness, power_of_two
from dfmpc.kernels.uniform import uniform
from torch import Tensor

from ...job.neighbours import TwnExactPlan
from .segments import Choice, by_segment


def twn_exact(rows: Tensor, format: CodeFormat, plan: TwnExactPlan, taps: int) -> Quantized:  # noqa: ARG001 - interface
    """Ternary weights (Li, Zhang, Liu: "Ternary Weight Networks", arXiv 1605.04711), eq. 3, without its approximation.

    TWN minimises ‖w − α t‖², t in {−1, 0, 1}: α is the mean of |w| over the k weights with t ≠ 0, which are the k
    largest, and k maximises (Σ_{top k} |w|)² / k. TWN takes |w| > 0.7·mean|w| for want of a closed form; sorting finds
    the best k itself. Widths other than 2 are DoReFa's round to nearest, as in dfmpc.
    """
    if format.grid is Grid.TERNARY:
        return by_segment(rows, format, choose_ternary)
    return uniform(rows, format.bits, format.grid, group_size=format.group_size, layer_wise=format.layer_wise)


def choose_ternary(w: Tensor) -> Choice:
    """Return codes t + 1 and α for float64 [segments, length]."""
    magnitude = w.abs()
    ordered = magnitude.float().sort(1, descending=True).values.double()
    shift = fineness(w.shape[1]) - exponents(ordered[:, 0].float())
    # integers, so that a parallel scan gives the same sums as a loop
    sums = (ordered * power_of_two(shift)[:, None]).round_().to(torch.int64).cumsum(1)
    counts = torch.arange(1, w.shape[1] + 1, device=w.device, dtype=torch.float64)
    total = sums.double()
    best = (total.square() / counts).argmax(1, keepdim=True)
    # the objective is convex along equal magnitudes, so that the best k never parts them
    chosen = (magnitude >= ordered.gather(1, best)) & (magnitude > 0)
    alpha = (total.gather(1, best) / (best + 1)).squeeze(1) * power_of_two(-shift)
    return Choice(torch.sign(w) * chosen + 1, alpha)
