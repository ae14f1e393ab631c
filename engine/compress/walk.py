"""One walk over the graph: re-estimate every norm, solve for c behind LOW layers, hand c on to the HIGH ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.graph import Graph, Layer, Node, Norm, Op, Pair
from .calibrate import Calibrator, LayerView, Statistics, behind_norm
from .compensate import NormVectors, Solution, solve
from .state import State, image_state, propagate
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


@dataclass(frozen=True)
class Lambdas:
    """Weights of the objective for c; ``None`` in their place leaves c = 1."""

    lambda1: float
    lambda2: float


@dataclass
class WalkResult:
    """What the walk found."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Corrected norm tensors by state-dict name, float64."""
    input_scale: dict[str, Tensor] = field(default_factory=dict)
    """Unfolded coefficients by HIGH layer, float64 [in]."""
    solutions: dict[str, list[Solution]] = field(default_factory=lambda: defaultdict(list))
    """By LOW layer, one a pair."""
    folded: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By LOW layer, whether each pair's c went into a norm."""
    norm_shift: dict[str, float] = field(default_factory=dict)
    """By layer: root mean square of the running mean's change, in old standard deviations."""


class Walk:
    """The state of one walk; ``run`` is the only entry."""

    def __init__(
        self,
        graph: Graph,
        pairs: Sequence[Pair],
        figures: Mapping[str, LayerFigures],
        tensor: Callable[[str], Tensor],
        calibrator: Calibrator,
        lambdas: Lambdas | None,
    ) -> None:
        """Take the network, its pairs, the layers' figures and a reader of original norm tensors (float64)."""
        self.graph, self.figures, self.tensor = graph, figures, tensor
        self.calibrator, self.lambdas = calibrator, lambdas
        self.lows = {pair.low for pair in pairs}
        self.pairs: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            self.pairs[pair.norm].append(pair)
        self.states: dict[str, State] = {}
        self.factors: dict[str, Tensor] = {}
        self.result = WalkResult()
        self.restated: set[str] = set()
        self.heard = heard_by_norms(graph)

    def run(self) -> WalkResult:
        """Visit every node once, in execution order."""
        for node in self.graph.nodes:
            inputs = [self.states[name] for name in node.inputs]
            if node.layer is not None:
                self.states[node.name] = self._layer(node, node.layer, inputs[0])
            elif node.norm is not None:
                known = len(inputs[0].mean) == node.norm.channels
                self.states[node.name] = self._norm(
                    node, node.norm, inputs[0] if known else image_state(node.norm.channels)
                )
            else:
                self.states[node.name] = propagate(node, inputs, self.calibrator.rho)
        return self.result

    def _layer(self, node: Node, layer: Layer, state: State) -> State:
        if node.name not in self.heard or len(state.mean) != layer.in_channels:
            return image_state(layer.out_channels)
        figures = self.figures[layer.name]
        observed = next((self._observed(layer, reader) for reader in direct_readers(self.graph, node)), None)
        view = LayerView(
            layer, layer.name in self.lows, figures.bias, observed, _norm_ratio(figures), lambda: self._taps(figures)
        )
        return self.calibrator.through_layer(state, view)

    def _observed(self, layer: Layer, reader: Reader) -> Statistics:
        part = slice(reader.offset, reader.offset + layer.out_channels)
        variance = self.tensor(reader.norm.running_var)[part].clamp_min(0) + reader.norm.eps
        return Statistics(self.tensor(reader.norm.running_mean)[part], variance)

    def _taps(self, figures: LayerFigures) -> tuple[Taps, Taps]:
        original, quantized = figures.taps()
        factor = self.factors.get(figures.layer.name)
        return original, quantized if factor is None else quantized.scaled(factor)

    def _norm(self, node: Node, norm: Norm, state: State) -> State:
        old = Statistics(self.tensor(norm.running_mean), self.tensor(norm.running_var))
        gamma = self.tensor(norm.weight) if norm.weight else torch.ones_like(old.mean)
        beta = self.tensor(norm.bias) if norm.bias else torch.zeros_like(old.mean)
        if norm.name not in self.restated:
            self.restated.add(norm.name)
            new = self.calibrator.restate(old, norm.eps, state)
            self._store(norm, old, new)
            self._note_shift(node, norm, old, new)
            self._compensate(norm, gamma, beta, old, new)
        return behind_norm(gamma, beta)

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

    def _compensate(self, norm: Norm, gamma: Tensor, beta: Tensor, old: Statistics, new: Statistics) -> None:
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
        high = self.figures[pair.high].layer
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


def heard_by_norms(graph: Graph) -> set[str]:
    """Return the nodes from which a norm can be reached; what no norm hears of needs no moments."""
    heard: set[str] = set()
    for node in reversed(graph.nodes):
        if node.norm is not None or node.name in heard:
            heard.update(node.inputs)
    return heard


@dataclass(frozen=True)
class Reader:
    """A norm that states a layer's output, and where the layer's channels begin in it."""

    norm: Norm
    offset: int


def direct_readers(graph: Graph, node: Node) -> list[Reader]:
    """Return the norms behind a weight layer with nothing but concatenations between."""
    found: list[Reader] = []
    pending = [(node, 0)]
    while pending:
        current, offset = pending.pop(0)
        for user in graph.users[current.name]:
            if user.norm is not None:
                found.append(Reader(user.norm, offset))
            elif user.op is Op.CAT:
                pending.append((user, offset + _cat_offset(graph, user, current)))
            elif user.op is Op.IDENTITY:
                pending.append((user, offset))
    return found


def _cat_offset(graph: Graph, cat: Node, part: Node) -> int:
    before = cat.inputs[: cat.inputs.index(part.name)]
    return sum(graph.by_name[name].shape[1] for name in before)


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
