"""The commands that look after a store: ``dfmpc gc`` and ``dfmpc status``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import AsJson, RunPath

_AGE = "such as 30d or 12h"


def status(
    run: RunPath,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing it until it ends, finished or not, or Ctrl-C.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch: how often.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show how far RUN is: how many tasks are done, reused, failed, running or waiting.

    With --watch and no terminal, or with --json, a line is printed for every change.
    """
    if watch:
        from ..run.watch import watch as watch_run  # noqa: PLC0415

        watch_run(run, interval, sys.stdout, as_json=as_json)
        return
    from ..run.status import read_status  # noqa: PLC0415
    from ..show import status_json, status_text  # noqa: PLC0415

    state = read_status(run)
    print(status_json(state) if as_json else status_text(state))


def gc(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store: a job's output.")],
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", help="Spare the newest N artifacts of a model and bit-plan.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help=f"Artifacts made longer ago, named in reports or not, {_AGE}.")
    ] = None,
    unreferenced: Annotated[bool, typer.Option("--unreferenced", help="Artifacts that no run's report names.")] = False,
    runs_older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help=f"Finished runs, reports and logs included, {_AGE}.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; else it is only shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show, or with --delete remove, what STORE no longer needs.

    An artifact goes where every criterion given says so; with it go its scores, what dead processes left, and old
    claims. What a run at work uses stays.
    """
    from ..run.gc import GcRules, collect_garbage  # noqa: PLC0415

    rules = GcRules(
        keep_last=keep_last,
        older_than_s=_seconds("--older-than", older_than),
        unreferenced=unreferenced,
        runs_older_than_s=_seconds("--runs-older-than", runs_older_than),
    )
    result = collect_garbage(store, rules, delete=delete)
    print(result.to_json() if as_json else result.to_text())


def _seconds(option: str, text: str | None) -> float | None:
    """Return an age in seconds; it is written as durations in a job file are, or in days or weeks."""
    if text is None:
        return None
    number, unit = text.strip()[:-1], text.strip()[-1:]
    factors = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    if unit not in factors or not number.replace(".", "", 1).isdecimal():
        raise UsageError(f"{option} {text!r}: expected a number and s, m, h, d or w, {_AGE}")
    return float(number) * factors[unit]
