"""The way of a small noise to the network's output, backwards: its gain as a matrix over channels behind every node.

With n the covariance over channels of a noise behind a node, tr(G n) is the noise-to-signal that it brings to the
output. A layer whose weights err independently a row injects a diagonal n, so its diagonal of G is what it
asks for; the rest of G matters because later layers mix channels: a trained network passes the directions in which
its signal lies and averages the others away, which the diagonal alone would not see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...models.graph import Layer, Node, Op
from ...models.load import LoadedModel
from ..activations import RANGES, hermite_coefficients
from ..gaussian import Moments
from ..rows import to_rows
from ..state import State

NOISE_RHO = 0.4
"""Correlation of a noise between neighbouring positions; signals are taken with 0.5, as in the calibrator analytic."""
WIDEST = 2048
"""Channels above which only the diagonal of G is kept."""
_ORDER = 12
"""Terms of the Hermite series by which the gain of a smooth activation is summed."""
_TINY = 1e-30


class Adjoint:
    """One backward pass; gains are float32 [C, C], or [C] where C is above WIDEST."""

    def __init__(self, model: LoadedModel, states: Mapping[str, State]) -> None:
        """Take the network and the original's moments behind every node."""
        self.model, self.states = model, states
        self.gains: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        """Return, by node of a weight layer, the gain of each output channel's own noise, float64 [out]."""
        found = {}
        for node in reversed(self.model.graph.nodes):
            gain = self._take(node)
            if node.layer is not None:
                found[node.name] = diagonal(gain).double()
            for name, part in zip(node.inputs, self._to_inputs(node, gain), strict=True):
                known = self.gains.get(name)
                self.gains[name] = part if known is None else known + part
        return found

    def _take(self, node: Node) -> Tensor:
        gain = self.gains.pop(node.name, None)
        channels = len(self.states[node.name].mean)
        return _uniform(channels, 0.0) if gain is None else gain

    def _variance(self, name: str) -> Tensor:
        return self.states[name].variance.float()

    def _to_inputs(self, node: Node, gain: Tensor) -> list[Tensor]:
        """Return the gain that ``node`` hands to each of its inputs."""
        states = [self.states[name] for name in node.inputs]
        widths = [len(state.mean) for state in states]
        if node.op is Op.OUTPUT:
            return [_uniform(len(s.mean), 1 / max(float(s.variance.sum()), _TINY)) for s in states]
        if node.layer is not None and widths[0] == node.layer.in_channels:
            weight = to_rows(self.model.state[node.layer.weight].float(), node.layer)
            return [through_layer(gain, weight, node.layer)]
        if node.norm is not None and widths[0] == node.norm.channels:
            return [scaled(gain, self._norm_factor(node))]
        if node.op in RANGES:
            return [through_activation(gain, node, states[0].moments)]
        found = self._reshaped(node, gain, widths)
        return found or [self._likewise(node, gain, name) for name in node.inputs]

    def _reshaped(self, node: Node, gain: Tensor, widths: list[int]) -> list[Tensor] | None:
        """Operations without weights whose channels are known to correspond; None for all others."""
        if node.op is Op.ADD and set(widths) == {len(gain)}:
            return [gain] * len(widths)
        if node.op is Op.CAT and sum(widths) == len(gain):
            return _blocks(gain, widths)
        if node.op is Op.PAD and widths[0] + sum(node.channel_pad) == len(gain):
            return [_blocks(gain, [node.channel_pad[0], widths[0], node.channel_pad[1]])[1]]
        if node.op is Op.MUL and len(widths) == 2 and set(widths) == {len(gain)}:
            return [_times(gain, self.states[name].moments) for name in reversed(node.inputs)]
        if node.op is Op.AVG_POOL and widths[0] == len(gain):
            return [gain * pool_gain(node.window)]
        if node.op is Op.FLATTEN and len(gain) % widths[0] == 0:
            return [_flattened(gain, widths[0])]
        return None

    def _norm_factor(self, node: Node) -> Tensor:
        norm = node.norm
        assert norm is not None
        sigma = (self.model.state[norm.running_var].float().clamp_min(0) + norm.eps).sqrt()
        return (self.model.state[norm.weight].float() if norm.weight else torch.ones_like(sigma)) / sigma

    def _likewise(self, node: Node, gain: Tensor, name: str) -> Tensor:
        """Keep the ratio of noise to signal: a channel's where the channels are the same, else that of the whole."""
        after, before = self._variance(node.name), self._variance(name)
        if len(after) == len(before):
            return scaled(gain, torch.where(before > 0, after / before.clamp_min(_TINY), 1.0).sqrt())
        relative = float((diagonal(gain) * after).sum()) if len(after) == len(gain) else float(diagonal(gain).sum())
        return _uniform(len(before), relative / max(float(before.sum()), _TINY))


def diagonal(gain: Tensor) -> Tensor:
    """Return the diagonal, [C]."""
    return gain.diagonal() if gain.dim() == 2 else gain


def scaled(gain: Tensor, factor: Tensor) -> Tensor:
    """Return D G D for a diagonal D, given as [C]."""
    return gain * factor.square() if gain.dim() == 1 else gain * factor * factor[:, None]


