"""A job's first steps: its tasks, its devices, and the processes of its workers.

Those import what they need, which takes them longest of all, while this process imports the rest of the scheduler and
finds its run: so nothing of that is imported here before they are started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from ..job.expand import choose, expand
from ..job.loader import LoadedJob
from ..job.task import Task
from .schedule.devices import device_slots, workers_on
from .schedule.spares import Spares
from .summary import RunOptions, RunSummary

if TYPE_CHECKING:
    from .cluster.ray_cluster import RayCluster

__all__ = ["RunOptions", "RunSummary", "run_job"]

_DEFAULTS = RunOptions()
Ended = Callable[[RunSummary], None]


def run_job(
    loaded: LoadedJob, options: RunOptions = _DEFAULTS, telling: Callable[[], Ended] = lambda: _silent
) -> RunSummary:
    """Run a job: resume the unfinished run of the same tasks, or start one, and see every task to its row.

    ``telling`` is called while the workers' processes start, and may import. What it returns gets the summary while
    signals are still caught: one that comes when all is done ends nothing.

    Raises UsageError where nothing can start: no task matches ``only``, a device is not there, the output cannot be
    written, lacks what a store needs, or has no room. What fails later is in the rows.
    """
    tasks = choose(expand(loaded), options.only)
    with ExitStack() as signals:
        with ExitStack() as cluster:  # while it is connected stdout is not ours
            ray = cluster.enter_context(_ray_at(options.ray_address)) if options.executor == "ray" else None
            spares = signals.enter_context(_spares(loaded, tasks, options, ray))
            from .scheduler import run_tasks  # noqa: PLC0415 - the workers' processes are at their imports by now

            ended = telling()
            summary = run_tasks(loaded, tasks, options, spares, ray, signals)
        for text in summary.unmatched:
            print(f"dfmpc: warning: {text}", file=sys.stderr)
        ended(summary)
    return summary


def _silent(_: RunSummary) -> None:
    return


def _spares(loaded: LoadedJob, tasks: Sequence[Task], options: RunOptions, ray: RayCluster | None) -> Spares:
    """Start a process for every slot, though no more than there are models; on a cluster none."""
    resources = loaded.job.resources
    asked = options.devices or resources.devices
    devices = device_slots(asked) if ray is None else [ray.device(asked, resources.threads)]
    each = workers_on(devices, asked, resources.workers_per_device, resources.threads)
    models = len({task.model.name for task in tasks})
    return Spares(devices, each, resources.threads, most=0 if ray else models)


def _ray_at(address: str) -> AbstractContextManager[RayCluster]:
    from .cluster.ray_connect import connected  # noqa: PLC0415 - every other run starts sooner without

    return connected(address)
