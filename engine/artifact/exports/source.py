"""An artifact opened for export: checked to the last byte, its network loaded, its program captured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ...errors import ArtifactError, UnsupportedModelError
from ...models.capture import canonical_names
from ...models.program import load_program
from ...models.reading import read_files
from ..loader import load
from ..manifest import TENSORS, LayerEntry, Manifest, read_manifest
from ..tensors import TensorFile
from ..verify import verify


@dataclass(frozen=True)
class Source:
    """One artifact, whole as far as ``verify`` can see."""

    folder: Path
    manifest: Manifest
    allow_code: tuple[str, ...] = ()

    @cached_property
    def module(self) -> nn.Module:
        """The dequantized network in eval mode, float32, as ``dfmpc.load`` gives it."""
        return load(self.folder, allow_code=self.allow_code)

    @cached_property
    def first_names(self) -> dict[str, str]:
        """The first name of the tensor behind every name of the network's state dict."""
        return canonical_names(self.module.state_dict())

    @property
    def any_batch(self) -> bool:
        """Whether a free batch may be tried: a program that was exported for one batch refuses others."""
        program = self.manifest.source.program
        return program is None or batch_of(load_program(read_files([self.folder / program])[0])) is None

    def parts(self, entry: LayerEntry) -> dict[str, Tensor]:
        """Return the stored tensors of one quantized layer by their names in the file."""
        file = TensorFile(self.folder / TENSORS)
        return {name: file.tensor(name) for name in entry.parts}

    @property
    def original_bytes(self) -> int:
        """Bytes of the network's tensors as the checkpoint had them; corrected ones count as they are stored."""
        file = TensorFile(self.folder / TENSORS)
        parts = {name for entry in self.manifest.layers for name in entry.parts}
        sizes = [math.prod(entry.shape) * _itemsize(entry.dtype) for entry in self.manifest.layers]
        return sum(sizes) + sum(file.size(name) for name in file.names - parts)


def _itemsize(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def open_source(folder: Path, allow_code: Sequence[str] = ()) -> Source:
    """Return the artifact ``folder``, or a pointer's. Raises ArtifactError with all that ``verify`` finds wrong."""
    result = verify(folder)
    if result.findings:
        raise ArtifactError("\n".join(f"{finding}; run the job again" for finding in result.findings))
    return Source(result.path, read_manifest(result.path), tuple(allow_code))


@dataclass(frozen=True)
class Captured:
    """A network as torch.export's program, and for which batch."""

    program: ExportedProgram
    batch: int | None
    """None: any."""


def capture_source(source: Source, dtype: torch.dtype = torch.float32) -> Captured:
    """Return the program of the dequantized network, for any batch where the network (or its own program) allows.

    Raises UnsupportedModelError where torch.export cannot follow the network.
    """
    module, shape = source.module.to(dtype), source.manifest.input_shape
    try:
        program = _any_batch(module, shape, dtype) if source.any_batch else _export(module, shape, dtype)
    except UnsupportedModelError:
        program = _export(module, shape, dtype)
    for node in program.graph.nodes:
        # holds paths of this machine
        node.meta.pop("stack_trace", None)
    return Captured(program, batch_of(program))


def _any_batch(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> ExportedProgram:
    # a batch of one would be taken for a constant
    program = _export(module, (max(2, shape[0]), *shape[1:]), dtype, dynamic=True)
    batch = _first(program, program.graph_signature.user_inputs)
    # a view that has the batch written into it puts several images into one
    if batch != _first(program, program.graph_signature.user_outputs):
        raise UnsupportedModelError("the outputs do not have the batch of the input")
    return program


def _export(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, *, dynamic: bool = False) -> ExportedProgram:
    dimensions = (({0: Dim.AUTO},)) if dynamic else None
    try:
        example = (torch.zeros(shape, dtype=dtype),)
        return torch.export.export(module, example, dynamic_shapes=dimensions, strict=False)
    except Exception as error:  # foreign forward code runs here and may raise anything
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"torch.export cannot capture the network for an input of shape {list(shape)}: {cause}; "
            "use --format state-dict"
        ) from error


def batch_of(program: ExportedProgram) -> int | None:
    """Return the batch that ``program`` is for, None where any is."""
    (batch,) = _first(program, program.graph_signature.user_inputs)
    return int(batch) if batch.isdecimal() else None


def _first(program: ExportedProgram, names: Sequence[object]) -> set[str]:
    """Return the first sizes of the tensors ``names``, as numbers or symbols; empty stands for a scalar."""
    values = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    return {str(value.shape[0]) if value.dim() else "" for value in values if isinstance(value, Tensor)}
