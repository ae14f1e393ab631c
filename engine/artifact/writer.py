"""Write an artifact into an attempt folder: tensors, program, and the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ..compress.result import Compressed
from ..errors import ArtifactError
from ..faults import reach
from ..job.task import Task
from ..models.load import LoadedModel, save_placeholder_program
from .describe import make_manifest, weight_parts
from .key import TaskKey
from .manifest import MANIFEST, METADATA, PROGRAM, TENSORS, FileEntry, Manifest
from .storage import storing
from .tensors import write_tensors


def write_artifact(folder: Path, *, model: LoadedModel, compressed: Compressed, task: Task, key: TaskKey) -> Manifest:
    """Write ``compressed`` into the existing empty ``folder`` and return its manifest.

    The checkpoint's tensors keep name and dtype; ``compressed.tensors`` (float32) replace theirs, and a quantized
    weight gives way to ``<weight>.codes`` (uint8 [rows, row_bytes]), ``.scale`` and, where there are, ``.zero_point``
    and ``.input_scale`` (float32). The same key gives the same bytes. The disk may not have them yet: ``commit`` sees
    to that. Raises StorageError.
    """
    with storing(folder):
        files = {TENSORS: write_tensors(folder / TENSORS, stored_tensors(model.state, compressed), METADATA)}
        if model.program is not None:
            files[PROGRAM] = _write_program(model.program, folder / PROGRAM)
        manifest = make_manifest(model=model, compressed=compressed, task=task, key=key, files=files)
        reach("before-manifest")
        with (folder / MANIFEST).open("xb") as file:
            file.write(manifest.to_json().encode("utf-8"))
        reach("after-manifest")
    return manifest


def stored_tensors(state: Mapping[str, Tensor], compressed: Compressed) -> dict[str, Tensor]:
    """Return what the file holds, by name. Raises ArtifactError where two tensors would have one name."""
    unknown = sorted(compressed.tensors.keys() - state.keys())
    if unknown:
        raise ArtifactError(f"corrected tensors that the network does not have: {', '.join(unknown)}")
    quantized = {layer.layer.weight for layer in compressed.layers}
    found = {name: compressed.tensors.get(name, tensor) for name, tensor in state.items() if name not in quantized}
    for layer in compressed.layers:
        for name, tensor in weight_parts(layer).items():
            if name in found:
                raise ArtifactError(f"tensor {name} of the network has the name of a stored part; rename it")
            found[name] = tensor
    return found


def _write_program(program: ExportedProgram, path: Path) -> FileEntry:
    save_placeholder_program(program, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(size=path.stat().st_size, sha256=digest)
