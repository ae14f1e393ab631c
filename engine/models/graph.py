"""The captured network as plain data: what pairs, calibrators and reports read, without torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property


class Op(StrEnum):
    """What a node does, as far as pairing and moment propagation care."""

    INPUT = "input"
    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    BATCH_NORM = "batch_norm"
    RELU = "relu"
    RELU6 = "relu6"
    LEAKY_RELU = "leaky_relu"
    SILU = "silu"
    GELU = "gelu"
    """x Φ(x); its tanh approximation (at most 5e-4 away) too."""
    HARDSWISH = "hardswish"
    """x relu6(x + 3) / 6."""
    HARDSIGMOID = "hardsigmoid"
    """relu6(x + 3) / 6."""
    SIGMOID = "sigmoid"
    TANH = "tanh"
    IDENTITY = "identity"
    """Changes no value: dropout in eval mode, contiguous, clone, a no-op pad, a spatial slice (subsampling)."""
    ADD = "add"
    MUL = "mul"
    """Product of two activations of one shape, or of a map and a gate with one value a channel (squeeze and excite)."""
    AFFINE = "affine"
    """Scale and offset a channel, by numbers or by parameters (a layer scale); ``affine`` says which."""
    LIVE_NORM = "live_norm"
    """LayerNorm over the last axis, GroupNorm, InstanceNorm: statistics of the batch itself, ``live_norm``."""
    CAT = "cat"
    """Concatenation along the channel axis."""
    AVG_POOL = "avg_pool"
    """Average over a window or, with ``window`` the whole map, a mean over space."""
    MAX_POOL = "max_pool"
    FLATTEN = "flatten"
    """[N, C, ...] to [N, C * space]: every channel becomes ``space`` neighbouring features."""
    PAD = "pad"
    """Zero padding of space (``channel_pad`` = (0, 0)) or of channels."""
    OTHER = "other"
    """Anything else; ``target`` names the ATen operator."""
    OUTPUT = "output"


@dataclass(frozen=True)
class Layer:
    """A weight layer. Rows are output channels, a row holds ``in_channels / groups * taps`` weights."""

    name: str
    """The module's qualified name: the weight's name less its last part."""
    weight: str
    """Name of the weight in the state dict."""
    bias: str | None
    op: Op
    shape: tuple[int, ...]
    """The weight's shape as stored: conv [O, I/g, *k], transposed conv [I, O/g, *k], linear [O, I]."""
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    @property
    def out_channels(self) -> int:
        """Rows of the weight."""
        return self.shape[1] * self.groups if self.op is Op.CONV_TRANSPOSE else self.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels (or features) of the input."""
        return self.shape[0] if self.op is Op.CONV_TRANSPOSE else self.shape[1] * self.groups

    @property
    def taps(self) -> int:
        """Kernel positions: 1 for a linear layer or a pointwise convolution."""
        taps = 1
        for size in self.shape[2:]:
            taps *= size
        return taps

    @property
    def depthwise(self) -> bool:
        """One input channel a group, and more than one group."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def length(self) -> int:
        """Weights a row."""
        return self.in_channels // self.groups * self.taps

    @property
    def params(self) -> int:
        """Weights in all."""
        return self.out_channels * self.length


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in eval mode; ``weight`` and ``bias`` are None where it is not affine."""

    name: str
    weight: str | None
    bias: str | None
    running_mean: str
    running_var: str
    eps: float
    channels: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors in the state dict."""
        return tuple(name for name in (self.weight, self.bias, self.running_mean, self.running_var) if name)


@dataclass(frozen=True)
class Affine:
    """``scale * weight * x + bias + offset``; weight and bias name tensors of one value a channel, or are None."""

    scale: float = 1.0
    offset: float = 0.0
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class LiveNorm:
    """A norm of the values at hand: every channel group to mean 0 and variance 1, then weight and bias."""

    weight: str | None
    bias: str | None
    eps: float
    channels: int
    groups: int = 1


@dataclass(frozen=True)
class Node:
    """One operation. ``inputs`` are names of earlier nodes; ``shape`` is the output's for the example input."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    target: str = ""
    layer: Layer | None = None
    norm: Norm | None = None
    """A BatchNorm, and no other kind of norm."""
    live_norm: LiveNorm | None = None
    affine: Affine | None = None
    slope: float = 0.0
    """Negative slope of a leaky ReLU."""
    window: int = 1
    """Elements a pooling window."""
    channel_pad: tuple[int, int] = (0, 0)
    """Zero channels put before and after by PAD."""


@dataclass(frozen=True)
class Graph:
    """The nodes in execution order, inputs before users."""

    nodes: tuple[Node, ...]
    reads: Mapping[str, int] = field(default_factory=dict)
    """How many operations of the program read each tensor of the state dict, a view or a tied name among them."""

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Node by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """Who reads a node's output, in execution order (a reader that uses it twice counts once)."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every weight layer once, in execution order."""
        return tuple(dict.fromkeys(node.layer for node in self.nodes if node.layer is not None))


@dataclass(frozen=True)
class Pair:
    """A LOW layer, the norm and activation behind it, and one HIGH layer that consumes it.

    ``offset`` is where the LOW layer's channels begin among the norm's channels and the HIGH layer's inputs (not 0
    behind a concatenation). ``repeat`` is how many neighbouring inputs of a linear HIGH layer one channel became by
    flattening a map.
    """

    low: str
    norm: str
    """Empty in a network without BatchNorm, where the activation follows the LOW layer itself."""
    activation: Op
    high: str
    offset: int = 0
    repeat: int = 1
    folds: bool = False
    """True where the coefficient may go into the norm's weight and bias."""
    unfolded_because: str = ""


@dataclass(frozen=True)
class Pairing:
    """All pairs of a graph, and for every layer that is LOW in none why not."""

    pairs: tuple[Pair, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def lows(self) -> frozenset[str]:
        """Names of the LOW layers."""
        return frozenset(pair.low for pair in self.pairs)

    @cached_property
    def highs(self) -> frozenset[str]:
        """Names of the HIGH layers."""
        return frozenset(pair.high for pair in self.pairs)
