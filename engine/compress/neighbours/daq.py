"""DAQ, its weights: every channel standardised."""

from __future__ import annotations

from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import DaqPlan
from .segments import by_segment
from .steps import choose_centred


def daq(rows: Tensor, format: CodeFormat, plan: DaqPlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Quantize ŵ = σ_c·λ_b·v + μ_c channel by channel (Hong et al., "DAQ", WACV 2022, arXiv 2012.11230, section 3).

    v = clip(round((w − μ_c)/(σ_c λ_b) − ½), −2^(b−1), 2^(b−1) − 1) + ½ with mean μ_c and deviation σ_c of the channel.
    On weights alone this is muL2Q by channel; DAQ's own gain lies in doing the same to activations, which stay float.
    """
    return by_segment(rows, format, lambda segments: choose_centred(segments, format.bits))
