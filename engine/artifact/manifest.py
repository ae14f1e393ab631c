"""What an artifact says of itself: manifest.json, the same bytes from every run that has the same key."""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dfmpc.kernels.formats import CodeFormat, Grid
from pydantic import Field, JsonValue, StringConstraints, ValidationError
from pydantic_core import from_json

from ..errors import ArtifactError
from ..job.fields import Strict
from ..models.graph import Layer, Op

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "model.safetensors"
PROGRAM = "program.pt2"
METADATA = {"format": "dfmpc", "format_version": str(FORMAT_VERSION)}
"""The tensor file's own map of strings."""
PARTS = ("codes", "scale", "zero_point", "input_scale")
"""What replaces a quantized weight: tensors named ``<weight>.<part>``."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.+-]*$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]


class FileEntry(Strict):
    """One file of the folder."""

    size: int = Field(ge=0, description="Bytes.")
    sha256: Digest


class SourceEntry(Strict):
    """Where the network's code comes from: a factory, or the exported program that lies in the folder."""

    factory: str | None = None
    args: tuple[str | int | float | bool | None, ...] = ()
    kwargs: dict[str, str | int | float | bool | None] = Field(default={})
    distribution: str | None = Field(None, description="Version of the distribution that owns the factory.")
    program: FileName | None = Field(None, description="File with the exported graph.")


class CoefficientEntry(Strict):
    """Summary of a LOW layer's coefficients c; the histogram has 20 equal bins over [0, 2)."""

    minimum: Number
    mean: Number
    maximum: Number
    histogram: tuple[int, ...]
    dead: int


class LayerEntry(Strict):
    """One quantized layer: how to read its codes, and what was measured on its weights."""

    name: str
    weight: str
    op: Op
    shape: tuple[int, ...] = Field(min_length=2, description="Stored shape of the weight.")
    dtype: str = Field(description="dtype of the weight in the original checkpoint.")
    groups: int = Field(ge=1)
    role: str
    partners: tuple[str, ...]
    folded: bool | None
    reason: str
    bits: int = Field(ge=2, le=8)
    grid: Grid
    granularity: str
    rows: int = Field(ge=0)
    length: int = Field(ge=0, description="Weights a row.")
    group_size: int = Field(ge=0, description="Weights a scale within a row.")
    layer_wise: bool
    zero_point: bool = Field(description="Whether there is a tensor of zero points.")
    input_scale: bool = Field(description="Whether there is a factor an input channel.")
    sqnr_db: Number | None = Field(description="Signal over error of the weights, dB; null where nothing was lost.")
    sparsity: Number = Field(description="Fraction of the weights that are exactly zero.")
    clipped_fraction: Number = Field(description="Fraction of the weights beyond the grid's ends.")
    coefficients: CoefficientEntry | None = None
    norm_shift: Number | None = None

    @property
    def layer(self) -> Layer:
        """The layer as the graph knows it, without its bias."""
        return Layer(self.name, self.weight, None, self.op, self.shape, self.groups)

    @property
    def format(self) -> CodeFormat:
        """Grid and width of the codes."""
        return CodeFormat(self.grid, self.bits, self.length, self.group_size, self.layer_wise)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that replace the weight."""
        there = (True, True, self.zero_point, self.input_scale)
        return tuple(f"{self.weight}.{part}" for part, is_there in zip(PARTS, there, strict=True) if is_there)


class Manifest(Strict):
    """manifest.json. Names of model and plan are in it; times, hosts and paths are not."""

    format_version: int
    model: str
    plan: dict[str, JsonValue] = Field(description="The bit-plan after defaults.")
    method: str
    recipe: str | None
    calibrator: str | None
    tier: str = Field(description="none, closed-form or synthetic.")
    key: Digest
    ingredients: dict[str, JsonValue] = Field(description="What the key is the digest of.")
    source: SourceEntry
    input_shape: tuple[int, ...]
    params: int = Field(description="Parameters of the network.")
    bits_per_weight: Number | None = Field(description="Bits of codes and factors a quantized weight.")
    layers: tuple[LayerEntry, ...]
    kept: dict[str, str] = Field(description="Layers left unquantized, with the reason.")
    files: dict[FileName, FileEntry]

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, one space of indent, a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n"

    @property
    def bytes(self) -> int:
        """Sum of the files' sizes, the manifest's own not included."""
        return sum(entry.size for entry in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the artifact ``folder``.

    Raises ArtifactError where it is missing, unreadable, of another format version or not valid.
    """
    path = folder / MANIFEST
    content = _content(path)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(_unusable(path, content, error)) from error
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(_of_another_version(path, manifest.format_version))
    return manifest


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing, so {path.parent} is no finished artifact; run the job again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


def _unusable(path: Path, content: bytes, error: ValidationError) -> str:
    """Say why ``content`` is no manifest of this version: what another version looks like is not known."""
    try:
        fields = from_json(content)
    except ValueError as syntax:
        return f"{path}: not JSON ({syntax}); the file was altered, run the job again"
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        return _of_another_version(path, version)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{path}: {where}: {first['msg']}, got {first['input']!r:.80}; the file was altered, run the job again"


def _of_another_version(path: Path, version: object) -> str:
    return f"{path}: format version {version!r}; this dfmpc reads {FORMAT_VERSION}: use the dfmpc that wrote it"


def file_findings(folder: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the files' presence and sizes, one finding a file; digests are not computed."""
    findings = []
    for name, entry in manifest.files.items():
        path = folder / name
        size = _size_of(path)
        if size is None:
            findings.append(f"{path}: missing")
        elif size != entry.size:
            findings.append(f"{path}: {size} bytes, the manifest says {entry.size}")
    return findings


def _size_of(path: Path) -> int | None:
    """Return the bytes of a regular file, None where there is none."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def digest_findings(folder: Path, name: str, manifest: Manifest) -> list[str]:
    """Return what is wrong with the content of the file ``name``, which is read in full."""
    path, expected = folder / name, manifest.files[name].sha256
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    return [] if digest == expected else [f"{path}: sha256 {digest}, the manifest says {expected}"]


@dataclass(frozen=True)
class Inspection:
    """An artifact after every file of it was read; it may be reused where there is no finding."""

    manifest: Manifest | None
    """None where it cannot be read, and then there is a finding."""
    findings: tuple[str, ...]


def inspect(folder: Path) -> Inspection:
    """Return the manifest of ``folder``, parsed once, and what keeps the folder from being the artifact it tells of."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return Inspection(None, (str(error),))
    findings = file_findings(folder, manifest)
    findings = findings or [text for name in manifest.files for text in digest_findings(folder, name, manifest)]
    return Inspection(manifest, tuple(findings))


def damage(folder: Path) -> list[str]:
    """Return what keeps ``folder`` from being the artifact that its manifest tells of; every file is read."""
    return list(inspect(folder).findings)


def is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` is an artifact whose files are there with the right sizes."""
    try:
        return not file_findings(folder, read_manifest(folder))
    except ArtifactError:
        return False
