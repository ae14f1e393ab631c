"""What is known of a tensor on its way through the graph: channel moments, and how quantization moved them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from dfmpc.kernels.sums import tree_sum
from torch import Tensor

from ..models.graph import Affine, LiveNorm, Node, Op
from . import gaussian
from .activations import RANGES, activate

ReadTensor = Callable[[str], Tensor]
"""Reads a tensor by its name in the state dict."""


@dataclass(frozen=True)
class State:
    """Per-channel moments of one tensor in the original network, and what the quantized one has instead.

    All float64 [C]. Behind a re-estimated norm both networks agree: ``shift`` 0, ``quantized_variance`` = ``variance``.
    """

    mean: Tensor
    variance: Tensor
    shift: Tensor
    """Mean in the quantized network less mean in the original one."""
    quantized_variance: Tensor
    lower: float | None = None
    """Least value the tensor can take (0 behind a ReLU)."""
    upper: float | None = None

    @staticmethod
    def settled(moments: gaussian.Moments, lower: float | None = None, upper: float | None = None) -> State:
        """A state on which both networks agree."""
        return State(
            moments.mean, moments.variance, torch.zeros_like(moments.mean), moments.variance, lower=lower, upper=upper
        )

    @property
    def moments(self) -> gaussian.Moments:
        """Mean and variance in the original network."""
        return gaussian.Moments(self.mean, self.variance)

    @property
    def quantized_moments(self) -> gaussian.Moments:
        """Mean and variance in the quantized network."""
        return gaussian.Moments(self.mean + self.shift, self.quantized_variance)

    @staticmethod
    def of(original: gaussian.Moments, quantized: gaussian.Moments) -> State:
        """The state of two networks' moments, without bounds."""
        return State(original.mean, original.variance, quantized.mean - original.mean, quantized.variance)

    def map(self, mean: Tensor, gain: Tensor) -> State:
        """This state with another mean, and both variances times ``gain``."""
        return State(mean, self.variance * gain, self.shift, self.quantized_variance * gain, self.lower, self.upper)


def image_state(channels: int) -> State:
    """Mean 0 and variance 1: an image after its normalisation."""
    zeros = torch.zeros(channels, dtype=torch.float64)
    return State.settled(gaussian.Moments(zeros, torch.ones_like(zeros)))


def _activation(node: Node, state: State) -> State:
    after = activate(node, state.moments)
    quantized = activate(node, state.quantized_moments)
    lower, upper = RANGES[node.op]
    return State(after.mean, after.variance, quantized.mean - after.mean, quantized.variance, lower, upper)


def _add(states: Sequence[State]) -> State:
    lower = sum(state.lower or 0.0 for state in states) if all(state.lower is not None for state in states) else None
    return State(
        sum((state.mean for state in states[1:]), states[0].mean),
        sum((state.variance for state in states[1:]), states[0].variance),
        sum((state.shift for state in states[1:]), states[0].shift),
        sum((state.quantized_variance for state in states[1:]), states[0].quantized_variance),
        lower,
    )


def _common(values: Sequence[float | None]) -> float | None:
    return values[0] if all(value == values[0] for value in values) else None


def _cat(states: Sequence[State]) -> State:
    return State(
        torch.cat([state.mean for state in states]),
        torch.cat([state.variance for state in states]),
        torch.cat([state.shift for state in states]),
        torch.cat([state.quantized_variance for state in states]),
        _common([state.lower for state in states]),
        _common([state.upper for state in states]),
    )


def _pad(node: Node, state: State) -> State:
    before, after = (torch.zeros(count, dtype=torch.float64) for count in node.channel_pad)
    zeros = [State(pad, pad, pad, pad, state.lower, state.upper) for pad in (before, after)]
    return _cat([zeros[0], state, zeros[1]])


def _repeat(state: State, times: int) -> State:
    return State(
        state.mean.repeat_interleave(times),
        state.variance.repeat_interleave(times),
        state.shift.repeat_interleave(times),
        state.quantized_variance.repeat_interleave(times),
        state.lower,
        state.upper,
    )


def _product(one: gaussian.Moments, other: gaussian.Moments) -> gaussian.Moments:
    """Moments of the product of independent factors."""
    spread = one.variance * other.mean.square() + other.variance * one.mean.square()
    return gaussian.Moments(one.mean * other.mean, one.variance * other.variance + spread)


def _square(factor: gaussian.Moments) -> gaussian.Moments:
    """Moments of a Gaussian's square: m² + v and 2v² + 4m²v."""
    square = factor.mean.square()
    return gaussian.Moments(square + factor.variance, 2 * factor.variance * (factor.variance + 2 * square))


def _multiply(node: Node, one: State, other: State) -> State:
    if node.inputs[0] == node.inputs[1]:
        return replace(State.of(_square(one.moments), _square(one.quantized_moments)), lower=0.0)
    found = State.of(_product(one.moments, other.moments), _product(one.quantized_moments, other.quantized_moments))
    return replace(found, lower=_least_product(one, other), upper=_largest_product(one, other))


