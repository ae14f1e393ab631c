"""What an evaluation depends on, apart from the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..job.expand import ModelSource
from ..job.schema import Evaluate, Preprocess

NOISE_VERSION = 2
"""Enters the key of every evaluation on noise: bumped when the images of noise.py change."""
NOISE_IMAGES = 64
LARGE_NOISE_IMAGES = 32
LARGE_INPUT = 128
"""Pixels a side from which an input is large: fewer noise images, and smaller batches to bound the memory."""


def is_large(shape: Sequence[int]) -> bool:
    """Tell whether an input of ``shape`` (C, H, W) has LARGE_INPUT or more pixels a side."""
    return len(shape) > 1 and max(shape[1:]) >= LARGE_INPUT


@dataclass(frozen=True)
class EvaluationSettings:
    """How a network and its compressed form are compared: on labelled images, or without ``data`` on noise."""

    shape: tuple[int, ...]
    """Shape of one input, without the batch: (C, H, W) for images."""
    preprocess: Preprocess
    data: Path | None = None
    limit: int | None = None
    hold_out: int | None = None
    top5: bool = False
    """Whether top-5 is reported; it is measured and cached all the same."""
    seed: int = 0
    noise_count: int = NOISE_IMAGES
    model: str = field(default="the network", compare=False)
    """How error texts call the network; enters no key."""

    @property
    def batch_size(self) -> int:
        """Return the images a forward pass; it depends on nothing else, since the last bits of logits depend on it."""
        return 16 if is_large(self.shape) else 64

    @property
    def measured_on(self) -> str:
        """Return images or noise."""
        return "noise" if self.data is None else "images"

    def ingredients(self) -> dict[str, Any]:
        """Return what enters the evaluation's key: all that changes a figure, but not where the data lies."""
        found: dict[str, Any] = {"measured_on": self.measured_on, "shape": list(self.shape)}
        if self.data is None:
            # Noise has the network's own size: of the preprocessing only mean and std touch it.
            touched = self.preprocess.model_dump(mode="json", include={"mean", "std"})
            return found | touched | {"seed": self.seed, "count": self.noise_count, "noise_version": NOISE_VERSION}
        return found | self.preprocess.model_dump(mode="json") | {"limit": self.limit, "hold_out": self.hold_out}


def settings_for(
    evaluate: Evaluate | None,
    source: ModelSource,
    input_shape: Sequence[int],
    seed: int = 0,
    folder: Path | None = None,
) -> EvaluationSettings:
    """Return the settings of one model.

    ``evaluate`` is the job's block or None (noise images), ``source.preprocess`` the model's effective preprocessing,
    ``input_shape`` its example input with the batch first, ``folder`` the job file's folder, to which a relative
    ``evaluate.data`` belongs.
    """
    shape = tuple(int(size) for size in input_shape[1:])
    preprocess = source.preprocess or evaluate or Preprocess.model_validate({})
    # An Evaluate is a Preprocess too, and its other fields are no preprocessing.
    preprocess = Preprocess.model_validate({name: getattr(preprocess, name) for name in Preprocess.model_fields})
    count = LARGE_NOISE_IMAGES if is_large(shape) else NOISE_IMAGES
    if evaluate is None:
        return EvaluationSettings(shape, preprocess, seed=seed, noise_count=count, model=source.name)
    data = Path(folder or "", evaluate.data)
    return EvaluationSettings(
        shape,
        preprocess,
        data,
        limit=evaluate.limit,
        hold_out=evaluate.hold_out,
        top5="top5" in evaluate.metrics,
        seed=seed,
        noise_count=count,
        model=source.name,
    )
