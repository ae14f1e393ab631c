"""How well a compressed network does, cached so that nothing is evaluated twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..artifact.storage import write_atomically
from ..errors import DataError
from . import metrics
from .cache import EvaluationCache, Scores
from .forward import logits
from .images import ImageSet, batches, read_images
from .settings import EvaluationSettings
from .synthetic import fidelity_images


def evaluate_artifact(
    artifact: Callable[[], nn.Module],
    original: Callable[[], nn.Module],
    settings: EvaluationSettings,
    *,
    store: Path,
    artifact_key: str,
    model_key: str,
    device: str = "cpu",
    divisor: int = 1,
) -> Scores:
    """Return the scores of one artifact against its original network.

    ``artifact`` and ``original`` build the modules and are called only where ``<store>/evaluations/`` does not have
    the scores or the original's logits: the original is evaluated once for all of a model's artifacts and runs.
    ``model_key`` identifies the original (digest of its inputs and factory), ``artifact_key`` the artifact. Batches
    are divided by ``divisor`` where the device's memory is short, which may show in the last bits of logits.

    Raises DataError where the images cannot be used, NonFiniteError where a network gives NaN or Inf,
    UnsupportedModelError where it gives no logits, StorageError where the cache cannot be written.
    """
    cache = EvaluationCache(store, settings)
    scores = cache.scores(artifact_key)
    if scores is not None:
        return scores
    images = None if settings.data is None else read_images(settings.data, settings.limit, settings.hold_out)
    before = _original_logits(cache.logits_file(model_key, device), original, settings, images, device, divisor)
    after = logits(artifact(), _batches(settings, images, divisor), device, name="the compressed network")
    return cache.keep(artifact_key, _compare(before, after, settings, images))


def _compare(before: Tensor, after: Tensor, settings: EvaluationSettings, images: ImageSet | None) -> Scores:
    if before.shape != after.shape:
        raise DataError(f"the original's logits are {tuple(before.shape)}, the artifact's {tuple(after.shape)}")
    sqnr = metrics.logit_sqnr_db(before, after)
    scores = Scores(
        agreement=metrics.agreement(before, after),
        kl=metrics.kl_nats(before, after),
        logit_sqnr_db=sqnr if math.isfinite(sqnr) else None,
        images=settings.synthetic_count if images is None else len(images),
        measured_on=settings.measured_on,
    )
    return scores if images is None else _with_accuracy(scores, before, after, images, settings.model)


def _with_accuracy(scores: Scores, before: Tensor, after: Tensor, images: ImageSet, network: str) -> Scores:
    classes, labels = before.shape[1], images.labels
    if len(before) != len(labels):
        raise DataError(f"{images.path}: {len(labels)} labels for {len(before)} rows of logits: drop evaluate.data")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        wrong = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise DataError(
            f"evaluate.data {images.path} row {wrong}: label {int(labels[wrong])}, {network} has {classes} classes: "
            "give the images this network was trained on, or run it in a job without evaluate"
        )
    scores = replace(scores, top1_before=metrics.top_k(before, labels, 1), top1_after=metrics.top_k(after, labels, 1))
    if classes <= 5:
        return scores
    return replace(scores, top5_before=metrics.top_k(before, labels, 5), top5_after=metrics.top_k(after, labels, 5))


def _original_logits(
    file: Path,
    original: Callable[[], nn.Module],
    settings: EvaluationSettings,
    images: ImageSet | None,
    device: str,
    divisor: int,
) -> Tensor:
    cached = _cached_logits(file)
    if cached is not None:
        return cached
    found = logits(original(), _batches(settings, images, divisor), device, name="the original network")
    write_atomically(file, save({"logits": found}))
    return found


def _batches(settings: EvaluationSettings, images: ImageSet | None, divisor: int) -> Iterator[Tensor]:
    size = max(1, settings.batch_size // divisor)
    if images is not None:
        for batch in batches(images, settings.preprocess, size, settings.shape):
            yield batch.images
        return
    made = _synthetic(settings)
    for start in range(0, len(made), size):
        yield made[start : start + size]


def _synthetic(settings: EvaluationSettings) -> Tensor:
    chosen = settings.preprocess
    # A job's mean and std speak of three colours: another input gets standardised images.
    mean, std = (chosen.mean, chosen.std) if settings.shape[0] == 3 else (None, None)
    return _kept_images(settings.synthetic_count, settings.shape, settings.seed, mean, std)


_kept_images = lru_cache(maxsize=2)(fidelity_images)
"""The images of one registry mostly have one size; making them costs as much as a small network's forward pass."""


def _cached_logits(file: Path) -> Tensor | None:
    try:
        return load_file(file)["logits"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
