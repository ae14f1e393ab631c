"""What is known of a tensor on its way through the graph: channel moments, and how quantization moved them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.graph import Node, Op
from . import gaussian


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

    def map(self, mean: Tensor, gain: Tensor) -> State:
        """This state with another mean, and both variances times ``gain``."""
        return State(mean, self.variance * gain, self.shift, self.quantized_variance * gain, self.lower, self.upper)


def image_state(channels: int) -> State:
    """Mean 0 and variance 1: an image after its normalisation."""
    zeros = torch.zeros(channels, dtype=torch.float64)
    return State.settled(gaussian.Moments(zeros, torch.ones_like(zeros)))


def _activate(node: Node, moments: gaussian.Moments) -> gaussian.Moments:
    if node.op is Op.RELU:
        return gaussian.relu(moments)
    return gaussian.relu6(moments) if node.op is Op.RELU6 else gaussian.leaky_relu(moments, node.slope)


def _activation(node: Node, state: State) -> State:
    after = _activate(node, state.moments)
    quantized = _activate(node, gaussian.Moments(state.mean + state.shift, state.quantized_variance))
    lower = None if node.op is Op.LEAKY_RELU else 0.0
    upper = 6.0 if node.op is Op.RELU6 else None
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


def propagate(node: Node, inputs: Sequence[State], rho: float) -> State:
    """Return the state behind ``node``, which is neither a weight layer nor a norm.

    Averages keep the mean and leave rho + (1 - rho) / window of the variance (neighbours correlate by ``rho``); a
    max-pool keeps both. An operation of unknown kind keeps its first input's moments where the channels agree, and is
    otherwise taken as a fresh image.
    """
    channels = node.shape[1] if len(node.shape) > 1 else 1
    if node.op is Op.INPUT or not inputs:
        return image_state(channels)
    first = inputs[0]
    if node.op in (Op.RELU, Op.RELU6, Op.LEAKY_RELU):
        return _activation(node, first)
    if node.op is Op.ADD and len({len(state.mean) for state in inputs}) == 1:
        return _add(inputs)
    if node.op is Op.CAT:
        return _cat(inputs)
    if node.op is Op.PAD and node.channel_pad != (0, 0):
        return _pad(node, first)
    if node.op is Op.AVG_POOL:
        gain = torch.full_like(first.variance, rho + (1 - rho) / max(1, node.window))
        return first.map(first.mean, gain)
    if node.op is Op.FLATTEN and channels != len(first.mean) and channels % len(first.mean) == 0:
        return _repeat(first, channels // len(first.mean))
    return first if len(first.mean) == channels else image_state(channels)
