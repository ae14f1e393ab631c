"""The command line: every command by its name, with an example. What they do is in commands/, imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from . import __version__
from .commands.diff import diff
from .commands.export import export
from .commands.housekeeping import gc, status
from .commands.look import doctor, inspect, report, schema, verify
from .commands.options import example, guarded
from .commands.run import plan, run
from .commands.submit import submit

COMMANDS: dict[Callable[..., int | None], tuple[str, ...]] = {
    run: ("dfmpc run jobs/quickstart.yaml --only 'efficientnet-lite0/rtn*' --output /tmp/store",),
    submit: ("dfmpc submit nightly.yaml --slurm --shards 4 > nightly.sh", "sbatch nightly.sh"),
    plan: ("dfmpc plan jobs/quickstart.yaml",),
    status: ("dfmpc status store/quickstart", "dfmpc status store/quickstart --watch"),
    report: ("dfmpc report store/quickstart --layers --only '*/rtn-4'",),
    diff: ("dfmpc diff store/nightly", "dfmpc diff RUN_A RUN_B --max-slowdown 50% --json"),
    inspect: ("dfmpc inspect store/quickstart/artifacts/efficientnet-lite0/rtn-4/*",),
    verify: ("dfmpc verify store/quickstart",),
    export: ("dfmpc export store/quickstart/artifacts/efficientnet-lite0/rtn-4/* --format onnx",),
    gc: ("dfmpc gc store/nightly --keep-last 3 --runs-older-than 90d",),
    schema: ("dfmpc schema > job.schema.json",),
    doctor: ("dfmpc doctor --output /data/store",),
}
"""The commands in the order of ``--help``, each with the lines of its example."""

app = typer.Typer(
    help="Data-free compression of PyTorch models: YAML job files in, packed checkpoints and Parquet reports out.",
    epilog=example("dfmpc run jobs/quickstart.yaml", "dfmpc report store/quickstart"),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
for command, lines in COMMANDS.items():
    app.command(epilog=example(*lines))(guarded(command))


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


def main() -> None:
    """Run the command line; the entry point of ``dfmpc``."""
    app(prog_name="dfmpc")


if __name__ == "__main__":
    main()
