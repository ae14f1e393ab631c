"""``dfmpc diff``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import AsJson


def diff(
    run_a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="A run's folder, or a store: its newest run, see above.")
    ],
    run_b: Annotated[Path | None, typer.Argument(metavar="[RUN_B]", help="The later run.")] = None,
    max_top1_drop: Annotated[float, typer.Option(min=0, metavar="POINTS", help="Of top-1 that may be lost.")] = 0.5,
    max_agreement_drop: Annotated[float, typer.Option(min=0, metavar="0-1", help="Of agreement.")] = 0.01,
    max_sqnr_drop: Annotated[float, typer.Option(min=0, metavar="DB", help="Of the logits' SQNR.")] = 1.0,
    max_growth: Annotated[str, typer.Option(metavar="PERCENT", help="Of bytes, and of bits a weight.")] = "1%",
    max_slowdown: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Of time, where both runs compressed; without it time is not looked at."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show what is new, gone, better and worse in RUN_B, the worst first. Exit code 4 where a task got worse.

    Worse is what passes a threshold, has no result any more, or has a gate that closed. With a store alone its two
    newest finished runs of one job are compared.
    """
    from ..report.diff import Thresholds, diff_json, diff_rows, diff_text  # noqa: PLC0415
    from ..run.comparison import rows_of, two_runs  # noqa: PLC0415

    thresholds = Thresholds(
        top1_drop=max_top1_drop,
        agreement_drop=max_agreement_drop,
        sqnr_drop=max_sqnr_drop,
        growth=_percent("--max-growth", max_growth),
        slowdown=None if max_slowdown is None else _percent("--max-slowdown", max_slowdown),
    )
    before, after = two_runs(run_a, run_b)
    found = diff_rows(rows_of(before), rows_of(after), thresholds)
    print(diff_json(found) if as_json else diff_text(found))
    return 4 if found.regressions else 0


def _percent(option: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*%?", text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r}: expected per cent, such as 1% or 0.5%")
    return float(match[1])
