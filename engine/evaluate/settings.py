"""What an evaluation depends on, apart from the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from ..job.schema import Evaluate, Preprocess
from ..job.sources import ModelSource

SYNTHETIC_VERSION = 3
"""Enters the key of every evaluation without labels: bumped when the images of synthetic.py or noise.py change."""
MOST_IMAGES, FEWEST_IMAGES = 128, 32
ALL_PIXELS = 64 * 224 * 224
"""Of all synthetic images of a network together, as far as their least number allows: forwarding them costs time."""
LARGE_INPUT = 128
"""Pixels a side from which an input is large: smaller batches bound the memory."""


def is_large(shape: Sequence[int]) -> bool:
    """Tell whether an input of ``shape`` (C, H, W) has LARGE_INPUT or more pixels a side."""
    return len(shape) > 1 and max(shape[1:]) >= LARGE_INPUT


def synthetic_count(shape: Sequence[int]) -> int:
    """Return how many images are made for an input of ``shape`` (C, H, W): 128, of 224 by 224 pixels 64."""
    return min(MOST_IMAGES, max(FEWEST_IMAGES, ALL_PIXELS // max(1, prod(shape[1:]))))


@dataclass(frozen=True)
class EvaluationSettings:
    """How a network and its compressed form are compared: on labelled images, or without ``data`` on made-up ones."""

    shape: tuple[int, ...]
    """Shape of one input, without the batch: (C, H, W) for images."""
    preprocess: Preprocess
    data: Path | None = None
    limit: int | None = None
    hold_out: int | None = None
    top5: bool = False
    """Whether top-5 is reported; it is measured and cached all the same."""
    seed: int = 0
    synthetic_count: int = MOST_IMAGES
    model: str = field(default="the network", compare=False)
    """How error texts call the network; enters no key."""

    @property
    def batch_size(self) -> int:
        """Return the images a forward pass; it depends on nothing else, since the last bits of logits depend on it."""
        return 16 if is_large(self.shape) else 64

    @property
    def measured_on(self) -> Literal["images", "synthetic"]:
        """Return images (labelled) or synthetic."""
        return "synthetic" if self.data is None else "images"

    def ingredients(self) -> dict[str, Any]:
        """Return what enters the evaluation's key: all that changes a figure, but not where the data lies."""
        found: dict[str, Any] = {"measured_on": self.measured_on, "shape": list(self.shape)}
        if self.data is None:
            # They have the network's own size: of the preprocessing only mean and std touch them.
            touched = self.preprocess.model_dump(mode="json", include={"mean", "std"})
            made = {"seed": self.seed, "count": self.synthetic_count, "synthetic_version": SYNTHETIC_VERSION}
            return found | touched | made
        return found | self.preprocess.model_dump(mode="json") | {"limit": self.limit, "hold_out": self.hold_out}


def settings_for(
    evaluate: Evaluate | None,
    source: ModelSource,
    input_shape: Sequence[int],
    seed: int = 0,
    folder: Path | None = None,
) -> EvaluationSettings:
    """Return the settings of one model.

    ``evaluate`` is the job's block or None (synthetic images), ``source.preprocess`` the model's effective
    preprocessing, ``input_shape`` its example input with the batch first, ``folder`` the job file's folder, to which a
    relative ``evaluate.data`` belongs.
    """
    shape = tuple(int(size) for size in input_shape[1:])
    preprocess = source.preprocess or evaluate or Preprocess.model_validate({})
    # An Evaluate is a Preprocess too, and its other fields are no preprocessing.
    preprocess = Preprocess.model_validate({name: getattr(preprocess, name) for name in Preprocess.model_fields})
    count = synthetic_count(shape)
    if evaluate is None:
        return EvaluationSettings(shape, preprocess, seed=seed, synthetic_count=count, model=source.name)
    data = Path(folder or "", evaluate.data)
    return EvaluationSettings(
        shape,
        preprocess,
        data,
        limit=evaluate.limit,
        hold_out=evaluate.hold_out,
        top5="top5" in evaluate.metrics,
        seed=seed,
        synthetic_count=count,
        model=source.name,
    )