def through_layer(gain: Tensor, rows: Tensor, layer: Layer) -> Tensor:
    """Return (1 - ρ) Σ_t W_tᵀ G W_t + ρ Sᵀ G S, S = Σ_t W_t: the gain in front of a layer, ``rows`` [out, length]."""
    weight = rows.view(layer.out_channels, -1, layer.taps)
    sums = weight.sum(2)
    if layer.depthwise and layer.out_channels == layer.in_channels and gain.dim() == 2:
        weight = weight[:, 0]
        return gain * torch.lerp(weight @ weight.T, torch.outer(sums[:, 0], sums[:, 0]), NOISE_RHO)
    if layer.taps == 1:
        return _form(gain, sums, layer.groups)
    apart = sum(_form(gain, weight[:, :, tap], layer.groups) for tap in range(layer.taps))
    return torch.lerp(torch.as_tensor(apart), _form(gain, sums, layer.groups), NOISE_RHO)


def _form(gain: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Wᵀ G W of a weight [out, in / groups], or its diagonal where the inputs are too many."""
    blocks = weight.view(groups, -1, weight.shape[1])
    inputs = groups * weight.shape[1]
    if gain.dim() == 1 and inputs > WIDEST:
        return (blocks.square() * gain.view(groups, -1, 1)).sum(1).flatten()
    if gain.dim() == 1:
        own = blocks.transpose(1, 2) @ (blocks * gain.view(groups, -1, 1))
        return torch.as_tensor(torch.block_diag(*own))  # type: ignore[no-untyped-call]  # bare in torch
    behind = torch.einsum("ahp,hpj->ahj", gain.view(len(gain), groups, -1), blocks).reshape(groups, -1, inputs)
    if inputs > WIDEST and groups == 1:
        return (behind[0] * weight).sum(0)
    found = torch.einsum("gob,goi->gib", behind, blocks).reshape(inputs, inputs)
    return found.diagonal() if inputs > WIDEST else found


def through_activation(gain: Tensor, node: Node, moments: Moments) -> Tensor:
    """Channels are independent, so E[f'_i f'_j] G_ij is E[f'_i] E[f'_j] G_ij off the diagonal."""
    slopes = activation_slopes(node, moments)
    before = scaled(gain, slopes.mean.float())
    extra = slopes.variance.float() * diagonal(gain)
    return before + (extra if gain.dim() == 1 else torch.diag(extra))


def pool_gain(window: int) -> float:
    """Return what is left of a noise's variance behind an average over a square ``window``.

    Positions correlate by ρ to the power of their distance along each axis: a large window averages noise away.
    """
    side = max(1, round(math.sqrt(window)))
    near = sum((side - distance) * NOISE_RHO**distance for distance in range(1, side))
    return ((side + 2 * near) / side**2) ** 2


def activation_slopes(node: Node, moments: Moments) -> Moments:
    """Return mean and variance of f'(x) for x ~ N(mean, variance), float64 [C].

    Φ-terms for ReLU, ReLU6 and LeakyReLU; otherwise a_1/s and Σ_{j≥2} j a_j² / j! / s² over Hermite coefficients.
    """
    sd = moments.variance.clamp_min(1e-24).sqrt()
    if node.op in (Op.RELU, Op.LEAKY_RELU, Op.RELU6):
        share = _cdf(moments.mean / sd) - (_cdf((moments.mean - 6) / sd) if node.op is Op.RELU6 else 0)
        step = 1 - (node.slope if node.op is Op.LEAKY_RELU else 0.0)
        return Moments(1 - step + step * share, step * step * share * (1 - share))
    coefficients = hermite_coefficients(node, moments.mean, sd, _ORDER) / sd
    weights = torch.tensor([1 / math.factorial(j - 1) for j in range(2, _ORDER + 1)], dtype=torch.float64)
    return Moments(coefficients[1], (coefficients[2:].square() * weights[:, None]).sum(0))


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _uniform(channels: int, value: float) -> Tensor:
    gain = torch.full((channels,), value)
    return gain if channels > WIDEST else torch.diag(gain)


def _blocks(gain: Tensor, widths: list[int]) -> list[Tensor]:
    """Return the diagonal blocks: noises of different parts do not correlate."""
    ends = [sum(widths[: index + 1]) for index in range(len(widths))]
    parts = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    return [_fitted(gain[part] if gain.dim() == 1 else gain[part, part]) for part in parts]


def _fitted(gain: Tensor) -> Tensor:
    """A part of a diagonal becomes a matrix again where there is room."""
    return torch.diag(gain) if gain.dim() == 1 and len(gain) <= WIDEST else gain


def _times(gain: Tensor, other: Moments) -> Tensor:
    """Behind a product with an independent factor: mean times mean, and its variance on the diagonal."""
    extra = other.variance.float() * diagonal(gain)
    return scaled(gain, other.mean.float()) + (extra if gain.dim() == 1 else torch.diag(extra))


def _flattened(gain: Tensor, channels: int) -> Tensor:
    """Positions of a channel became neighbours, which correlate by ρ."""
    if gain.dim() == 1:
        return _fitted(gain.view(channels, -1).sum(1))
    positions = len(gain) // channels
    split = gain.view(channels, positions, channels, positions)
    return torch.lerp(split.diagonal(dim1=1, dim2=3).sum(-1), split.sum((1, 3)), NOISE_RHO)
