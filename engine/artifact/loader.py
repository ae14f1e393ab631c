"""From an artifact back to tensors and to a network, bit for bit what was evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from dfmpc.kernels import dequantize
from torch import Tensor, nn

from ..compress.rows import from_rows, scale_inputs
from ..errors import ArtifactError
from ..models.factory import AllowList
from ..models.load import rebuild_module
from .codes import shape_findings
from .latest import artifact_at
from .manifest import PARTS, TENSORS, LayerEntry, Manifest, file_findings, read_manifest
from .tensors import TensorFile


def load(path: str | Path, *, allow_code: Sequence[str] = ()) -> nn.Module:
    """Return the compressed network of the artifact ``path``, float32, on the CPU, in eval mode.

    ``path`` is an artifact's folder or a pointer ``STORE/latest/MODEL/PLAN``. ``allow_code`` adds to the module
    prefixes (or folders) whose factories may run. Raises ArtifactError where a file is missing or cut short,
    FactoryError where the factory may not or cannot run; digests are ``verify``'s work.
    """
    folder = artifact_at(Path(path))
    manifest = _checked(folder)
    source = manifest.source
    return rebuild_module(
        factory=source.factory,
        args=source.args,
        kwargs=source.kwargs,
        program=folder / source.program if source.program else None,
        state=_state(folder, manifest),
        allow=AllowList.default(allow_code),
    )


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return every tensor of the artifact ``path`` under its original name, weights dequantized.

    Floating tensors are float32, others as they were stored. No code of the model runs. Raises ArtifactError.
    """
    folder = artifact_at(Path(path))
    return _state(folder, _checked(folder))


def _checked(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    findings = file_findings(folder, manifest)
    if findings:
        raise ArtifactError("; ".join(findings) + "; the artifact is damaged: remove its folder and run the job again")
    return manifest


def _state(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    file = TensorFile(folder / TENSORS)
    parts = {name for entry in manifest.layers for name in entry.parts}
    state = {name: _as_float32(file.tensor(name)) for name in sorted(file.names - parts)}
    for entry in manifest.layers:
        if findings := shape_findings(file, entry):
            raise ArtifactError(f"{file.path}: {'; '.join(findings)}; the file was altered, run the job again")
        state[entry.weight] = dequantize_layer(entry, {name: file.tensor(name) for name in entry.parts})
    return state


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def dequantize_layer(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (float32, stored shape) from its parts ``<weight>.codes`` and so on.

    An input scale multiplies the dequantized weight in float32.
    """
    codes, scale, zero_point, input_scale = (tensors.get(f"{entry.weight}.{part}") for part in PARTS)
    if codes is None or scale is None:
        raise ArtifactError(f"{entry.weight}: codes or scale are missing; the artifact is damaged, run the job again")
    rows = dequantize(entry.format, codes, scale, zero_point)
    if input_scale is not None:
        rows = scale_inputs(rows, entry.layer, input_scale)
    return from_rows(rows, entry.layer)
