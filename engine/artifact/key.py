"""A task's key: the digest of everything that decides its artifact's bytes, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from dfmpc.kernels.formats import NUMERICS_VERSION
from pydantic import JsonValue

from ..job.calibrators import PRIORS_VERSION, SyntheticCalibrator
from ..job.methods import DfmpcPlan
from ..job.recipes import RECIPES_VERSION, describe_plan, steps_of
from ..job.sources import ModelSource
from ..job.task import Task
from ..models.pairs import PAIRING_VERSION
from .manifest import FORMAT_VERSION

KEY_VERSION = 2
EVALUATION_VERSION = 1
DTYPES: dict[str, JsonValue] = {"weights": "float32", "statistics": "float64", "scales": "float32"}


@cache
def torch_version() -> str:
    """Return the installed torch's version without importing it; looked up once, since that reads the disk."""
    return version("torch")


@dataclass(frozen=True)
class TaskKey:
    """A key and what went into it."""

    key: str
    """64 hexadecimal digits."""
    ingredients: dict[str, JsonValue]

    @property
    def short(self) -> str:
        """The 12 digits that name folders."""
        return self.key[:12]


def task_key(
    task: Task, digests: Sequence[str], *, distribution: str | None, device: str = "cpu", threads: int = 1
) -> TaskKey:
    """Return the key of ``task``.

    ``digests`` are the tree digests of ``models.load.input_files(task.model)``, in that order; ``distribution`` is
    ``models.factory.distribution_version`` of the factory, None for a program. Names of model and plan and paths are
    left out. ``device`` and ``threads`` count only where the recipe factorises matrices or forwards images, whose last
    bits depend on them and on torch; every other recipe gives the same bytes everywhere.
    """
    ingredients: dict[str, JsonValue] = {
        "key_version": KEY_VERSION,
        "format_version": FORMAT_VERSION,
        "numerics_version": NUMERICS_VERSION,
        "recipes_version": RECIPES_VERSION,
        "pairing_version": PAIRING_VERSION,
        "dtypes": DTYPES,
        "source": _source(task.model, digests, distribution),
        # what "auto" stands for may change, and then so do the bytes
        "recipe": describe_plan(task.plan).recipe,
        "calibrator": _calibrator(task),
        "numerics": _numerics(task, device, threads),
        "plan": task.plan.model_dump(mode="json", exclude={"name", "pareto"}),
        "layers": [rule.model_dump(mode="json") for rule in task.layers],
    }
    return TaskKey(digest_of(ingredients), ingredients)


def _source(source: ModelSource, digests: Sequence[str], distribution: str | None) -> dict[str, JsonValue]:
    fields = source.model_dump(mode="json", include={"factory", "args", "kwargs", "input"})
    role = "program" if source.program else "checkpoint"
    inputs: list[JsonValue] = [{"role": role, "digest": digest} for digest in digests]
    # the graph that lies in the artifact is written by torch, each version in its own way
    writer = torch_version() if source.program else None
    return {**fields, "distribution": distribution, "inputs": inputs, "torch": writer}


def _calibrator(task: Task) -> JsonValue:
    """What the calibrator is after its recipe's defaults, and what its images are made and normalised by."""
    if not isinstance(task.plan, DfmpcPlan):
        return None
    calibrator = steps_of(task.plan).calibrator
    found: dict[str, JsonValue] = calibrator.model_dump(mode="json")
    if isinstance(calibrator, SyntheticCalibrator):
        preprocess = task.model.preprocess
        # without numbers of its own a block for labels changes no image
        stated = preprocess if preprocess and preprocess.mean else None
        found |= {
            "priors_version": PRIORS_VERSION,
            "normalisation": stated.model_dump(mode="json", include={"mean", "std"}) if stated else None,
        }
    return found


def _numerics(task: Task, device: str, threads: int) -> JsonValue:
    if not (isinstance(task.plan, DfmpcPlan) and steps_of(task.plan).factorises):
        return None
    return {"device": device.partition(":")[0], "threads": threads, "torch": torch_version()}


def evaluation_key(artifact_key: str, settings: Mapping[str, JsonValue], data_digest: str | None) -> str:
    """Return the key (64 hexadecimal digits) of one evaluation: of what, how, and on which images."""
    return digest_of(
        {"version": EVALUATION_VERSION, "artifact": artifact_key, "settings": dict(settings), "data": data_digest}
    )


def digest_of(value: JsonValue) -> str:
    """Return sha256 over the canonical JSON of ``value``: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def explain(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> str:
    """Return which ingredients differ, such as ``plan.low: 2 → 3``, or that none does."""
    before, after = dict(_leaves("", dict(old))), dict(_leaves("", dict(new)))
    changes = [
        f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return "; ".join(changes) or "no ingredient differs"


def _leaves(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    """Yield every leaf's path and its JSON text."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, part)
    elif isinstance(value, list) and value:
        for index, part in enumerate(value):
            yield from _leaves(f"{name}[{index}]", part)
    else:
        yield name, json.dumps(value, ensure_ascii=False)
