"""A loaded job as the list of its tasks: models x bit-plans, less what include and exclude leave out."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import JobFileError, Problem, UsageError
from .gates import effective_gates
from .loader import LoadedJob
from .methods import BitPlan
from .mlflow_source import mlflow_models
from .registry import registry_models
from .sources import JobModel, ModelSource, model_sources, selected
from .task import Task


def expand(loaded: LoadedJob) -> list[Task]:
    """Return the tasks, models in the order of the file (a glob's by path, registries last), then plans in the order.

    Raises JobFileError where two models have one name or nothing is left to do; ``load_job`` has checked both, so
    this happens only when files of a glob changed meanwhile.
    """
    job = loaded.job
    models = _named_models(loaded)
    names = [model.source.name for model in models]
    clashes = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if clashes:
        raise JobFileError(str(loaded.path), [Problem("models", name, "each model name once") for name in clashes])
    models += _registered_models(loaded, names)
    tasks = [_task(loaded, model, plan) for model in models for plan in job.bit_plans if _wanted(loaded, model, plan)]
    if not tasks:
        raise JobFileError(str(loaded.path), [Problem("models", "no task at all", "a model and a bit-plan to run")])
    return tasks


def _named_models(loaded: LoadedJob) -> list[JobModel]:
    """Return the models that the job file names, itself or by a glob."""
    return [
        JobModel(source, (spec.gates,) if spec.gates is not None else ())
        for spec in loaded.job.models
        for source in model_sources(spec, loaded.folder, loaded.job.evaluate)
    ]


def _registered_models(loaded: LoadedJob, taken: Sequence[str]) -> list[JobModel]:
    """Return the models of the registries; one whose name is taken says so instead of stopping the job."""
    found: dict[str, JobModel] = {name: JobModel(ModelSource(name=name)) for name in taken}
    plans = [plan.name for plan in loaded.job.bit_plans]
    for entry, spec in enumerate(loaded.job.models):
        if spec.registry is not None:
            models = registry_models(spec, loaded.folder, loaded.job.evaluate, plans, found)
        else:
            models = mlflow_models(spec, entry, loaded.folder, loaded.store, loaded.job.evaluate, plans, found)
        found |= {model.source.name: model for model in models}
    return list(found.values())[len(taken) :]


def _wanted(loaded: LoadedJob, model: JobModel, plan: BitPlan) -> bool:
    own = model.plans is None or any(fnmatchcase(plan.name, pattern) for pattern in model.plans)
    return own and selected(loaded.job.include, loaded.job.exclude, model.source.name, plan.name)


def _task(loaded: LoadedJob, model: JobModel, plan: BitPlan) -> Task:
    gates = loaded.job.gates
    for own in model.gates:
        gates = effective_gates(gates, own)
    return Task(
        id=f"{model.source.name}/{plan.name}",
        model=model.source,
        plan=plan,
        layers=[*model.layers, *loaded.job.layers],
        gates=gates if model.gates else None,
    )


def choose(tasks: Sequence[Task], only: str | None) -> list[Task]:
    """Return the tasks whose id matches the fnmatch pattern ``only`` (None: all); UsageError where none does."""
    chosen = [task for task in tasks if only is None or fnmatchcase(task.id, only)]
    if not chosen:
        known = ", ".join(task.id for task in tasks[:8]) + (", …" if len(tasks) > 8 else "")
        raise UsageError(f"--only {only!r} matches no task; the tasks are {known} (patterns such as 'MODEL/*' work)")
    return chosen
