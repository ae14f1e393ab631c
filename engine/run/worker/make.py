"""The part of an attempt that computes: compress, load back, evaluate. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from dfmpc.kernels.warm import warm_kernels
from torch import nn

from ...artifact.loader import load
from ...artifact.manifest import Manifest
from ...compress.compress import compress_model
from ...compress.result import Compressed
from ...evaluate.cache import Scores
from ...evaluate.scores import evaluate_artifact
from ...evaluate.settings import EvaluationSettings
from ...job.task import Task
from ..messages import WorkerSettings
from ..shared import SharedModel


@cache
def prepare(device: str, threads: int) -> None:
    """Set torch up for this process, and have the kernels compiled for ``device`` where it is a GPU."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would bound every logit SQNR, and a CPU has 23
    if device.startswith("cuda"):
        warm_kernels(device)


def compress(task: Task, shared: SharedModel, device: str, threads: int) -> Compressed:
    """Load the task's model, unless that was done for another task, and compress it."""
    prepare(device, threads)
    return compress_model(shared.model(), task.plan, task.layers, device, threads)


def evaluate(
    manifest: Manifest,
    folder: Path,
    shared: SharedModel,
    settings: EvaluationSettings,
    *,
    store: Path,
    worker: WorkerSettings,
    device: str,
    divisor: int,
    loaded: Callable[[], None],
) -> Scores:
    """Compare what ``dfmpc.load`` makes of ``folder`` with the original; ``loaded`` is called once it is in memory."""
    prepare(device, worker.threads)

    def artifact() -> nn.Module:
        module = load(folder, allow_code=worker.allow_code)
        loaded()
        return module

    return evaluate_artifact(
        artifact=artifact,
        original=shared.original,
        settings=settings,
        store=store,
        artifact_key=manifest.key,
        model_key=shared.model_key(),
        device=device,
        divisor=divisor,
    )
