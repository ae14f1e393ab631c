"""The calibrator that a plan names, ready to walk over one model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..job.calibrators import AnalyticCalibrator, NormCalibrator, SyntheticCalibrator
from ..job.calibrators import Calibrator as Options
from ..models.graph import Graph, Node
from ..models.load import LoadedModel
from .calibrate import Calibrator, InputMoments, LayerView
from .channel import KeepStatistics, PropagateMoments, ScaleByNorm
from .priors import distil, image_shape, normalise, synthetic_images
from .spectral.calibrator import SpectralMoments
from .synthetic import SyntheticMoments

SMALL_IMAGES, LARGE_IMAGES = 256, 64
"""How many images are made where the job does not say: of up to 64 × 64 pixels, and of more."""
_SMALL = 64 * 64
WIDEST_BYTES, FEWEST_IMAGES = 2**29, 8
"""Most bytes of one map over all images; both networks hold a few such maps at a time."""


def make_calibrator(model: LoadedModel, options: Options, device: str = "cpu") -> Calibrator:
    """Return the calibrator that ``options`` name for ``model``.

    Raises UnsupportedModelError where images are asked for and the model's input is none.
    """

    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    if isinstance(options, SyntheticCalibrator):
        return SyntheticMoments(model, make_images(model, options), options.seed, device)
    if isinstance(options, AnalyticCalibrator):
        if options.moments == "spectral":
            return Spectral(model.graph, tensor)
        return PropagateMoments(model.graph, tensor, options)
    known = ScaleByNorm if isinstance(options, NormCalibrator) else KeepStatistics
    return known(model.graph, tensor)


def sums_taps(options: Options) -> bool:
    """Tell whether the calibrator that ``options`` name asks for the tap sums of layers."""
    return isinstance(options, AnalyticCalibrator) and options.moments == "channel"


class Spectral(SpectralMoments):
    """``SpectralMoments`` as the walk over the graph wants it."""

    def __init__(self, graph: Graph, tensor: Callable[[str], Tensor]) -> None:
        """Take the network and a reader of its original tensors."""
        super().__init__(graph, tensor)
        self.biases: dict[str, Tensor] = {}

    def input_moments(self, node: Node) -> InputMoments | None:  # type: ignore[override]
        """Return H; None in front of a layer of which the model knows nothing."""
        assert node.layer is not None
        if self._entry(node, node.layer).window is None:
            return None
        return InputMoments(super().input_moments(node))

    def through_layer(self, node: Node, view: LayerView) -> None:  # type: ignore[override]
        """Take both networks through the layer."""
        original, quantized = (rows.cpu() for rows in view.rows())
        super().through_layer(node, original, quantized, view.bias)
        self.biases[node.name] = view.bias

    def take_gain(self, node: Node) -> Tensor | None:
        """Return the ratio of the outputs' standard deviations, and scale the quantized network's by it."""
        if not self._knows(node):
            return None
        before, after = self.original.fields[node.name], self.quantized.fields[node.name]
        wanted, found = before.total_variance.double(), after.total_variance.double()
        known = (wanted > 0) & (found > 0)
        gain = torch.where(known, wanted / torch.where(known, found, 1.0), 1.0).sqrt()
        self.quantized.fields[node.name] = after.scaled(gain).shifted(self.biases[node.name] * (1 - gain))
        return gain

    def take_shift(self, node: Node) -> Tensor | None:
        """Return the difference of the mean outputs, and take it from the quantized network's."""
        if not self._knows(node):
            return None
        before, after = self.original.fields[node.name], self.quantized.fields[node.name]
        shift = after.channel_mean - before.channel_mean
        self.quantized.fields[node.name] = after.shifted(-shift)
        return shift.double()

    def _knows(self, node: Node) -> bool:
        """Whether the field behind a layer has the layer's channels: over tokens those are another axis."""
        return node.layer is not None and self.original.fields[node.name].channels == node.layer.out_channels


def make_images(model: LoadedModel, options: SyntheticCalibrator) -> Tensor:
    """Return the images that ``options`` ask for, normalised as the model's are: float32 [N, C, H, W].

    Raises UnsupportedModelError where the model's input is no image.
    """
    shape = image_shape(model)
    wanted = options.images or _default_count(model)
    # an operation with the exported batch written into it takes whole batches only
    count = -(-wanted // model.input_shape[0]) * model.input_shape[0]
    prior = "leaves" if options.prior == "distilled" else options.prior
    pixels = _pixels(prior, count, shape, options.seed)
    preprocess = model.source.preprocess
    mean, std = (preprocess.mean, preprocess.std) if preprocess and shape[0] == 3 else (None, None)
    images = normalise(pixels, mean, std)
    if options.prior != "distilled":
        return images
    with torch.inference_mode(False), torch.enable_grad():
        batch = None if model.program is None else model.input_shape[0]
        return distil(model.module, images.clone(), seed=options.seed, batch=batch)


def _default_count(model: LoadedModel) -> int:
    """How many images the input's size suggests, fewer where the network's widest map would take too much memory."""
    count = SMALL_IMAGES if prod(model.input_shape[2:]) <= _SMALL else LARGE_IMAGES
    widest = max(4 * prod(node.shape[1:]) for node in model.graph.nodes)
    return min(count, max(FEWEST_IMAGES, WIDEST_BYTES // max(1, widest)))


@lru_cache(maxsize=2)
def _pixels(prior: str, count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Images for all bit-plans of a model, made once: 3 MiB for 256 of 32 × 32, 37 MiB for 64 of 224 × 224."""
    with torch.inference_mode(False):
        return synthetic_images(prior, count, shape, seed)
