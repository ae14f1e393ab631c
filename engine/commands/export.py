"""``dfmpc export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..artifact.exports.report import Format, Precision
from .options import AllowCode, AsJson


def export(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")],
    format: Annotated[
        Format, typer.Option(help="Packed weights (onnx), or dequantized: a torch.export program, or tensors.")
    ],
    dtype: Annotated[Precision, typer.Option(help="Of what is dequantized; ONNX is always fp32.")] = Precision.FP32,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file, instead of MODEL-PLAN in the current folder.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX: 21 or 25; by default 25 where a layer has two bits, else 21.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Write ARTIFACT as one file for other software, and say what had to be widened and what the file costs."""
    from ..artifact.exports.export import export as write_export  # noqa: PLC0415
    from ..show import existing_folder  # noqa: PLC0415

    report = write_export(
        existing_folder(artifact),
        format,
        output=output,
        dtype=dtype,
        opset=opset,
        force=force,
        allow_code=tuple(allow_code or ()),
    )
    print(report.to_json() if as_json else report.to_text())
