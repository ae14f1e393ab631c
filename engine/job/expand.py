"""A loaded job as the list of its tasks: models x bit-plans, less what include and exclude leave out."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pydantic import Field

from ..errors import JobFileError, Problem, UsageError
from .fields import Strict
from .loader import LoadedJob
from .methods import BitPlan
from .schema import LayerRule
from .sources import ModelSource, model_sources, selected

__all__ = ["ModelSource", "Task", "choose", "expand"]


class Task(Strict):
    """One model under one bit-plan: the unit of work, of retry and of resume."""

    id: str = Field(description="MODEL/PLAN.")
    model: ModelSource = Field(description="Where the network comes from.")
    plan: BitPlan = Field(description="The bit-plan with its defaults filled in.")
    layers: list[LayerRule] = Field(default=[], description="The job's overrides by layer name.")


def expand(loaded: LoadedJob) -> list[Task]:
    """Return the tasks, models in the order of the file (a glob's by path), then plans in the order of the file.

    Raises JobFileError where two models have one name or nothing is left to do; ``load_job`` has checked both, so
    this happens only when files of a glob changed meanwhile.
    """
    job = loaded.job
    sources = [source for spec in job.models for source in model_sources(spec, loaded.folder, job.evaluate)]
    names = [source.name for source in sources]
    clashes = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if clashes:
        raise JobFileError(str(loaded.path), [Problem("models", name, "each model name once") for name in clashes])
    tasks = [
        Task(id=f"{source.name}/{plan.name}", model=source, plan=plan, layers=job.layers)
        for source in sources
        for plan in job.bit_plans
        if selected(job.include, job.exclude, source.name, plan.name)
    ]
    if not tasks:
        raise JobFileError(str(loaded.path), [Problem("models", "no task at all", "a model and a bit-plan to run")])
    return tasks


def choose(tasks: Sequence[Task], only: str | None) -> list[Task]:
    """Return the tasks whose id matches the fnmatch pattern ``only`` (None: all); UsageError where none does."""
    chosen = [task for task in tasks if only is None or fnmatchcase(task.id, only)]
    if not chosen:
        known = ", ".join(task.id for task in tasks[:8]) + (", …" if len(tasks) > 8 else "")
        raise UsageError(f"--only {only!r} matches no task; the tasks are {known} (patterns such as 'MODEL/*' work)")
    return chosen
