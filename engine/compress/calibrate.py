"""Calibrators: how norm statistics of a quantized network are re-estimated without data, one interface.

A calibrator carries the original and the quantized network side by side through the captured graph, node by node in
execution order. It tells what rounding wants to know of a layer's input, and what a norm's statistics have become.
Implementations: ``channel`` (none, norm, analytic by channel moments), ``spectral`` (analytic by cross-spectra) and
``synthetic`` (forward passes over images made from no data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..models.graph import Layer, Node
from .taps import Taps


@dataclass(frozen=True)
class Statistics:
    """Running statistics of a norm, float64 [C]; ``variance`` without eps."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class LayerView:
    """What a calibrator may ask of one layer once it is quantized. Everything has c in the quantized weight."""

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
    rows: Callable[[], tuple[Tensor, Tensor]]
    """Original and quantized weight, float32 [out, length]; computed only when asked for."""


@dataclass(frozen=True)
class InputMoments:
    """What rounding may know of a layer's input patches h and output t, float32 [groups, …], over all positions.

    K = in_channels / groups * taps in the order of ``rows.to_rows``.
    """

    second: Tensor
    """[groups, K, K]: H = Cov(h, h) in the quantized network."""
    cross: Tensor | None = None
    """[groups, out / groups, K]: Cov(t, h), t the output that the original network wants; None where unknown."""
    positions: int | None = None
    """How many positions the covariances were taken over; None where they are not sampled."""


class Calibrator(Protocol):
    """What the walk over the graph needs of a calibrator; every node is visited once by the method that fits it."""

    def input_moments(self, node: Node) -> InputMoments | None:
        """Return the second moments in front of a weight layer; None where this calibrator knows none."""

    def through_layer(self, node: Node, view: LayerView) -> None:
        """Carry both networks through a weight layer."""

    def take_gain(self, node: Node) -> Tensor | None:
        """Return sd of the original over the quantized output, float64 [out], and give both networks the former."""

    def take_shift(self, node: Node) -> Tensor | None:
        """Return mean output of the quantized less the original layer, float64 [out], and remove it from the former."""

    def restate(self, node: Node) -> Statistics:
        """Return a norm's statistics for the quantized network, and carry both networks through it."""

    def propagate(self, node: Node) -> None:
        """Carry both networks through a node that is neither a weight layer nor a norm."""
