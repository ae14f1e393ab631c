"""The commands that look: report, inspect, verify, schema, doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..artifact.exports.report import Runtime
from .options import AllowCode, AsJson, Only, RunPath


def report(
    run: RunPath,
    layers: Annotated[bool, typer.Option("--layers", help="Also a row a layer.")] = False,
    only: Only = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page instead (dfmpc[html]).")
    ] = None,
    histograms: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="On the page, weights of each model's N worst layers."),
    ] = 6,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write Markdown instead, worst first; - prints it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the report of RUN from its Parquet files, or write it as a page."""
    from ..run.store import find_run  # noqa: PLC0415
    from ..show import read_report, report_json, report_text  # noqa: PLC0415

    place = find_run(run)
    if html is None and markdown is None:
        found = read_report(place, only=only, layers=layers)
        print(report_json(found) if as_json else report_text(found))
        return
    from .pages import write_pages  # noqa: PLC0415

    found = read_report(place, only=only, layers=html is not None)
    written = write_pages(place, found, only=only, html=html, markdown=markdown, histograms=histograms)
    if as_json:
        print(json.dumps({"files": [asdict(file) for file in written]}, indent=1))
    else:
        print(*(f"{file.to_text()}\n" for file in written), sep="", end="")


def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")], as_json: AsJson = False
) -> None:
    """Show an artifact's manifest, a layer a row."""
    from ..artifact.manifest import read_manifest  # noqa: PLC0415
    from ..show import artifact_text, existing_folder  # noqa: PLC0415

    manifest = read_manifest(existing_folder(artifact))
    print(manifest.to_json() if as_json else artifact_text(manifest), end="" if as_json else "\n")


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|RUN|STORE", help="An artifact, or a run or a store: all of theirs.")
    ],
    runtime: Annotated[
        Runtime | None,
        typer.Option(help="Also export to this runtime, in memory, and compare weights and outputs with dfmpc.load."),
    ] = None,
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> int:
    """Check digests, that every code decodes, and bit counts. Exit code 4 where something is wrong."""
    from ..show import verified_json, verified_text, verify_all  # noqa: PLC0415

    results, compared = verify_all(path, in_onnxruntime=runtime is not None, allow_code=tuple(allow_code or ()))
    print(verified_json(results, compared) if as_json else verified_text(results, compared))
    return 4 if any(result.findings for result in results) else 0


def schema() -> None:
    """Print the JSON Schema of a job file."""
    from ..job.schema import Job  # noqa: PLC0415

    print(json.dumps(Job.model_json_schema(), indent=2))


def doctor(
    output: Annotated[Path, typer.Option(help="Folder whose free disk is shown.")] = Path(),
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, whether Triton kernels can run, free disk and the allow-list."""
    from ..doctor import examine  # noqa: PLC0415

    health = examine(output, tuple(allow_code or ()))
    print(health.to_json() if as_json else health.to_text())
