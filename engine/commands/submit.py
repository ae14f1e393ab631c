"""``dfmpc submit``: what a command line says becomes a script or a manifest to read and hand in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import StorageError, UsageError


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job file; with --k8s as its pods see it.")],
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a batch script for sbatch.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Write a manifest for kubectl.")] = False,
    shards: Annotated[int, typer.Option(min=1, help="Parts that run side by side.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each part.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores of each part.")] = 8,
    memory: Annotated[str, typer.Option(help="Memory of each part, with K, M, G or T.")] = "32G",
    time: Annotated[str, typer.Option(help="Time limit, [D-]HH:MM:SS.")] = "08:00:00",
    grace: Annotated[int, typer.Option(min=0, help="Seconds for what is at work when the cluster interrupts.")] = 90,
    requeues: Annotated[int, typer.Option(min=0, help="How often an interrupted part is started again.")] = 3,
    partition: Annotated[str | None, typer.Option(help="Slurm's partitions.")] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: an image with dfmpc.")] = None,
    pvc: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:/MOUNT", help="Kubernetes: a volume claim; pods start in the first one."),
    ] = None,
    allow_code: Annotated[
        list[str] | None, typer.Option(help="Passed on to run, and used to check JOB; repeat it for more.")
    ] = None,
    run_option: Annotated[
        list[str] | None, typer.Option(help="A word for run, such as --run-option=--retry-failed; repeat it for more.")
    ] = None,
    output_file: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Write a Slurm script or a Kubernetes manifest that runs JOB in shards; nothing is submitted."""
    from ..run.cluster.kubernetes import render_kubernetes  # noqa: PLC0415
    from ..run.cluster.options import Request, parse_volume  # noqa: PLC0415
    from ..run.cluster.slurm import render_slurm  # noqa: PLC0415

    if slurm == k8s:
        raise UsageError("give one of --slurm and --k8s")
    foreign = [name for name, value in (("--image", image), ("--pvc", pvc)) if slurm and value]
    if foreign or (k8s and partition):
        raise UsageError(f"{' and '.join(foreign) or '--partition'} is not for --{'slurm' if slurm else 'k8s'}")
    path, name = _checked(job, allow_code or [], here=slurm)
    volumes = [parse_volume(text) for text in pvc or []]
    request = Request(
        job=str(path) if slurm else job,
        name=name,
        folder=str(Path.cwd()),
        command=(sys.executable, "-m", "dfmpc.cli") if slurm else ("dfmpc",),
        run_options=(*(f"--allow-code={code}" for code in allow_code or []), *(run_option or [])),
        shards=shards,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
        time=time,
        grace_s=grace,
        requeues=requeues,
    )
    if k8s and image is None:
        raise UsageError("--k8s needs an image that has dfmpc in it: give --image NAME")
    text = render_slurm(request, partition) if slurm else render_kubernetes(request, image or "", volumes)
    _write(text, output_file)


def _checked(job: str, allow_code: list[str], *, here: bool) -> tuple[Path, str]:
    """Return the job file's full path and the job's name; a file that only pods see is named by its path."""
    from ..job.loader import load_job  # noqa: PLC0415
    from ..models.factory import AllowList  # noqa: PLC0415

    path = Path(job).absolute()
    if not here and not path.is_file():
        return path, path.stem
    return path, load_job(path, allows=AllowList.default(tuple(allow_code)).allows).job.name


def _write(text: str, file: Path | None) -> None:
    if file is None:
        sys.stdout.write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{file} cannot be written ({error.strerror}): give another --output-file") from error
