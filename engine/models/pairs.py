"""Pairs from the graph alone: which layers become LOW, and which repair them (docs/methods.md, section 1)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .graph import Graph, Layer, Node, Op, Pair, Pairing
from .paths import End, bare_ends, behind_depthwise, layer_ends, norm_ends, reaches_output, reads_input

HOMOGENEOUS = (Op.RELU, Op.LEAKY_RELU, Op.IDENTITY)
"""Activations f with f(c z) = c f(z) for c >= 0: behind them the coefficient may fold into the norm."""

PAIRING_VERSION = 2
"""Bumped by hand when any graph gets other pairs; part of every key that depends on pairs."""
CLASSIFIER_REPAIRS = True
"""Whether a layer that only the classifier reads may be LOW."""

_READER_WORDS = {
    Op.ADD: "feeds a residual add",
    Op.CAT: "feeds a concatenation behind its norm",
    Op.OUTPUT: "is read by the network's output",
}


@dataclass(frozen=True)
class Candidate:
    """A layer that may be LOW, with the pairs that this would give."""

    layer: Layer
    pairs: tuple[Pair, ...]
    linear_bottleneck: bool
    """No activation between the norm and the HIGH layer, and a depthwise layer in front (a project convolution)."""

    @property
    def rank(self) -> int:
        """Order of choice: spatial kernels, then pointwise and linear layers, then those without an activation."""
        if all(pair.activation is Op.IDENTITY for pair in self.pairs):
            return 2
        return 0 if self.layer.taps > 1 else 1


class _Ineligible(Exception):  # noqa: N818  # not an error: the reason why a layer cannot be LOW
    """Why a layer cannot be LOW."""


def find_pairs(graph: Graph) -> Pairing:
    """Return the pairs of ``graph``, and for every layer in none the reason.

    A LOW layer is followed by a BatchNorm and an activation, and everything that reads that tensor is a weight layer;
    behind a concatenation every norm that reads a slice gives a pair of its own. Spatial kernels are chosen first, in
    graph order, so that the 3x3 of a bottleneck is LOW and both 1x1 are not. No layer is LOW and HIGH at once. In a
    graph without any BatchNorm (folded into the layers, or none ever) a LOW layer's activation follows it directly.
    """
    finder = _Finder(graph)
    reasons: dict[str, str] = {}
    candidates = []
    for layer in graph.layers:
        try:
            candidates.append(finder.candidate(layer))
        except _Ineligible as reason:
            reasons[layer.name] = str(reason)
    chosen = _choose(candidates, reasons)
    taken = {name for pair in chosen for name in (pair.low, pair.high)}
    return Pairing(tuple(chosen), {name: reason for name, reason in reasons.items() if name not in taken})


def repaired_by_classifier_alone(pairs: tuple[Pair, ...], classifiers: set[str]) -> bool:
    """Whether only classifiers would repair this LOW layer: the head convolution of a MobileNet or EfficientNet."""
    return all(pair.high in classifiers for pair in pairs)


def _choose(candidates: list[Candidate], reasons: dict[str, str]) -> list[Pair]:
    order = {candidate.layer.name: index for index, candidate in enumerate(candidates)}
    lows: set[str] = set()
    high_of: dict[str, str] = {}
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.rank, order[c.layer.name])):
        name = candidate.layer.name
        busy = sorted({pair.high for pair in candidate.pairs} & lows)
        if name in high_of:
            reasons[name] = f"is HIGH for {high_of[name]} already"
        elif busy:
            reasons[name] = f"its partner {busy[0]} is LOW already"
        elif candidate.linear_bottleneck:
            reasons[name] = "linear bottleneck: no activation behind it and a depthwise layer in front"
        else:
            lows.add(name)
            high_of.update((pair.high, name) for pair in candidate.pairs)
            chosen.append(candidate)
    chosen.sort(key=lambda c: order[c.layer.name])
    return [pair for candidate in chosen for pair in candidate.pairs]


class _Finder:
    """Says of one layer after the other whether it could be LOW."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.layer is not None:
                self.nodes.setdefault(node.layer.name, []).append(node)
        self.stems, self.classifiers = reads_input(graph), reaches_output(graph)
        self.norm_tensors = Counter(name for node in graph.nodes if node.norm for name in node.norm.tensors)

    def candidate(self, layer: Layer) -> Candidate:
        self._check_role(layer)
        node = self.nodes[layer.name][0]
        pairs = self._normed_pairs(layer, node) if self.norm_tensors else self._bare_pairs(layer, node)
        if not CLASSIFIER_REPAIRS and repaired_by_classifier_alone(pairs, self.classifiers):
            raise _Ineligible("read by the classifier only")
        project = all(pair.activation is Op.IDENTITY for pair in pairs) and behind_depthwise(self.graph, node)
        return Candidate(layer, pairs, project)

    def _check_role(self, layer: Layer) -> None:
        if used := self._used_twice(layer):
            raise _Ineligible(used)
        if layer.name in self.stems:
            raise _Ineligible("stem")
        if layer.name in self.classifiers:
            raise _Ineligible("classifier")
        if layer.depthwise:
            raise _Ineligible("depthwise")

    def _used_twice(self, layer: Layer) -> str:
        names = [node.name for node in self.nodes[layer.name]]
        return f"its weight {layer.weight} is used {len(names)} times: by {' and '.join(names)}" if names[1:] else ""

    def _norms(self, node: Node, layer: Layer) -> list[End]:
        """Return the norms that read the raw output: one right behind the layer, or several behind concatenations."""
        ends = norm_ends(self.graph, node)
        if not any(end.node.op is Op.BATCH_NORM for end in ends):
            raise _Ineligible("no BatchNorm behind it")
        for end in ends:
            if end.node.op is not Op.BATCH_NORM or end.node.norm is None:
                raise _Ineligible(_READER_WORDS.get(end.node.op, f"output read by {end.node.name} besides its norm"))
            if end.node.norm.channels != end.channels or (layer.op is Op.LINEAR and len(node.shape) != 2):
                raise _Ineligible(f"BatchNorm {end.node.norm.name} is over another axis than its channels")
            if shared := [name for name in end.node.norm.tensors if self.norm_tensors[name] > 1]:
                raise _Ineligible(f"{shared[0]} of its BatchNorm is used {self.norm_tensors[shared[0]]} times")
        behind = len(ends) == 1 and ends[0].raw
        if not behind and layer.taps == 1:
            raise _Ineligible("pointwise, and its norms are behind a concatenation or a pool")
        return ends

    def _normed_pairs(self, layer: Layer, node: Node) -> tuple[Pair, ...]:
        pairs: list[Pair] = []
        for end in self._norms(node, layer):
            assert end.node.norm is not None
            pairs += self._pairs(layer, end.node.norm.name, end.offset, layer_ends(self.graph, end.node))
        return tuple(pairs)

    def _bare_pairs(self, layer: Layer, node: Node) -> tuple[Pair, ...]:
        ends = bare_ends(self.graph, node, layer.out_channels)
        pairs = self._pairs(layer, "", 0, ends)
        if any(pair.activation is Op.IDENTITY for pair in pairs):
            raise _Ineligible(f"no activation between it and {pairs[0].high}")
        return tuple(pairs)

    def _pairs(self, layer: Layer, norm: str, offset: int, ends: list[End]) -> list[Pair]:
        for end in ends:
            self._check_reader(end)
        activations = {end.activation for end in ends}
        if not ends or len(activations) > 1:
            what = "its norm" if norm else "it"
            raise _Ineligible(f"{what} is read with different activations" if ends else "no layer reads it")
        readers = [end.node.layer.name for end in ends if end.node.layer is not None]
        because = _unfolded(activations.pop(), readers) if norm else "no norm to fold it into"
        return [
            Pair(layer.name, norm, end.activation, reader, offset, end.repeat, not because, because)
            for end, reader in zip(ends, readers, strict=True)
        ]

    def _check_reader(self, end: End) -> None:
        reader = end.node.layer
        if reader is None:
            what = f"output read by {end.node.name} ({end.node.target or end.node.op.value})"
            raise _Ineligible(_READER_WORDS.get(end.node.op, what))
        if used := self._used_twice(reader):
            raise _Ineligible(f"partner {reader.name}: {used}")
        if reader.in_channels != end.channels:
            raise _Ineligible(f"partner {reader.name} reads another axis than the channels")


def _unfolded(activation: Op, readers: list[str]) -> str:
    if activation not in HOMOGENEOUS:
        because = "the clip point would move" if activation is Op.RELU6 else "a factor would change it"
        return f"{activation.value}: {because}"
    if len(readers) > 1:
        return f"{len(readers)} layers read it: {', '.join(readers[:8])}"
    return ""