def _least_product(one: State, other: State) -> float | None:
    """Least value of a product, where it follows from a gate that lies between 0 and a bound."""
    for gate, value in ((one, other), (other, one)):
        if gate.lower is None or gate.lower < 0 or value.lower is None:
            continue
        if value.lower >= 0:
            return gate.lower * value.lower
        if gate.upper is not None:
            return gate.upper * value.lower
    return None


def _largest_product(one: State, other: State) -> float | None:
    if one.upper is None or other.upper is None or one.lower is None or other.lower is None:
        return None
    return one.upper * other.upper if one.lower >= 0 and other.lower >= 0 else None


def _live_norm(norm: LiveNorm, state: State, tensor: ReadTensor) -> State:
    """Behind a norm of the values at hand: channels of a group keep their differences in mean and variance.

    A group's variance is the mean over its channels of v + (m - mean of m)²; an input of equal channels gives β and γ².
    """
    if len(state.mean) != norm.channels:
        state = image_state(norm.channels)
    gamma, beta = _parameter(norm.weight, 1.0, state, tensor), _parameter(norm.bias, 0.0, state, tensor)
    original, quantized = (
        gaussian.Moments(gamma * found.mean + beta, gamma.square() * found.variance)
        for found in (_standardised(norm, state.moments), _standardised(norm, state.quantized_moments))
    )
    return State.of(original, quantized)


def _standardised(norm: LiveNorm, moments: gaussian.Moments) -> gaussian.Moments:
    mean, variance = (values.view(norm.groups, -1) for values in (moments.mean, moments.variance))
    centred = mean - _group_mean(mean)
    spread = _group_mean(variance + centred.square()) + norm.eps
    spread = torch.where(spread > 0, spread, 1.0)
    return gaussian.Moments((centred / spread.sqrt()).flatten(), (variance / spread).flatten())


def _group_mean(values: Tensor) -> Tensor:
    return tree_sum(values, -1).unsqueeze(-1) / values.shape[-1]


def _affine(affine: Affine, state: State, tensor: ReadTensor) -> State:
    scale = affine.scale * _parameter(affine.weight, 1.0, state, tensor)
    mean = scale * state.mean + affine.offset + _parameter(affine.bias, 0.0, state, tensor)
    power = scale.square()
    return State(mean, power * state.variance, scale * state.shift, power * state.quantized_variance)


def _parameter(name: str | None, default: float, state: State, tensor: ReadTensor) -> Tensor:
    """Return a parameter's values, one a channel; ``default`` where there is none or it is over another axis."""
    values = tensor(name).double().flatten() if name else None
    return torch.full_like(state.mean, default) if values is None or len(values) != len(state.mean) else values


def propagate(node: Node, inputs: Sequence[State], rho: float, tensor: ReadTensor | None = None) -> State:
    """Return the state behind ``node``, which is neither a weight layer nor a BatchNorm.

    ``tensor`` reads a parameter by its name in the state dict (layer scales, LayerNorm); without it these are passed
    like an unknown operation. Averages keep the mean and leave rho + (1 - rho) / window of the variance (neighbours
    correlate by ``rho``); a max-pool keeps both. Factors of a product are taken as independent. An operation of unknown
    kind keeps its first input's moments where the channels agree (along axis 1, or along the last axis as in a
    transformer's tokens), and is otherwise taken as a fresh image.
    """
    if node.op is Op.INPUT or not inputs:
        return image_state(_channels(node))
    first = inputs[0]
    same = len({len(state.mean) for state in inputs}) == 1
    if node.op in RANGES:
        return _activation(node, first)
    if node.op is Op.ADD and same:
        return _add(inputs)
    if node.op is Op.MUL and same:
        return _multiply(node, first, inputs[-1])
    if node.live_norm is not None and tensor is not None:
        return _live_norm(node.live_norm, first, tensor)
    if node.affine is not None and tensor is not None:
        return _affine(node.affine, first, tensor)
    if node.op is Op.CAT:
        return _cat(inputs)
    return _rearranged(node, first, rho)


def _rearranged(node: Node, first: State, rho: float) -> State:
    """Padding, averages, flattening and what is not known."""
    channels = _channels(node)
    if node.op is Op.PAD and node.channel_pad != (0, 0):
        return _pad(node, first)
    if node.op is Op.AVG_POOL:
        gain = torch.full_like(first.variance, rho + (1 - rho) / max(1, node.window))
        return first.map(first.mean, gain)
    if node.op is Op.FLATTEN and channels != len(first.mean) and channels % len(first.mean) == 0:
        return _repeat(first, channels // len(first.mean))
    along_last = len(node.shape) > 2 and node.shape[-1] == len(first.mean)
    return first if len(first.mean) == channels or along_last else image_state(channels)


def _channels(node: Node) -> int:
    return node.shape[1] if len(node.shape) > 1 else 1
