"""``dfmpc run`` and ``dfmpc plan``."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AllowCode, AsJson, JobFile, Only, Output, load

if TYPE_CHECKING:
    from ..run.summary import RunSummary


class Executor(StrEnum):
    """Who runs the tasks."""

    LOCAL = "local"
    RAY = "ray"


def run(
    job: JobFile,
    only: Only = None,
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
    executor: Annotated[
        Executor, typer.Option(help="Who runs the tasks: processes of this machine, or a Ray cluster.")
    ] = Executor.LOCAL,
    ray_address: Annotated[
        str, typer.Option(metavar="HOST:PORT|auto", help="The Ray cluster's head; auto: the cluster of this machine.")
    ] = "auto",
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Refuse to start where the disk may not hold it all.")
    ] = True,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write figures for Prometheus's textfile collector.")
    ] = None,
    on_finish: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Run this in a shell at the end, with the summary as JSON on its input."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compress every model of JOB under every bit-plan; what is finished already is reused."""
    from ..run.begin import RunOptions, run_job  # noqa: PLC0415
    from ..run.shards import parse_shard  # noqa: PLC0415

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
        executor=executor.value,
        ray_address=ray_address,
        preflight=preflight,
        metrics=metrics,
    )
    loaded = load(job, output, allow_code)

    def telling() -> Callable[[RunSummary], None]:
        from ..run.on_finish import run_on_finish  # noqa: PLC0415
        from ..show import run_json, run_text  # noqa: PLC0415 - the workers start sooner without

        def tell(summary: RunSummary) -> None:
            print(run_json(loaded.store, summary) if as_json else run_text(loaded.store, summary), flush=True)
            if on_finish is not None:
                run_on_finish(on_finish, run_json(loaded.store, summary), summary.run, summary.exit_code)

        return tell

    return run_job(loaded, options, telling).exit_code


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
    from ..run.plan import make_plan  # noqa: PLC0415
    from ..show import plan_json, plan_text  # noqa: PLC0415

    loaded, allowed = load(job, output, allow_code), tuple(allow_code or ())
    planned, chosen = make_plan(loaded, allow_code=allowed), None
    if bits:
        from ..run.bit_choices import choose_all_bits  # noqa: PLC0415

        chosen = choose_all_bits(loaded, allow_code=allowed)
    print(plan_json(planned, chosen) if as_json else plan_text(planned, chosen))
    return 3 if planned.problems or (chosen is not None and chosen.problems) else 0
