"""One walk over the graph: quantize every layer, re-estimate every norm, solve for c and hand it on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.graph import Graph, Layer, Node, Norm, Pair
from .calibrate import Calibrator, InputMoments, LayerView, Statistics
from .compensate import NormVectors, Solution, solve
from .readers import Reader, direct_readers
from .rows import scale_inputs
from .taps import Taps


@dataclass(frozen=True)
class LayerFigures:
    """What the walk needs of one layer, all float64; a layer that is kept has the same figures on both sides."""

    layer: Layer
    bias: Tensor
    """[out]; zeros where the layer has none."""
    dot: Tensor
    """<Ŵ, W> of every row."""
    quantized_norm: Tensor
    original_norm: Tensor
    taps: Callable[[], tuple[Taps, Taps]]
    """Original and quantized tap sums, before c."""
    rows: Callable[[], tuple[Tensor, Tensor]]
    """Original and quantized weight, float32 [out, length], before c."""
    row_scales: bool = False
    """Whether every row has a scale of its own, which a gain may multiply."""


Quantizer = Callable[[Layer, Callable[[], InputMoments | None]], LayerFigures]
"""Quantizes a layer; asks for the second moments of its input where it rounds with them."""


@dataclass(frozen=True)
class Lambdas:
    """Weights of the objective for c; ``None`` in their place leaves c = 1."""

    lambda1: float
    lambda2: float


@dataclass
class WalkResult:
    """What the walk found."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Corrected norm tensors and biases by state-dict name, float64."""
    input_scale: dict[str, Tensor] = field(default_factory=dict)
    """Unfolded coefficients by HIGH layer, float64 [in]."""
    solutions: dict[str, list[Solution]] = field(default_factory=lambda: defaultdict(list))
    """By LOW layer, one a pair."""
    folded: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By LOW layer, whether each pair's c went into a norm."""
    row_gain: dict[str, Tensor] = field(default_factory=dict)
    """By LOW layer that no norm follows: what its rows' scales are multiplied by, float64 [out]."""
    norm_shift: dict[str, float] = field(default_factory=dict)
    """By layer: root mean square of the running mean's change, in old standard deviations."""


