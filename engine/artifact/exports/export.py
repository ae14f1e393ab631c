"""One artifact to one file that other software reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...errors import UsageError
from ..storage import fsync_file, fsync_folder, replacing, storing
from .dequantized import write_program, write_state
from .extras import require_onnx
from .report import ExportReport, Format, Precision
from .source import Source, open_source

_SUFFIXES = {Format.ONNX: (".onnx",), Format.PT2: (".pt2",), Format.STATE_DICT: (".safetensors", ".pth", ".pt")}


def export(
    artifact: str | Path,
    format: Format | str,
    *,
    output: str | Path | None = None,
    dtype: Precision | str = Precision.FP32,
    opset: int | None = None,
    force: bool = False,
    allow_code: Sequence[str] = (),
) -> ExportReport:
    """Write the artifact folder ``artifact`` as one file for other software and say what that took.

    ``format`` is onnx (weights stay packed), pt2 (torch.export's program of the dequantized network) or state-dict
    (its tensors, safetensors or, by the suffix of ``output``, .pth). ``dtype`` (fp32, fp16, bf16) is for the last two,
    ``opset`` (21 or 25) for ONNX. Without ``output`` the file is MODEL-PLAN in the current folder. The same artifact
    gives the same bytes under the same versions of torch and onnxscript; the file appears whole or not at all.

    Raises UsageError for options that do not go together, a file that is there already (``force`` replaces it) and a
    missing extra; ArtifactError for a damaged artifact; UnsupportedModelError for an operation that the format
    cannot express; FactoryError; StorageError.
    """
    chosen, precision = Format(format), Precision(dtype)
    _check_options(chosen, precision, opset)
    source = open_source(Path(artifact), allow_code)
    target = Path(output) if output is not None else Path(_default_name(source, chosen))
    _check_target(target, chosen, source.folder, force)
    with _placing(target) as temporary:
        report = _write(temporary, source, chosen, precision, opset, target)
    return report


def _check_options(format: Format, dtype: Precision, opset: int | None) -> None:
    if format is Format.ONNX:
        require_onnx()
        if dtype is not Precision.FP32:
            raise UsageError(f"--dtype {dtype}: ONNX keeps its codes packed and computes in fp32; leave --dtype out")
    elif opset is not None:
        raise UsageError(f"--opset {opset}: only --format onnx has an opset; leave it out")
    if opset not in (None, 21, 25):
        raise UsageError(f"--opset {opset}: expected 21 (no two-bit integers) or 25")


def _default_name(source: Source, format: Format) -> str:
    return f"{source.manifest.model}-{source.manifest.plan['name']}{_SUFFIXES[format][0]}"


def _check_target(target: Path, format: Format, artifact: Path, force: bool) -> None:
    if target.suffix not in _SUFFIXES[format]:
        raise UsageError(f"--output {target}: --format {format} writes {' or '.join(_SUFFIXES[format])}; rename it")
    if artifact.resolve() in target.resolve().parents:
        raise UsageError(f"--output {target}: lies in the artifact, which must stay as it is; choose another folder")
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f"--output {target}: is there already; choose another name or replace a file by --force")


@contextmanager
def _placing(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; what is there in the end takes ``target``'s place at once."""
    with storing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as draft:
            yield draft
            fsync_file(draft)
        fsync_folder(target.parent)


def _write(
    path: Path, source: Source, format: Format, dtype: Precision, opset: int | None, target: Path
) -> ExportReport:
    report = ExportReport(
        file=target,
        format=format,
        dtype=dtype,
        bytes=0,
        artifact_bytes=source.manifest.bytes,
        original_bytes=source.original_bytes,
    )
    if format is Format.ONNX:
        report = _write_onnx(path, source, opset, report)
    elif format is Format.PT2:
        report = replace(report, batch=write_program(path, source, dtype).batch)
    else:
        write_state(path, source, dtype, pickled=target.suffix != ".safetensors")
    return replace(report, bytes=path.stat().st_size, notes=(*report.notes, *_batch_note(report)))


def _write_onnx(path: Path, source: Source, opset: int | None, report: ExportReport) -> ExportReport:
    from .graph import build_onnx  # noqa: PLC0415 - needs the extra

    model = build_onnx(source, opset)
    path.write_bytes(model.to_bytes())
    return replace(
        report,
        batch=model.batch,
        opset=model.opset,
        ir_version=model.proto.ir_version,
        operators=model.operators,
        layers=model.layers,
    )


def _batch_note(report: ExportReport) -> tuple[str, ...]:
    if report.batch is None:
        return ()
    return (f"the graph is for a batch of {report.batch}: torch.export could not keep the batch free",)
