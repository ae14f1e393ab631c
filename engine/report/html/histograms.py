"""Histograms of weights before and after, counted when a page is made, from artifacts and originals.

Nothing is kept for them at compression time: an artifact holds what came out, and the original's files are either still
what the artifact's key says they were or are not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifact.manifest import TENSORS, LayerEntry, Manifest, read_manifest
from ...errors import DfmpcError
from ...job.fields import IN_NORM
from ...job.sources import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    from ...artifact.tensors import TensorFile
    from ...models.reading import FileBytes

BINS = 64
_CHUNK = 2**22


@dataclass(frozen=True)
class HistogramSource:
    """One task's artifact."""

    plan: str
    folder: Path


@dataclass(frozen=True)
class Histogram:
    """Weights of one layer counted in 64 equal bins from -``edge`` to ``edge``; the two outer ones are open."""

    edge: float
    before: tuple[int, ...]
    """Empty where the original is not at hand."""
    after: Mapping[str, tuple[int, ...]]
    """By bit-plan."""


@dataclass(frozen=True)
class ModelHistograms:
    """One model's histograms by layer, and what kept others, or the original, from being shown."""

    layers: Mapping[str, Histogram] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Artifact:
    plan: str
    manifest: Manifest
    file: TensorFile

    def entry(self, layer: str) -> LayerEntry | None:
        return next((entry for entry in self.manifest.layers if entry.name == layer), None)

    def weight(self, entry: LayerEntry) -> Tensor:
        from ...artifact.loader import dequantize_layer  # noqa: PLC0415 - brings in torch

        return dequantize_layer(entry, {name: self.file.tensor(name) for name in entry.parts})


def histograms(source: ModelSource, tasks: Sequence[HistogramSource], layers: Sequence[str]) -> ModelHistograms:
    """Count the weights of ``layers`` (qualified names) of one model in every artifact of ``tasks``.

    The original's files are read and hashed in full, once. What cannot be read is left out and said in ``notes``.
    """
    notes: list[str] = []
    opened = [artifact for task in tasks if (artifact := _opened(task, notes)) is not None]
    original = _original(source, opened, notes) if opened and layers else {}
    found = {layer: _layer(layer, opened, original, notes) for layer in layers}
    there = {layer: histogram for layer, histogram in found.items() if histogram is not None}
    return ModelHistograms(there, tuple(dict.fromkeys(notes)))


def _opened(task: HistogramSource, notes: list[str]) -> _Artifact | None:
    from ...artifact.tensors import TensorFile  # noqa: PLC0415 - brings in torch

    try:
        return _Artifact(task.plan, read_manifest(task.folder), TensorFile(task.folder / TENSORS))
    except DfmpcError as error:
        notes.append(f"weights after {task.plan} are not shown: {error}")
        return None


def _original(source: ModelSource, artifacts: Sequence[_Artifact], notes: list[str]) -> Mapping[str, Tensor]:
    """Return the original's tensors, none where its files are not those that the artifacts were made from."""
    from ...models.checkpoint import read_checkpoint  # noqa: PLC0415 - brings in torch
    from ...models.locate import input_files  # noqa: PLC0415
    from ...models.reading import read_files  # noqa: PLC0415

    try:
        files = read_files(input_files(source))
        digests = [file.digest for file in files]
        if any(_digests(artifact.manifest) != digests for artifact in artifacts):
            notes.append(f"weights before are not shown: {files[0].path} has changed since it was compressed")
            return {}
        return _program_state(files[0]) if source.program else read_checkpoint(files)
    except (DfmpcError, MemoryError) as error:
        notes.append(f"weights before are not shown: {error}")
        return {}


def _program_state(file: FileBytes) -> Mapping[str, Tensor]:
    from ...models.program import load_program  # noqa: PLC0415 - takes seconds that a checkpoint needs not

    state: Mapping[str, Tensor] = load_program(file).state_dict
    return state


def _digests(manifest: Manifest) -> list[str]:
    source = manifest.ingredients.get("source")
    inputs = source.get("inputs") if isinstance(source, dict) else None
    return [str(item["digest"]) for item in inputs or () if isinstance(item, dict)] if isinstance(inputs, list) else []


def _layer(
    layer: str, artifacts: Sequence[_Artifact], original: Mapping[str, Tensor], notes: list[str]
) -> Histogram | None:
    after: dict[str, Tensor] = {}
    before: Tensor | None = None
    for artifact in artifacts:
        entry = artifact.entry(layer)
        if entry is None:
            continue
        try:
            after[artifact.plan] = artifact.weight(entry)
        except DfmpcError as error:
            notes.append(f"weights after {artifact.plan} are not shown: {error}")
            continue
        if entry.granularity == IN_NORM:
            notes.append(
                f"weights after {artifact.plan} are shown as stored, without the channels' scales that norms hold"
            )
        stored = original.get(entry.weight)
        before = stored if stored is not None and tuple(stored.shape) == entry.shape else before
    edges = [_absmax(weight) for weight in ([before] if before is not None else after.values())]
    if not edges:
        return None
    edge = max(edges) or 1.0
    counted = {plan: _counts(weight, edge) for plan, weight in after.items()}
    return Histogram(edge, () if before is None else _counts(before, edge), counted)


def _absmax(weight: Tensor) -> float:
    return float(weight.detach().abs().max()) if weight.numel() else 0.0


def _counts(weight: Tensor, edge: float) -> tuple[int, ...]:
    """Count exactly: in float64, a part of the weights at a time."""
    import torch  # noqa: PLC0415 - a page without histograms needs none

    total = torch.zeros(BINS, dtype=torch.float64)
    flat = weight.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        total += torch.histc(part.to(torch.float64).clamp(-edge, edge), BINS, -edge, edge)
    return tuple(int(count) for count in total)
