"""The operator's command at the end of a run: it is told how the run went, and cannot change that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_GRACE_S = 5.0
"""From SIGTERM to SIGKILL."""


def run_on_finish(command: str, summary_json: str, run: Path, exit_code: int, timeout_s: float = 300) -> bool:
    """Run ``command`` in a shell and return whether it ended with 0 within ``timeout_s`` seconds.

    It gets ``summary_json`` on its standard input, and DFMPC_RUN (the run's folder) and DFMPC_EXIT_CODE in its
    environment; what it prints goes to our standard error. Where it takes too long its whole process group is ended.
    Whatever goes wrong is a warning on standard error and nothing more.
    """
    problem = _problem(command, summary_json, {"DFMPC_RUN": str(run), "DFMPC_EXIT_CODE": str(exit_code)}, timeout_s)
    if problem:
        print(f"dfmpc: warning: --on-finish {command!r} {problem}", file=sys.stderr, flush=True)
    return not problem


def _problem(command: str, summary_json: str, told: dict[str, str], timeout_s: float) -> str:
    """Return what went wrong; empty where nothing did."""
    sys.stderr.flush()
    try:
        started = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.PIPE,
            stdout=2,
            env={**os.environ, **told},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"could not be started: {error}"
    try:
        started.communicate(summary_json.encode(), timeout_s)
    except subprocess.TimeoutExpired:
        _end_group(started)
        return f"was ended after {timeout_s:g} s"
    except BaseException:
        _end_group(started)
        raise
    if started.returncode < 0:
        return f"was ended by {signal.Signals(-started.returncode).name}"
    return f"ended with exit code {started.returncode}" if started.returncode else ""


def _end_group(started: subprocess.Popen[bytes]) -> None:
    """End the command and what it started; it is a session of its own, so the group has its number."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(started.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            started.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    started.wait()
