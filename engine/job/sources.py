"""Where each model of a job comes from, with absolute paths and its final name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field

from .fields import Strict
from .gates import Gates
from .schema import Evaluate, LayerRule, ModelSpec, Preprocess, Selector


class Registered(Strict):
    """The version of a registered MLflow model that a source was taken from."""

    entry: int = Field(description="Index of the entry among the job's models.")
    name: str = Field(description="Name of the registered model.")
    version: str = Field(description="Number of the version.")


class ModelSource(Strict):
    """A named source: a factory with a checkpoint, or a .pt2 program."""

    name: str = Field(description="Name of the model, part of every path that belongs to it.")
    factory: str | None = Field(None, description="module:callable.")
    args: list[str | int | float | bool | None] = Field(default=[], description="Positional arguments of the factory.")
    kwargs: dict[str, str | int | float | bool | None] = Field(default={}, description="Its keyword arguments.")
    checkpoint: str | None = Field(None, description="Absolute path or package:// URL; with a factory.")
    program: str | None = Field(None, description="Absolute path of a .pt2 program; without a factory.")
    input: list[int] | None = Field(None, description="Shape of one example input, batch first.")
    preprocess: Preprocess | None = Field(
        None, description="Effective preprocessing: evaluate's with the model's on top."
    )
    problem: str | None = Field(
        None, description="Why the model cannot be used, where its registry's entry is at fault: its tasks fail by it."
    )
    registered: Registered | None = Field(None, description="Where it was taken from, of an MLflow registry.")


@dataclass(frozen=True)
class JobModel:
    """A source, and what holds for this model alone."""

    source: ModelSource
    gates: tuple[Gates, ...] = ()
    """Bounds in the place of the job's; the last that names one counts."""
    layers: tuple[LayerRule, ...] = ()
    """Rules before the job's."""
    plans: tuple[str, ...] | None = None
    """Patterns of the bit-plans that it gets; None: all."""
    origin: str = ""
    """The sidecar or program of a registry that it is, for messages."""


def model_sources(spec: ModelSpec, folder: Path, evaluate: Evaluate | None) -> list[ModelSource]:
    """Return the models of one entry: one, or for a glob one a matching .pt2 file, sorted by path (maybe none).

    A registry's are ``registry_models``' and ``mlflow_models``' business.
    Relative paths count from ``folder``. A model of a glob is named by its path relative to ``folder`` (leading ``..``
    dropped; for an absolute pattern relative to its part without wildcards), separators replaced by ``__``.
    """
    if spec.registry is not None or spec.mlflow is not None:
        return []
    preprocess = effective_preprocess(spec.preprocess, evaluate)
    if spec.glob is not None:
        return [
            ModelSource(name=_glob_name(found, spec.glob), program=_absolute(folder, found), preprocess=preprocess)
            for found in _matches(spec.glob, folder)
        ]
    return [
        ModelSource(
            name=spec.name or Path(spec.program or "").stem,
            factory=spec.factory,
            args=spec.args,
            kwargs=spec.kwargs,
            checkpoint=_absolute(folder, spec.checkpoint),
            program=_absolute(folder, spec.program),
            input=spec.input,
            preprocess=preprocess,
        )
    ]


def effective_preprocess(own: Preprocess | None, below: Preprocess | None) -> Preprocess | None:
    """Return the preprocessing ``below`` (evaluate's) with the fields that the model itself sets on top."""
    if own is None and below is None:
        return None
    fields: dict[str, object] = {}
    for block in (below, own):
        if block is not None:
            fields |= {name: getattr(block, name) for name in Preprocess.model_fields if name in block.model_fields_set}
    return Preprocess.model_validate(fields)


def _absolute(folder: Path, location: str | None) -> str | None:
    if location is None or location.startswith("package://"):
        return location
    return os.path.abspath(folder / location)


def _matches(pattern: str, folder: Path) -> list[str]:
    found = glob.glob(pattern, root_dir=folder, recursive=True)
    return sorted({os.path.normpath(path) for path in found if path.endswith(".pt2") and (folder / path).is_file()})


def _glob_name(found: str, pattern: str) -> str:
    path = Path(found)
    if path.is_absolute():
        fixed = Path(pattern)
        while glob.has_magic(str(fixed)) or fixed == path:
            fixed = fixed.parent
        path = path.relative_to(os.path.normpath(fixed))
    parts = [part for part in path.with_suffix("").parts if part != ".."]
    return "__".join(parts)


def matches_selector(selector: Selector, model: str, plan: str) -> bool:
    """Say whether a combination is one that ``selector`` means."""
    return fnmatchcase(model, selector.model) and fnmatchcase(plan, selector.plan)


def selected(include: Sequence[Selector], exclude: Sequence[Selector], model: str, plan: str) -> bool:
    """Say whether include and exclude leave a combination in."""
    wanted = not include or any(matches_selector(one, model, plan) for one in include)
    return wanted and not any(matches_selector(one, model, plan) for one in exclude)
