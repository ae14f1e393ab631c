"""The commands. Everything heavy is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from . import __version__
from .artifact.exports.report import Format, Precision, Runtime
from .errors import DfmpcError, InterruptedRunError
from .housekeeping import gc, status
from .submit import submit

if TYPE_CHECKING:
    from .job.loader import LoadedJob

_Parameters = ParamSpec("_Parameters")


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    help="Data-free compression of PyTorch models: YAML job files in, packed checkpoints and Parquet reports out.",
    epilog=_example("dfmpc run jobs/quickstart.yaml", "dfmpc report store/quickstart"),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a store: its newest run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Output = Annotated[str | None, typer.Option(help="The store, instead of the job's output.")]
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        help="A module prefix or a folder whose factories may run; repeat it for more (also DFMPC_ALLOW_CODE)."
    ),
]


def _guarded(command: Callable[_Parameters, int | None]) -> Callable[_Parameters, None]:
    """Turn what a command returns or raises into an exit code and, for our errors, lines on stderr."""

    @functools.wraps(command)
    def guarded(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            code = command(*args, **kwargs) or 0
        except DfmpcError as error:
            print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            print("error: interrupted; the same command resumes", file=sys.stderr)
            code = InterruptedRunError.exit_code
        except BrokenPipeError:
            raise  # the reader of our output went away: typer ends quietly
        except Exception as error:
            error.add_note("This is a bug in dfmpc: please report it with the lines above and `dfmpc doctor`'s output.")
            raise
        raise typer.Exit(code)

    return guarded


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dfmpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _load(job: Path, output: str | None, allow_code: Sequence[str] | None) -> LoadedJob:
    from .job.loader import load_job  # noqa: PLC0415
    from .models.factory import AllowList  # noqa: PLC0415

    return load_job(job, output=output, allows=AllowList.default(tuple(allow_code or ())).allows)


@app.command(epilog=_example("dfmpc run jobs/quickstart.yaml --only 'efficientnet-lite0/rtn*' --output /tmp/store"))
@_guarded
def run(
    job: JobFile,
    only: Annotated[str | None, typer.Option(metavar="MODEL/PLAN", help="Only tasks that match this pattern.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Resuming a run, try its failed tasks again.")
    ] = False,
    output: Output = None,
    devices: Annotated[str | None, typer.Option(help="auto, cpu, cuda, or a list such as cuda:0,cuda:2.")] = None,
    allow_code: AllowCode = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say of every task why it was not reused.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto|auto/N", help="Only part I (from 0) of N; auto takes I from Slurm or Kubernetes."
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="What tasks at work may take to end after a signal.")
    ] = 20.0,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="2h30m|TIME|auto", help="Start nothing that would not end by then; auto: Slurm's limit."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compress every model of JOB under every bit-plan; what is finished already is reused."""
    from .run.scheduler import RunOptions, run_job  # noqa: PLC0415
    from .run.shards import parse_shard  # noqa: PLC0415
    from .show import run_json, run_text  # noqa: PLC0415

    options = RunOptions(
        only=only,
        retry_failed=retry_failed,
        devices=devices,
        allow_code=tuple(allow_code or ()),
        progress=True,
        explain=explain,
        shard=parse_shard(shard, os.environ) if shard is not None else None,
        grace_s=grace,
        deadline=deadline,
    )
    loaded = _load(job, output, allow_code)
    summary = run_job(loaded, options)
    print(run_json(loaded.store, summary) if as_json else run_text(loaded.store, summary))
    return summary.exit_code


app.command(epilog=_example("dfmpc submit nightly.yaml --slurm --shards 4 > nightly.sh", "sbatch nightly.sh"))(
    _guarded(submit)
)


