"""Check an artifact against its manifest: digests, names and shapes, every code, and the count of bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError
from .codes import layer_findings
from .key import digest_of
from .latest import artifact_at
from .manifest import MANIFEST, METADATA, PARTS, TENSORS, Manifest, digest_findings, file_findings, read_manifest
from .tensors import TensorFile


@dataclass(frozen=True)
class VerifyResult:
    """What was found in one artifact; no finding means that it is whole."""

    path: Path
    findings: list[str]
    """One sentence each, naming the file or tensor and the values."""
    layers: int
    """Layers whose codes were read."""
    files: int
    """Files whose digests were computed."""

    @property
    def checked(self) -> int:
        """Files and layers together."""
        return self.files + self.layers


def verify(path: str | Path) -> VerifyResult:
    """Check an artifact down to the last code; nothing is changed and no code of a model runs.

    ``path`` is its folder, or a pointer of a store. What is wrong comes back as findings, a missing or unreadable
    manifest too.
    """
    folder = artifact_at(Path(path))
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return VerifyResult(folder, [str(error)], 0, 0)
    findings = _manifest_findings(folder, manifest) + file_findings(folder, manifest)
    present = [name for name in manifest.files if (folder / name).is_file()]
    findings += [text for name in present for text in digest_findings(folder, name, manifest)]
    found, layers = _tensor_findings(folder, manifest)
    return VerifyResult(folder, findings + found, layers, len(present))


def find_artifacts(path: Path) -> list[Path]:
    """Return the artifact folders of a store, of any folder of artifacts, or ``path`` itself, in order.

    In a store every ``artifacts/MODEL/PLAN/KEY`` counts, also without a manifest. Raises ArtifactError where ``path``
    does not exist.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder; give an artifact's folder or a store's")
    if (path / MANIFEST).is_file():
        return [path]
    if (path / "artifacts").is_dir():
        return sorted(folder for folder in (path / "artifacts").glob("*/*/*") if folder.is_dir())
    return sorted(found.parent for found in path.rglob(MANIFEST))


def _manifest_findings(folder: Path, manifest: Manifest) -> list[str]:
    path, findings = folder / MANIFEST, []
    if path.read_bytes() != manifest.to_json().encode("utf-8"):
        findings.append(f"{path}: not in the form dfmpc writes; it was edited")
    if (digest := digest_of(manifest.ingredients)) != manifest.key:
        findings.append(f"{path}: key {manifest.key} but its ingredients give {digest}")
    if TENSORS not in manifest.files:
        findings.append(f"{path}: does not list {TENSORS}")
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in {MANIFEST, *manifest.files})
    return findings + [f"{folder / name}: not in the manifest" for name in strangers]


def _tensor_findings(folder: Path, manifest: Manifest) -> tuple[list[str], int]:
    """Return the findings on the tensors and how many layers were read."""
    if not (folder / TENSORS).is_file():
        return [], 0
    try:
        file = TensorFile(folder / TENSORS)
    except ArtifactError as error:
        return [str(error)], 0
    findings = _name_findings(file, manifest)
    for entry in manifest.layers:
        if file.names.issuperset(entry.parts):
            findings += layer_findings(file, entry)
    return findings or _bit_findings(file, manifest), len(manifest.layers)


def _name_findings(file: TensorFile, manifest: Manifest) -> list[str]:
    findings = []
    if file.metadata() != METADATA:
        findings.append(f"{file.path}: metadata {file.metadata()}, expected {METADATA}")
    for entry in manifest.layers:
        findings += [f"{file.path}: tensor {name} is missing" for name in entry.parts if name not in file.names]
        extra = {entry.weight, *(f"{entry.weight}.{part}" for part in PARTS)} - set(entry.parts)
        findings += [f"{file.path}: tensor {name} is not in the manifest" for name in sorted(extra & file.names)]
    return findings


def _bit_findings(file: TensorFile, manifest: Manifest) -> list[str]:
    """Compare the bits counted from the stored bytes with the manifest's."""
    size = sum(file.size(name) for entry in manifest.layers for name in entry.parts)
    params = sum(entry.rows * entry.length for entry in manifest.layers)
    counted = round(8 * size / params, 6) if params else None
    if counted == manifest.bits_per_weight:
        return []
    return [f"{file.path}: {counted} bits a weight, the manifest says {manifest.bits_per_weight}"]
