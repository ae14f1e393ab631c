"""What several commands have in common: the options they share, and how a command ends."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from ..errors import DfmpcError, InterruptedRunError

if TYPE_CHECKING:
    from ..job.loader import LoadedJob

_Parameters = ParamSpec("_Parameters")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a store: its newest run.")]
Only = Annotated[str | None, typer.Option(metavar="MODEL/PLAN", help="Only tasks that match this pattern.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Output = Annotated[str | None, typer.Option(help="The store, instead of the job's output.")]
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        help="A module prefix or a folder whose factories may run; repeat it for more (also DFMPC_ALLOW_CODE)."
    ),
]


def example(*lines: str) -> str:
    """Return the epilog of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def guarded(command: Callable[_Parameters, int | None]) -> Callable[_Parameters, None]:
    """Turn what a command returns or raises into an exit code and, for our errors, lines on stderr."""

    @functools.wraps(command)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
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

    return run


def load(job: Path, output: str | None, allow_code: Sequence[str] | None) -> LoadedJob:
    """Read and check a job file with what the operator allows."""
    from ..job.loader import load_job  # noqa: PLC0415
    from ..models.factory import AllowList  # noqa: PLC0415

    return load_job(job, output=output, allows=AllowList.default(tuple(allow_code or ())).allows)