@app.command(epilog=_example("dfmpc plan jobs/quickstart.yaml"))
@_guarded
def plan(
    job: JobFile,
    bits: Annotated[
        bool, typer.Option("--bits", help="Also load the models of bit-plans with a budget and show the bits chosen.")
    ] = False,
    output: Output = None,
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> int:
    """Show what JOB would run: tasks, bytes, predicted sizes and memory, free disk. Starts and writes nothing.

    Exit code 3 where it found what would make a task fail.
    """
    from .run.plan import make_plan  # noqa: PLC0415
    from .show import plan_json, plan_text  # noqa: PLC0415

    loaded, allowed = _load(job, output, allow_code), tuple(allow_code or ())
    planned, chosen = make_plan(loaded, allow_code=allowed), None
    if bits:
        from .run.bit_choices import choose_all_bits  # noqa: PLC0415

        chosen = choose_all_bits(loaded, allow_code=allowed)
    print(plan_json(planned, chosen) if as_json else plan_text(planned, chosen))
    return 3 if planned.problems or (chosen is not None and chosen.problems) else 0


app.command(epilog=_example("dfmpc status store/quickstart", "dfmpc status store/quickstart --watch"))(_guarded(status))


@app.command(epilog=_example("dfmpc report store/quickstart --layers --only '*/rtn-4'"))
@_guarded
def report(
    run: RunPath,
    layers: Annotated[bool, typer.Option("--layers", help="Also a row a layer.")] = False,
    only: Annotated[str | None, typer.Option(metavar="MODEL/PLAN", help="Only tasks that match this pattern.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the report of RUN from its Parquet files."""
    from .run.store import find_run  # noqa: PLC0415
    from .show import read_report, report_json, report_text  # noqa: PLC0415

    found = read_report(find_run(run), only=only, layers=layers)
    print(report_json(found) if as_json else report_text(found))


@app.command(epilog=_example("dfmpc inspect store/quickstart/artifacts/efficientnet-lite0/rtn-4/*"))
@_guarded
def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")], as_json: AsJson = False
) -> None:
    """Show an artifact's manifest, a layer a row."""
    from .artifact.manifest import read_manifest  # noqa: PLC0415
    from .show import artifact_text, existing_folder  # noqa: PLC0415

    manifest = read_manifest(existing_folder(artifact))
    print(manifest.to_json() if as_json else artifact_text(manifest), end="" if as_json else "\n")


@app.command(epilog=_example("dfmpc verify store/quickstart"))
@_guarded
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
    from .show import verified_json, verified_text, verify_all  # noqa: PLC0415

    results, compared = verify_all(path, in_onnxruntime=runtime is not None, allow_code=tuple(allow_code or ()))
    print(verified_json(results, compared) if as_json else verified_text(results, compared))
    return 4 if any(result.findings for result in results) else 0


@app.command(epilog=_example("dfmpc export store/quickstart/artifacts/efficientnet-lite0/rtn-4/* --format onnx"))
@_guarded
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
    from .artifact.exports.export import export as write_export  # noqa: PLC0415
    from .show import existing_folder  # noqa: PLC0415

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


app.command(epilog=_example("dfmpc gc store/nightly --keep-last 3 --runs-older-than 90d"))(_guarded(gc))


@app.command(epilog=_example("dfmpc schema > job.schema.json"))
@_guarded
def schema() -> None:
    """Print the JSON Schema of a job file."""
    from .job.schema import Job  # noqa: PLC0415

    print(json.dumps(Job.model_json_schema(), indent=2))


@app.command(epilog=_example("dfmpc doctor --output /data/store"))
@_guarded
def doctor(
    output: Annotated[Path, typer.Option(help="Folder whose free disk is shown.")] = Path(),
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, whether Triton kernels can run, free disk and the allow-list."""
    from .doctor import examine  # noqa: PLC0415

    health = examine(output, tuple(allow_code or ()))
    print(health.to_json() if as_json else health.to_text())


def main() -> None:
    """Run the command line; the entry point of ``dfmpc``."""
    app(prog_name="dfmpc")


if __name__ == "__main__":
    main()
