"""The synthetic tier: both networks forward the same images made from no data, node by node (docs/methods.md).

The original's norms use the statistics of the batch, so that every norm's output has exactly mean β and standard
deviation |γ|: most of what separates synthetic images from real ones goes away there.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import torch
from torch import Tensor

from ..models.execute import Executor
from ..models.graph import Graph, Node, Norm, Op
from ..models.load import LoadedModel
from .calibrate import InputMoments, LayerView, Statistics
from .patches import sampled_moments, window_of
from .rows import from_rows

RESIDUAL_SHARE = 0.5
"""How much of the error on the other operand of a residual add a branch is asked to make good."""
_TINY = 1e-3
"""Of |γ|, against the norm's mean |γ|: below it a channel passes no correction on."""
_ROUNDING = 1e-5
"""Of eps: batch variances below it are what float32 leaves of zero."""
_LARGEST_RATIO = 1e4
"""Of the two networks' variances; beyond it one of them is nothing but rounding."""


class SyntheticMoments:
    """A calibrator that knows everything a forward pass shows; see ``calibrate.Calibrator``."""

    def __init__(self, model: LoadedModel, images: Tensor, seed: int, device: str = "cpu") -> None:
        """Take normalised ``images``, float32 [N, C, H, W], which both networks will forward on ``device``."""
        self.graph, self.state = model.graph, model.state
        self.original = Executor(model.exported, model.state, model.graph, device)
        self.quantized = Executor(model.exported, model.state, model.graph, device)
        self.images, self.generator = images.to(device), torch.Generator().manual_seed(seed)
        self.values: dict[str, Tensor] = {}
        self.quantized_values: dict[str, Tensor] = {}
        self._left = Counter(source for node in model.graph.nodes for source in self.original.sources(node))

    def input_moments(self, node: Node) -> InputMoments | None:
        """Return covariances over sampled positions; None where patches of the layer cannot be taken.

        Over maps of one position (squeeze and excite) there are too few to tell what the output should be.
        """
        layer = node.layer
        assert layer is not None
        window = window_of(layer, self.original.arguments(node))
        if layer.op not in (Op.CONV, Op.LINEAR) or (window is None and layer.op is Op.CONV):
            return None
        target = self._original_output(node)
        target = target + self._residual(node, target)
        source = self.quantized_values[self.original.source(node)]
        found = sampled_moments(source, target, layer, window, self.generator)
        return found if prod(node.shape[2:]) > 1 or layer.op is Op.LINEAR else InputMoments(found.second)

    def through_layer(self, node: Node, view: LayerView) -> None:
        """Forward both networks, the quantized one with its new weight."""
        self._original_output(node)
        rows = view.rows()[1]
        self.quantized.replace(view.layer.weight, from_rows(rows, view.layer))
        self.quantized_values[node.name] = self.quantized.run(node, self.quantized_values)
        self._release(node)

    def take_gain(self, node: Node) -> Tensor | None:  # noqa: ARG002 - the interface's signature
        """Least squares restores the outputs already."""
        return None

    def take_shift(self, node: Node) -> Tensor | None:
        """Return the difference of the mean outputs, and let the quantized network go on without it."""
        assert node.layer is not None
        axis = -1 if node.layer.op is Op.LINEAR else 1
        before, after = self.values[node.name], self.quantized_values[node.name]
        shift = (after - before).movedim(axis, -1).flatten(0, -2).double().mean(0)
        shape = [1] * after.dim()
        shape[axis] = -1
        self.quantized_values[node.name] = after - shift.float().view(shape)
        return shift.cpu()

    def restate(self, node: Node) -> Statistics:
        """Shift and scale the stored statistics by what differs between the two networks on the batch."""
        norm = node.norm
        assert norm is not None
        source = self.original.source(node)
        before, after = self.values[source], self.quantized_values[source]
        self.values[node.name], mean, variance = self._normalise(before, norm)
        self.quantized_values[node.name], mean_q, variance_q = self._normalise(after, norm)
        self._release(node)
        stored = Statistics(*(self.state[name].double() for name in (norm.running_mean, norm.running_var)))
        return _restated(stored, norm.eps, mean, variance, mean_q, variance_q)

    def propagate(self, node: Node) -> None:
        """Run the operation in both networks."""
        if node.op is Op.INPUT:
            # each its own: a program may write into its input
            self.values[node.name], self.quantized_values[node.name] = self.images.clone(), self.images.clone()
            return
        if node.op is Op.OUTPUT:
            self._release(node)
            return
        self.values[node.name] = self.original.run(node, self.values)
        self.quantized_values[node.name] = self.quantized.run(node, self.quantized_values)
        self._release(node)

    def _original_output(self, node: Node) -> Tensor:
        if node.name not in self.values:
            self.values[node.name] = self.original.run(node, self.values)
        return self.values[node.name]

    def _normalise(self, value: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """Return the norm's output under the batch's statistics, and those: mean and variance, float64 [C]."""
        weight, bias = (self.state[name].to(value) if name else None for name in (norm.weight, norm.bias))
        output, mean, inverse = torch.native_batch_norm(value, weight, bias, None, None, True, 0.0, norm.eps)
        variance = inverse.double().pow(-2) - norm.eps
        return output, mean.double().cpu(), variance.clamp_min(0).cpu()

    def _residual(self, node: Node, target: Tensor) -> Tensor | float:
        """Return what a branch should add to make good the error of the operand it will be added to (section 5)."""
        found = residual_of(self.graph, node)
        if found is None:
            return 0.0
        norm, other = found
        if other not in self.values or norm.weight is None:
            return 0.0
        gamma = self.state[norm.weight].to(target)
        known = gamma.abs() > _TINY * gamma.abs().mean()
        axes = [0, *range(2, target.dim())]
        spread = (target.square().mean(axes) - target.mean(axes).square()).clamp_min(0).sqrt()
        gain = torch.where(known, spread / torch.where(known, gamma, 1.0), 0.0)
        shape = [1, -1] + [1] * (target.dim() - 2)
        error = self.values[other] - self.quantized_values[other]
        return RESIDUAL_SHARE * gain.view(shape) * error

    def _release(self, node: Node) -> None:
        """Forget what no later operation of the program reads."""
        for source in self.original.sources(node):
            self._left[source] -= 1
            if self._left[source] == 0:
                self.values.pop(source, None)
                self.quantized_values.pop(source, None)


def residual_of(graph: Graph, node: Node) -> tuple[Norm, str] | None:
    """Return the norm behind a branch's last layer, and the other operand of the residual add behind that norm.

    None where there is no such add, or where the operand is not what the branch itself began with (no identity).
    """
    users = graph.users[node.name]
    norm = users[0] if len(users) == 1 and users[0].norm is not None else None
    adds = graph.users[norm.name] if norm else ()
    if norm is None or norm.norm is None or len(adds) != 1 or adds[0].op is not Op.ADD:
        return None
    other = next((name for name in adds[0].inputs if name != norm.name), None)
    return (norm.norm, other) if other is not None and _is_ancestor(graph, other, node) else None


def _is_ancestor(graph: Graph, name: str, node: Node) -> bool:
    pending, seen = list(node.inputs), set()
    while pending:
        current = pending.pop()
        if current == name:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(graph.by_name[current].inputs)
    return False


def _restated(
    stored: Statistics, eps: float, mean: Tensor, variance: Tensor, mean_q: Tensor, variance_q: Tensor
) -> Statistics:
    """Return σ² r² and μ + (mean_Q - mean_F) σ / sd_F, with r² = var_Q / var_F; unchanged where F does not vary.

    A variance far below eps is nothing but rounding.
    """
    alive = (variance > 1e-12 * variance.mean()) & (variance > _ROUNDING * eps)
    ratio = torch.where(alive, variance_q / torch.where(alive, variance, 1.0), 1.0)
    ratio = ratio.clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
    sigma = (stored.variance.clamp_min(0) + eps).sqrt()
    unit = torch.where(alive, sigma / torch.where(alive, variance, 1.0).sqrt(), 0.0)
    return Statistics(stored.mean + (mean_q - mean) * unit, stored.variance * ratio)
