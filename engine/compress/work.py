"""One layer on its way through the walk: quantized when its turn comes, then measured and told of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from dfmpc.kernels.dequantize import dequantize
from dfmpc.kernels.formats import Quantized
from torch import Tensor

from ..errors import NonFiniteError
from ..models.graph import Layer, Pair, Pairing
from ..models.load import LoadedModel
from .assign import Assignment
from .calibrate import InputMoments
from .compensate import summarise
from .quantize import clipped_fraction, original_taps, quantize_layers, rows_on, taps_of_both
from .result import QuantizedLayer
from .rounding import RoundedLayer
from .rows import to_rows
from .taps import Taps
from .walk import LayerFigures, WalkResult

Moments = Callable[[], InputMoments | None]
Rounding = Callable[[Tensor, Assignment, Moments], RoundedLayer]
"""Gives a layer's stored weight its codes."""


@dataclass
class LayerWork:
    """One layer that is quantized once."""

    model: LoadedModel
    assignment: Assignment
    device: str
    rounded: RoundedLayer | None = None
    """The codes; there before the layer's turn where ``round_together`` made them."""
    clipped: float = 0.0
    seconds: float = field(default=0.0)

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.assignment.layer

    @property
    def weight(self) -> Tensor:
        """The stored weight."""
        return self.model.state[self.layer.weight]

    @property
    def quantized(self) -> Quantized:
        """The codes, once there are any."""
        assert self.rounded is not None
        return self.rounded.quantized

    def quantize(self, rounding: Rounding, moments: Moments) -> None:
        """Give the layer its codes; the seconds that its input's moments take count as its own.

        Raises NonFiniteError naming the weight where it holds NaN or Inf.
        """
        started = time.perf_counter()
        try:
            self.rounded = self.rounded or rounding(self.weight, self.assignment, moments)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.model.source.name}: {self.layer.weight}: {error}") from error
        self.clipped = clipped_fraction(self.weight, self.layer, self.quantized, self.device)
        self.seconds += time.perf_counter() - started

    def figures(self) -> LayerFigures:
        """Return what the walk needs of the quantized layer."""
        quantized = self.quantized
        bias = _bias(self.model, self.layer)
        norms = quantized.dot, quantized.quantized_norm, quantized.original_norm
        return LayerFigures(self.layer, bias, *norms, self._taps, self._rows, not quantized.format.layer_wise)

    def _taps(self) -> tuple[Taps, Taps]:
        started = time.perf_counter()
        found = taps_of_both(self.weight, self.quantized, self.layer, self.device)
        self.seconds += time.perf_counter() - started
        return found

    def _rows(self) -> tuple[Tensor, Tensor]:
        codes = self.quantized
        values = dequantize(codes.format, codes.codes, codes.scale, codes.zero_point, torch.float32)
        return rows_on(self.weight, self.layer, self.device).float(), values

    def finish(self, pairing: Pairing, walked: WalkResult | None) -> QuantizedLayer:
        """Return the layer as the artifact and the report want it."""
        assert self.rounded is not None
        reasons = [text for text in (self.assignment.reason, self.rounded.note) if text]
        gain = walked.row_gain.get(self.layer.name) if walked else None
        result = QuantizedLayer(
            layer=self.layer,
            role=self.assignment.role,
            granularity=self.assignment.granularity,
            quantized=_with_gain(replace(self.quantized, taps=None), gain),
            partners=partners(self.layer, pairing.pairs),
            reason="; ".join(reasons),
            clipped_fraction=self.clipped,
            seconds=self.seconds,
        )
        return result if walked is None else _with_walk(result, pairing, walked)


TOGETHER = 2**28
"""Bytes of weights, as stored, that may be on the device at once for one launch: enough to fill any."""


def round_together(items: Iterable[LayerWork], with_taps: bool = False) -> None:
    """Give layers whose codes follow from their weights alone those codes, in few launches for all.

    ``with_taps``: the calibrator will ask for their tap sums.
    """
    run: list[LayerWork] = []
    size = 0
    for item in items:
        more = item.weight.numel() * item.weight.element_size()
        if run and size + more > TOGETHER:
            _round_run(run, with_taps)
            run, size = [], 0
        run.append(item)
        size += more
    if run:
        _round_run(run, with_taps)


def _round_run(run: Sequence[LayerWork], with_taps: bool) -> None:
    """Weights with NaN or Inf are left to each layer's turn, which names the one."""
    started = time.perf_counter()
    try:
        found = quantize_layers([(item.weight, item.assignment) for item in run], run[0].device, with_taps)
    except NonFiniteError:
        return
    seconds = time.perf_counter() - started
    params = sum(item.layer.params for item in run)
    for item, quantized in zip(run, found, strict=True):
        item.rounded = RoundedLayer(quantized)
        item.seconds += seconds * item.layer.params / max(1, params)


def kept_figures(model: LoadedModel, layer: Layer, device: str) -> LayerFigures:
    """Return what the walk needs of a layer that stays as it is: the same on both sides."""
    weight = model.state[layer.weight]
    norms = to_rows(weight, layer).double().square().sum(1)

    def taps() -> tuple[Taps, Taps]:
        found = original_taps(weight, layer, device)
        return found, found

    def rows() -> tuple[Tensor, Tensor]:
        found = rows_on(weight, layer, device).float()
        return found, found

    return LayerFigures(layer, _bias(model, layer), norms, norms, norms, taps, rows)


def _bias(model: LoadedModel, layer: Layer) -> Tensor:
    return model.state[layer.bias].double() if layer.bias else torch.zeros(layer.out_channels, dtype=torch.float64)


def _with_gain(quantized: Quantized, gain: Tensor | None) -> Quantized:
    """Multiply the rows' scales; the statistics follow."""
    if gain is None:
        return quantized
    scale = quantized.scale * gain.float().to(quantized.scale.device).unsqueeze(1)
    return replace(
        quantized, scale=scale, dot=quantized.dot * gain, quantized_norm=quantized.quantized_norm * gain.square()
    )


def partners(layer: Layer, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the HIGH layers of a LOW one, the LOW layers of a HIGH one."""
    found = [pair.high for pair in pairs if pair.low == layer.name]
    return tuple(dict.fromkeys(found or [pair.low for pair in pairs if pair.high == layer.name]))


def _with_walk(result: QuantizedLayer, pairing: Pairing, walked: WalkResult) -> QuantizedLayer:
    name = result.layer.name
    scale = walked.input_scale.get(name)
    solutions = walked.solutions.get(name)
    folded = walked.folded.get(name)
    unfolded = next((p.unfolded_because for p in pairing.pairs if p.low == name and p.unfolded_because), "")
    return replace(
        result,
        input_scale=None if scale is None else scale.float(),
        coefficients=summarise(solutions) if solutions else None,
        folded=all(folded) if folded else None,
        reason=result.reason or (unfolded if folded and not all(folded) else ""),
        norm_shift=walked.norm_shift.get(name),
    )