class Walk:
    """The state of one walk; ``run`` is the only entry."""

    def __init__(
        self,
        graph: Graph,
        pairs: Sequence[Pair],
        quantize: Quantizer,
        tensor: Callable[[str], Tensor],
        calibrator: Calibrator,
        lambdas: Lambdas | None,
        correct_biases: bool = False,
    ) -> None:
        """Take the network, its pairs, what quantizes a layer and a reader of original tensors (float64).

        ``correct_biases``: the shift of a layer's mean output that no norm takes up goes into the layer's bias.
        """
        self.graph, self.quantize, self.tensor = graph, quantize, tensor
        self.calibrator, self.lambdas, self.correct_biases = calibrator, lambdas, correct_biases
        self.figures: dict[str, LayerFigures] = {}
        self.lows = {pair.low for pair in pairs}
        self.bare_lows = {pair.low for pair in pairs if not pair.norm}
        self.pairs: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            self.pairs[pair.norm or pair.low].append(pair)
        self.factors: dict[str, Tensor] = {}
        self.result = WalkResult()
        self.restated: set[str] = set()

    def run(self) -> WalkResult:
        """Visit every node once, in execution order."""
        for node in self.graph.nodes:
            if node.layer is not None:
                self._layer(node, node.layer)
            elif node.norm is not None:
                self._norm(node, node.norm)
            else:
                self.calibrator.propagate(node)
        return self.result

    def _layer(self, node: Node, layer: Layer) -> None:
        first = layer.name not in self.figures
        if first:
            self.figures[layer.name] = self.quantize(layer, lambda: self.calibrator.input_moments(node))
        figures, readers = self.figures[layer.name], direct_readers(self.graph, node)
        observed = self._observed(layer, readers[0]) if readers else None
        view = LayerView(
            layer,
            layer.name in self.lows,
            figures.bias,
            observed,
            _norm_ratio(figures),
            lambda: self._taps(figures),
            lambda: self._rows(figures),
        )
        self.calibrator.through_layer(node, view)
        if self.correct_biases and first and layer.name in self.bare_lows and figures.row_scales:
            self._restore_variance(node, layer)
        if self.correct_biases and first and layer.bias and not readers:
            self._correct_bias(node, layer, figures)

    def _restore_variance(self, node: Node, layer: Layer) -> None:
        gain = self.calibrator.take_gain(node)
        if gain is not None:
            self.result.row_gain[layer.name] = gain

    def _correct_bias(self, node: Node, layer: Layer, figures: LayerFigures) -> None:
        shift = self.calibrator.take_shift(node)
        if shift is not None and bool(shift.any()):
            assert layer.bias is not None
            self.result.tensors[layer.bias] = figures.bias - shift

    def _observed(self, layer: Layer, reader: Reader) -> Statistics:
        part = slice(reader.offset, reader.offset + layer.out_channels)
        variance = self.tensor(reader.norm.running_var)[part].clamp_min(0) + reader.norm.eps
        return Statistics(self.tensor(reader.norm.running_mean)[part], variance)

    def _taps(self, figures: LayerFigures) -> tuple[Taps, Taps]:
        original, quantized = figures.taps()
        factor = self.factors.get(figures.layer.name)
        return original, quantized if factor is None else quantized.scaled(factor)

    def _rows(self, figures: LayerFigures) -> tuple[Tensor, Tensor]:
        original, quantized = figures.rows()
        factor = self.factors.get(figures.layer.name)
        return original, quantized if factor is None else scale_inputs(quantized, figures.layer, factor.to(quantized))

    def _norm(self, node: Node, norm: Norm) -> None:
        new = self.calibrator.restate(node)
        if norm.name in self.restated:
            return
        self.restated.add(norm.name)
        old = Statistics(self.tensor(norm.running_mean), self.tensor(norm.running_var))
        self._store(norm, old, new)
        self._note_shift(node, norm, old, new)
        self._compensate(norm, old, new)

    def _store(self, norm: Norm, old: Statistics, new: Statistics) -> None:
        if not torch.equal(old.mean, new.mean):
            self.result.tensors[norm.running_mean] = new.mean
        if not torch.equal(old.variance, new.variance):
            self.result.tensors[norm.running_var] = new.variance

    def _note_shift(self, node: Node, norm: Norm, old: Statistics, new: Statistics) -> None:
        layer = self.graph.by_name[node.inputs[0]].layer
        if layer is not None:
            moved = (new.mean - old.mean) / (old.variance.clamp_min(0) + norm.eps).sqrt()
            self.result.norm_shift[layer.name] = float(moved.square().mean().sqrt())

    def _compensate(self, norm: Norm, old: Statistics, new: Statistics) -> None:
        gamma = self.tensor(norm.weight) if norm.weight else torch.ones_like(old.mean)
        beta = self.tensor(norm.bias) if norm.bias else torch.zeros_like(old.mean)
        sigma, quantized_sigma = ((s.variance.clamp_min(0) + norm.eps).sqrt() for s in (old, new))
        vectors = NormVectors(gamma, beta, old.mean, sigma, new.mean, quantized_sigma)
        for pair in self.pairs[norm.name] if self.lambdas else ():
            figures = self.figures[pair.low]
            part = slice(pair.offset, pair.offset + figures.layer.out_channels)
            solution = self._solve(figures, _sliced(vectors, part))
            self.result.solutions[pair.low].append(solution)
            self._hand_on(pair, norm, part, solution.c)

    def _solve(self, figures: LayerFigures, vectors: NormVectors) -> Solution:
        assert self.lambdas is not None
        return solve(
            figures.dot, figures.quantized_norm, figures.bias, vectors, self.lambdas.lambda1, self.lambdas.lambda2
        )

    def _hand_on(self, pair: Pair, norm: Norm, part: slice, c: Tensor) -> None:
        spread = c.repeat_interleave(pair.repeat)
        inputs = slice(part.start * pair.repeat, part.stop * pair.repeat)
        high = next(layer for layer in self.graph.layers if layer.name == pair.high)
        self.factors.setdefault(high.name, _ones(high.in_channels))[inputs] = spread
        folds = pair.folds and norm.weight is not None and norm.bias is not None
        self.result.folded[pair.low].append(folds)
        if not folds:
            self.result.input_scale.setdefault(high.name, _ones(high.in_channels))[inputs] = spread
            return
        for name in (norm.weight, norm.bias):
            assert name is not None
            stored = self.result.tensors.setdefault(name, self.tensor(name).clone())
            stored[part] = stored[part] * c


def _sliced(vectors: NormVectors, part: slice) -> NormVectors:
    return NormVectors(
        vectors.gamma[part],
        vectors.beta[part],
        vectors.mean[part],
        vectors.sigma[part],
        vectors.quantized_mean[part],
        vectors.quantized_sigma[part],
    )


def _norm_ratio(figures: LayerFigures) -> Tensor:
    known = figures.original_norm > 0
    ratio = figures.quantized_norm / torch.where(known, figures.original_norm, 1.0)
    return torch.where(known, ratio, 1.0).sqrt()


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)
