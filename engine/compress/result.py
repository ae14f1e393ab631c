"""What compressing one model under one bit-plan leaves: codes a layer, corrected norms, figures for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dfmpc.kernels.dequantize import dequantize
from dfmpc.kernels.formats import Quantized
from torch import Tensor

from ..models.graph import Layer
from .rows import from_rows, scale_inputs


@dataclass(frozen=True)
class Coefficients:
    """Summary of one layer's coefficients c (methods.md, section 1)."""

    minimum: float
    mean: float
    maximum: float
    histogram: tuple[int, ...]
    """Counts in 20 equal bins over [0, 2); the last bin also holds everything above."""
    dead: int
    """Channels whose denominator vanished: c = 1."""


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's codes and what happened to it."""

    layer: Layer
    role: str
    """"low", "high" (paired) or "unpaired"."""
    granularity: str
    quantized: Quantized
    input_scale: Tensor | None = None
    """float32 [in_channels]: the unfolded coefficients, which multiply the dequantized weight."""
    partners: tuple[str, ...] = ()
    """The HIGH layers of a LOW one, the LOW layers of a HIGH one."""
    folded: bool | None = None
    """LOW only: whether c went into the norm; None where there is no c."""
    reason: str = ""
    """Why the layer is in no pair, or why c was not folded."""
    coefficients: Coefficients | None = None
    """LOW only."""
    norm_shift: float | None = None
    """Root mean square of the change of the running mean behind this layer, in old standard deviations."""
    clipped_fraction: float = 0.0
    """Fraction of the weights, 0-1, beyond the grid's ends."""
    seconds: float = 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal over quantization error of the weights before c, in dB; inf where there is no error."""
        # exact sums: what nearly cancels here must not depend on the order in which a machine adds
        signal, dot, quantized = (
            math.fsum(sums.tolist())
            for sums in (self.quantized.original_norm, self.quantized.dot, self.quantized.quantized_norm)
        )
        error = signal - 2 * dot + quantized
        return math.inf if error <= 1e-15 * signal else 10 * math.log10(signal / error)

    def weight(self) -> Tensor:
        """Return the dequantized weight in its stored shape, float32, unfolded coefficients included."""
        codes = self.quantized
        rows = dequantize(codes.format, codes.codes, codes.scale, codes.zero_point)
        if self.input_scale is not None:
            rows = scale_inputs(rows, self.layer, self.input_scale.to(rows.device))
        return from_rows(rows, self.layer)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that became exactly zero."""
        return float(self.quantized.zeros.sum()) / max(1, self.layer.params)


@dataclass(frozen=True)
class Compressed:
    """One model under one bit-plan, ready for the artifact writer."""

    layers: tuple[QuantizedLayer, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Corrected tensors by state-dict name (BatchNorm statistics, weights and biases), float32."""
    kept: dict[str, str] = field(default_factory=dict)
    """Layers left unquantized, with the reason."""

    def changed(self) -> dict[str, Tensor]:
        """Return every tensor that compression changed, by state-dict name, float32, weights dequantized.

        ``network.load_state_dict(compressed.changed(), strict=False)`` makes a float32 network the compressed one.
        """
        return {item.layer.weight: item.weight() for item in self.layers} | self.tensors
