"""The calibrator that a plan names, ready to walk over one model."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..job.calibrators import AnalyticCalibrator, NormCalibrator, SyntheticCalibrator
from ..job.calibrators import Calibrator as Options
from ..models.load import LoadedModel
from .calibrate import Calibrator
from .channel import KeepStatistics, PropagateMoments, ScaleByNorm
from .priors import normalise, synthetic_images
from .synthetic import SyntheticMoments

SMALL_IMAGES, LARGE_IMAGES = 256, 64
"""How many images are made where the job does not say: of up to 64 × 64 pixels, and of more."""
_SMALL = 64 * 64


def make_calibrator(model: LoadedModel, options: Options, device: str = "cpu") -> Calibrator:
    """Return the calibrator that ``options`` name for ``model``."""

    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    if isinstance(options, SyntheticCalibrator):
        return SyntheticMoments(model, make_images(model, options), options.seed, device)
    if isinstance(options, AnalyticCalibrator):
        return PropagateMoments(model.graph, tensor, options)
    known = ScaleByNorm if isinstance(options, NormCalibrator) else KeepStatistics
    return known(model.graph, tensor)


def make_images(model: LoadedModel, options: SyntheticCalibrator) -> Tensor:
    """Return the images that ``options`` ask for, normalised as the model's are: float32 [N, C, H, W]."""
    shape = tuple(model.input_shape[1:])
    count = options.images or (SMALL_IMAGES if prod(shape[1:]) <= _SMALL else LARGE_IMAGES)
    pixels = synthetic_images(options.prior, count, shape, options.seed)
    preprocess = model.source.preprocess
    mean, std = (preprocess.mean, preprocess.std) if preprocess and shape[0] == 3 else (None, None)
    return normalise(pixels, mean, std)
