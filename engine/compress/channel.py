"""Calibrators that propagate a mean and a variance a channel: none, norm and analytic (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..job.calibrators import AnalyticCalibrator
from ..models.graph import Graph, Node, Norm
from .calibrate import InputMoments, LayerView, Statistics
from .gaussian import Moments
from .readers import heard_by_norms
from .state import State, image_state, propagate
from .taps import Taps, refine_mean


class ChannelMoments:
    """The states by node, and the ways through the graph; what a layer and a norm do is the subclass's."""

    rho = 0.5
    """Correlation between neighbouring positions, used by average pools."""

    def __init__(self, graph: Graph, tensor: Callable[[str], Tensor]) -> None:
        """Take the network and a reader of its original tensors (float64)."""
        self.graph, self.tensor = graph, tensor
        self.states: dict[str, State] = {}
        self.biases: dict[str, Tensor] = {}
        # what no norm hears of needs no moments, where there are norms
        self.heard = heard_by_norms(graph) or {node.name for node in graph.nodes}

    def input_moments(self, node: Node) -> InputMoments | None:  # noqa: ARG002 - the interface's signature
        """Channel moments say nothing of patches."""
        return None

    def through_layer(self, node: Node, view: LayerView) -> None:
        """Pass the state of the input through the layer, where it is known and anybody hears of it."""
        state = self.states[node.inputs[0]]
        self.biases[node.name] = view.bias
        known = node.name in self.heard and len(state.mean) == view.layer.in_channels
        self.states[node.name] = self._through(state, view) if known else image_state(view.layer.out_channels)

    def take_gain(self, node: Node) -> Tensor | None:
        """Return the root of the variances' ratio, and leave both networks with the original's."""
        state = self.states[node.name]
        known = (state.variance > 0) & (state.quantized_variance > 0)
        gain = torch.where(known, state.variance / torch.where(known, state.quantized_variance, 1.0), 1.0).sqrt()
        bias = self.biases[node.name]
        shift = (state.mean + state.shift - bias) * gain + bias - state.mean
        self.states[node.name] = replace(state, shift=shift, quantized_variance=state.quantized_variance * gain**2)
        return gain

    def take_shift(self, node: Node) -> Tensor | None:
        """Return the state's shift and leave none."""
        state = self.states[node.name]
        self.states[node.name] = replace(state, shift=torch.zeros_like(state.shift))
        return state.shift

    def restate(self, node: Node) -> Statistics:
        """Re-estimate from the input's state; behind the norm both networks have mean β and variance γ²."""
        norm, state = node.norm, self.states[node.inputs[0]]
        assert norm is not None
        state = state if len(state.mean) == norm.channels else image_state(norm.channels)
        old = Statistics(self.tensor(norm.running_mean), self.tensor(norm.running_var))
        self.states[node.name] = self._behind(norm, old)
        return self._restate(old, norm.eps, state)

    def propagate(self, node: Node) -> None:
        """Pass the states of the inputs on."""
        inputs = [self.states[name] for name in node.inputs]
        self.states[node.name] = propagate(node, inputs, self.rho, self.tensor)

    def _behind(self, norm: Norm, old: Statistics) -> State:
        gamma = self.tensor(norm.weight) if norm.weight else torch.ones_like(old.mean)
        beta = self.tensor(norm.bias) if norm.bias else torch.zeros_like(old.mean)
        return State.settled(Moments(beta, gamma.square()))

    def _through(self, state: State, view: LayerView) -> State:
        raise NotImplementedError

    def _restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:
        raise NotImplementedError


class KeepStatistics(ChannelMoments):
    """``none``: statistics stay as they are."""

    def take_gain(self, node: Node) -> Tensor | None:  # noqa: ARG002 - the interface's signature
        """Nothing is known of variances."""
        return None

    def take_shift(self, node: Node) -> Tensor | None:  # noqa: ARG002 - the interface's signature
        """Nothing is known of shifts."""
        return None

    def _through(self, state: State, view: LayerView) -> State:  # noqa: ARG002
        return image_state(view.layer.out_channels)

    def _restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:  # noqa: ARG002
        return statistics


class ScaleByNorm(ChannelMoments):
    """``norm``: behind a LOW layer μ̂ = μ r and σ̂ = σ r, r the ratio of the row norms (methods.md, section 2)."""

    def take_gain(self, node: Node) -> Tensor | None:  # noqa: ARG002 - the interface's signature
        """Nothing is known of variances."""
        return None

    def take_shift(self, node: Node) -> Tensor | None:  # noqa: ARG002 - the interface's signature
        """Nothing is known of shifts."""
        return None

    def _through(self, state: State, view: LayerView) -> State:  # noqa: ARG002
        """Carry r squared as the ratio of the variances to the norms that read this layer."""
        fresh = image_state(view.layer.out_channels)
        ratio = view.norm_ratio.square() if view.low else torch.ones_like(fresh.variance)
        return State(fresh.mean, fresh.variance, fresh.shift, ratio)

    def _restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:
        """Scale mean and sigma (with eps in it) by r."""
        ratio = (state.quantized_variance / state.variance.clamp_min(1e-300)).sqrt()
        variance = ((statistics.variance + eps) * ratio.square() - eps).clamp_min(0)
        return Statistics(statistics.mean * ratio, variance)


class PropagateMoments(ChannelMoments):
    """``analytic``: mean shift and variance ratio from channel moments propagated in closed form."""

    def __init__(self, graph: Graph, tensor: Callable[[str], Tensor], options: AnalyticCalibrator) -> None:
        """Take ρ and τ from the job's options."""
        super().__init__(graph, tensor)
        self.rho, self.tau = options.rho, options.tau

    def _through(self, state: State, view: LayerView) -> State:
        """Return the moments behind the layer: of W in the original network, of Ŵ in the quantized one."""
        original, quantized = view.taps()
        mean = self._input_mean(state, view, original)
        output = original.apply(mean)
        shift = quantized.apply(mean + state.shift) - output
        return State(
            output + view.bias,
            original.quadratic(state.variance, self.rho),
            shift,
            quantized.quadratic(state.quantized_variance, self.rho),
        )

    def _input_mean(self, state: State, view: LayerView, original: Taps) -> Tensor:
        if self.tau is None or view.observed is None:
            return state.mean
        target = view.observed.mean - view.bias
        mean = refine_mean(original, state.mean, state.variance, target, view.observed.variance, self.tau)
        if state.lower is not None or state.upper is not None:
            mean = mean.clamp(state.lower, state.upper)
        # One rounding to float32 hides the last bits in which a factorisation may differ between machines.
        return mean.float().double()

    def _restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:  # noqa: ARG002 - eps stays
        """Shift the mean; scale the variance by the ratio of the quadratic forms (1 where the original's is 0)."""
        known = state.variance > 0
        ratio = torch.where(known, state.quantized_variance / torch.where(known, state.variance, 1.0), 1.0)
        return Statistics(statistics.mean + state.shift, statistics.variance * ratio)
