"""A batch script for Slurm: an array with an element a shard, each of which requeues itself when it is interrupted."""

from __future__ import annotations

import re
import shlex

from ... import __version__
from ...errors import InterruptedRunError, UsageError
from .options import MARGIN_S, Request, plain_name

_NAME_LENGTH = 60


def render_slurm(request: Request, partition: str | None = None) -> str:
    """Return the script; UsageError where ``partition`` cannot be one.

    Slurm reads the #SBATCH lines without a shell, so they hold nothing but checked words. Everything else is quoted.
    """
    if partition is not None and not re.fullmatch(r"[\w.,-]+", partition, re.ASCII):
        raise UsageError(f"--partition {partition!r}: give names of letters, digits, '_', '.' and '-'")
    lines = "".join(f"#SBATCH --{line}\n" for line in _directives(request, partition))
    words = " ".join(shlex.quote(word) for word in request.run_command())
    values = {
        "@FOLDER@": shlex.quote(request.folder),
        "@COMMAND@": words,
        "@AGAIN@": str(InterruptedRunError.exit_code),
        "@REQUEUES@": str(request.requeues),
    }
    body = re.sub("@[A-Z]+@", lambda found: values[found[0]], _BODY)
    return f"#!/bin/bash\n# Written by dfmpc {__version__}. Read it, then give it to sbatch.\n{lines}{body}"


def _directives(request: Request, partition: str | None) -> list[str]:
    name = plain_name(request.name, _NAME_LENGTH)
    gpus = [f"gres=gpu:{request.gpus}"] if request.gpus else []
    return [
        f"job-name={name}",
        f"output={name}-%A_%a.log",
        "open-mode=append",
        f"array=0-{request.shards - 1}",
        "requeue",
        f"signal=B:USR1@{request.grace_s + MARGIN_S}",
        f"time={request.time}",
        *gpus,
        f"cpus-per-task={request.cpus}",
        f"mem={request.memory}",
        *([f"partition={partition}"] if partition else []),
    ]


_BODY = r"""
set -u
cd -- @FOLDER@ || exit 2

# Compiled kernels go to this node's own disk, which is fast, and to a folder that nobody else can write.
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
TRITON_CACHE_DIR=$(mktemp -d -- "$scratch/dfmpc-triton-XXXXXXXX") || exit 2
export TRITON_CACHE_DIR
trap 'rm -rf -- "$TRITON_CACHE_DIR"' EXIT

# Slurm signals this shell; bash would act on it only after the run, so the run goes to the background.
signalled=
trap 'signalled=yes; kill -USR1 "$!" 2>/dev/null' USR1 TERM
@COMMAND@ &

# A signal ends a wait before the run ends.
while :; do
    wait "$!"
    code=$?
    [ -n "$signalled" ] || break
    signalled=
done

# USR1 and TERM end a run with their own codes only before it listens to them.
case $code in
@AGAIN@ | 138 | 143)
    # An element is requeued by its own number: the bare job number of the last one would mean the whole array. One that
    # somebody cancelled is not running any more and stays cancelled.
    element=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    if [ "${SLURM_RESTART_COUNT:-0}" -ge @REQUEUES@ ]; then
        echo "interrupted; not requeued: that was done ${SLURM_RESTART_COUNT:-0} times (dfmpc submit --requeues)"
    elif [ "$(squeue --noheader --jobs="$element" --format=%T)" = RUNNING ]; then
        echo "interrupted; requeued as $element"
        scontrol requeue "$element"
    fi
    ;;
esac
exit "$code"
"""
