"""VecQ: the Gaussian step gives the direction, least squares the length."""

from __future__ import annotations

from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import VecqPlan
from .segments import Choice, by_segment, exact_sum, float32
from .steps import STEPS, mean_and_deviation, mid_rise


def vecq(rows: Tensor, format: CodeFormat, plan: VecqPlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Minimise the vector loss in two stages (Gong et al., "VecQ", arXiv 2005.08501, section 4).

    Steering: v = clip(round(w/(λ_b·std) − ½), −2^(b−1), 2^(b−1) − 1) + ½, whose angle to w is small for Gaussian w.
    Driving: α = ⟨w, v⟩/⟨v, v⟩. The levels α v are DoReFa's grid with the scale α(2^b − 1)/2.
    """
    return by_segment(rows, format, lambda segments: choose_least_squares(segments, format.bits))


def choose_least_squares(w: Tensor, bits: int) -> Choice:
    """Return codes u = v + 2^(b−1) − ½ and the scale α(2^b − 1)/2 for float64 [segments, length]."""
    levels = mid_rise(w, STEPS[bits] * mean_and_deviation(w)[1], bits)
    doubled = 2 * levels - (2**bits - 1)
    # with V = 2v the scale α(2^b − 1)/2 is (2^b − 1)⟨w, V⟩/⟨V, V⟩
    dot = exact_sum(doubled * w, (2**bits) * w.abs().amax(1))
    return Choice(levels, float32((2**bits - 1) * dot / doubled.square().sum(1)))
