"""muL2Q: centred weights at the Gaussian step."""

from __future__ import annotations

from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import Mul2qPlan
from .segments import by_segment
from .steps import choose_centred


def mul2q(rows: Tensor, format: CodeFormat, plan: Mul2qPlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Quantize ŵ = α v + μ (Cheng et al., "µL2Q: An Ultra-Low Loss Quantization Method for DNN", IJCNN 2019, eq. 8-11).

    φ = w − μ with μ the mean of w; α = λ_b·std(w), the step of least L2 loss for a normal φ;
    v = clip(round(φ/α − ½), −2^(b−1), 2^(b−1) − 1) + ½. As published a segment is the whole tensor.
    """
    return by_segment(rows, format, lambda segments: choose_centred(segments, format.bits))
