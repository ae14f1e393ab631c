"""Calibrators: how BatchNorm statistics of a quantized network are re-estimated without data, one interface.

A calibrator sees every weight layer in graph order (``through_layer``) and every norm (``restate``); between them the
states travel by ``state.propagate``. Formulas: docs/methods.md, "Calibrators".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..job.calibrators import AnalyticCalibrator, NoCalibrator, NormCalibrator
from ..models.graph import Layer
from .gaussian import Moments
from .state import State, image_state
from .taps import Taps, refine_mean


@dataclass(frozen=True)
class Statistics:
    """Running statistics of a norm, float64 [C]; ``variance`` without eps."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class LayerView:
    """What a calibrator may ask of one layer. Norms and taps are those of the weight with c in it."""

    layer: Layer
    low: bool
    bias: Tensor
    """float64 [out]; zeros where the layer has none."""
    observed: Statistics | None
    """Statistics of the layer's output in the original network (variance with eps), where a norm states them."""
    norm_ratio: Tensor
    """Norm of the quantized over norm of the original row, float64 [out]; 1 for a zero row."""
    taps: Callable[[], tuple[Taps, Taps]]
    """Original and quantized tap sums; computed only when asked for."""


class Calibrator(Protocol):
    """What the walk over the graph needs of a calibrator."""

    rho: float
    """Correlation between neighbouring positions, used by average pools."""

    def through_layer(self, state: State, view: LayerView) -> State:
        """Return the state behind a weight layer."""

    def restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:
        """Return a norm's statistics for the quantized network; ``state`` is that of its input."""


class KeepStatistics:
    """``none``: statistics stay as they are."""

    rho = 0.5

    def through_layer(self, state: State, view: LayerView) -> State:  # noqa: ARG002 - the interface's signature
        """Nothing is propagated."""
        return image_state(view.layer.out_channels)

    def restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:  # noqa: ARG002
        """Return the statistics unchanged."""
        return statistics


class ScaleByNorm:
    """``norm``: behind a LOW layer μ̂ = μ r and σ̂ = σ r, r the ratio of the row norms (methods.md, section 2)."""

    rho = 0.5

    def through_layer(self, state: State, view: LayerView) -> State:  # noqa: ARG002 - the interface's signature
        """Carry r squared as the ratio of the variances to the norms that read this layer."""
        fresh = image_state(view.layer.out_channels)
        ratio = view.norm_ratio.square() if view.low else torch.ones_like(fresh.variance)
        return State(fresh.mean, fresh.variance, fresh.shift, ratio)

    def restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:
        """Scale mean and sigma (with eps in it) by r."""
        ratio = (state.quantized_variance / state.variance.clamp_min(1e-300)).sqrt()
        variance = ((statistics.variance + eps) * ratio.square() - eps).clamp_min(0)
        return Statistics(statistics.mean * ratio, variance)


class PropagateMoments:
    """``analytic``: mean shift and variance ratio from channel moments propagated in closed form."""

    def __init__(self, options: AnalyticCalibrator) -> None:
        """Take ρ and τ from the job's options."""
        self.rho, self.tau = options.rho, options.tau

    def through_layer(self, state: State, view: LayerView) -> State:
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

    def restate(self, statistics: Statistics, eps: float, state: State) -> Statistics:  # noqa: ARG002 - eps stays untouched
        """Shift the mean; scale the variance by the ratio of the quadratic forms (1 where the original's is 0)."""
        known = state.variance > 0
        ratio = torch.where(known, state.quantized_variance / torch.where(known, state.variance, 1.0), 1.0)
        return Statistics(statistics.mean + state.shift, statistics.variance * ratio)


def make_calibrator(options: AnalyticCalibrator | NormCalibrator | NoCalibrator) -> Calibrator:
    """Return the calibrator that ``options`` name."""
    if isinstance(options, AnalyticCalibrator):
        return PropagateMoments(options)
    return ScaleByNorm() if isinstance(options, NormCalibrator) else KeepStatistics()


def behind_norm(gamma: Tensor, beta: Tensor) -> State:
    """Return the state behind a re-estimated norm: mean β and variance γ² in both networks."""
    return State.settled(Moments(beta, gamma.square()))
