"""A registry: a folder tree of models, each described by a sidecar or taken as the program that it is.

A registry is other people's: what is wrong with one model fails its own tasks, with everything that is wrong in the
text, and stops nothing else. Nothing of the environment is put into a sidecar, and it names files of the registry only.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from ..errors import JobFileError, Problem
from .document import Document, FileKind, parse
from .fields import Name
from .problems import schema_problems
from .registry_walk import SIDECAR, ModelFolder, names_of, walk
from .schema import Evaluate, LayerRule, ModelFields, ModelSpec, Preprocess
from .sources import JobModel, ModelSource, effective_preprocess

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_KIND = FileKind("sidecar", "factory, checkpoint and input, or with program (docs/job_file.md lists every field)")
_LONGEST = 100


class Sidecar(ModelFields):
    """``dfmpc.yaml`` beside a model. Without factory and program it means the one .pt2 file of its folder."""

    layers: list[LayerRule] = Field(default=[], description="Overrides by layer name, before the job's.")
    bit_plans: list[str] | None = Field(
        None, description="Patterns of the job's bit-plans that this model gets; [] leaves it out; default: all."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.factory and self.program:
            raise ValueError("expected one of factory and program, got both")
        self.check_factory("checkpoint", "input")
        return self


def path_names(spec: ModelSpec, folder: Path) -> list[str]:
    """Return the names that the models of a registry have by their paths, without reading a sidecar."""
    root = _root(spec, folder)
    return [name for place in walk(root) for name, _ in names_of(place, root)]


def _root(spec: ModelSpec, folder: Path) -> Path:
    return Path(os.path.abspath(folder / (spec.registry or "")))


def registry_models(
    spec: ModelSpec,
    folder: Path,
    evaluate: Evaluate | None,
    plans: Sequence[str] | None = None,
    taken: Container[str] = (),
) -> list[JobModel]:
    """Return the models of the registry that ``spec`` names (relative to ``folder``), by path.

    A model is named by its sidecar or by its path below the registry, separators replaced by ``__``. One that cannot
    be used, or whose name is in ``taken`` or used before, has a ``problem`` and a name that nobody else has. ``plans``
    are the names of the job's bit-plans (None: not known). Raises UsageError where the tree cannot be walked.
    """
    root = _root(spec, folder)
    found: dict[str, JobModel] = {}
    for place in walk(root):
        for name, program in names_of(place, root):
            model = model_of(root, place, name, program, effective_preprocess(spec.preprocess, evaluate))
            model = entered(model, name, spec, plans, taken, found)
            found[model.source.name] = model
    return list(found.values())


def entered(
    model: JobModel,
    name: str,
    spec: ModelSpec,
    plans: Sequence[str] | None,
    taken: Container[str],
    found: Mapping[str, JobModel],
) -> JobModel:
    """Return ``model`` as one of ``found``: with a name that neither these nor ``taken`` have, and the entry's gates.

    ``name`` is the one that its registry gives it.
    """
    return _with_gates(_named(_with_plans(model, plans), name, taken, found), spec)


def _with_gates(model: JobModel, spec: ModelSpec) -> JobModel:
    return replace(model, gates=(spec.gates, *model.gates)) if spec.gates is not None else model


def model_of(root: Path, place: ModelFolder, name: str, program: str, below: Preprocess | None) -> JobModel:
    """Return the model of a folder below ``root`` under ``name``, or under its sidecar's, with what is wrong with it.

    ``program`` is its one .pt2 file, empty where it has none; ``below`` the job's preprocessing.
    """
    folder = root.joinpath(*place.parts)
    if not _is_text(f"{folder}{program}"):
        problem = f"the path {str(folder / program)!a} is not UTF-8: rename it"
        return JobModel(ModelSource(name=safe_name(name), problem=problem))
    if place.problem:
        return JobModel(ModelSource(name=name, problem=place.problem))
    if not place.sidecar:
        source = ModelSource(name=name, program=str(folder / program), preprocess=below)
        return JobModel(source, origin=str(folder / program))
    file = folder / SIDECAR
    try:
        document = parse(file, _KIND)
    except JobFileError as error:
        return _broken(name, file, error.problems)
    try:
        sidecar = Sidecar.model_validate(document.data)
    except ValidationError as error:
        return _broken(name, file, schema_problems(error, document, Sidecar) + _outside(root, folder, document))
    if problems := _outside(root, folder, document) + _no_program(sidecar, document, place, program):
        return _broken(sidecar.name or name, file, problems)
    return replace(_described(sidecar, folder, name, program, below), origin=str(file))


def _is_text(path: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def _described(sidecar: Sidecar, folder: Path, name: str, program: str, below: Preprocess | None) -> JobModel:
    chosen = sidecar.program or (None if sidecar.factory else program)
    source = ModelSource(
        name=sidecar.name or name,
        factory=sidecar.factory,
        args=sidecar.args,
        kwargs=sidecar.kwargs,
        checkpoint=_path(folder, sidecar.checkpoint),
        program=_path(folder, chosen),
        input=sidecar.input,
        preprocess=effective_preprocess(sidecar.preprocess, below),
    )
    plans = tuple(sidecar.bit_plans) if sidecar.bit_plans is not None else None
    gates = (sidecar.gates,) if sidecar.gates is not None else ()
    return JobModel(source, gates, tuple(sidecar.layers), plans)


def _path(folder: Path, location: str | None) -> str | None:
    if location is None or location.startswith("package://"):
        return location
    return os.path.abspath(folder / location)


def _broken(name: str, file: Path, problems: Sequence[Problem]) -> JobModel:
    said = "\n".join(f"{file}: {problem}" for problem in sorted(problems, key=lambda one: one.line or 0))
    return JobModel(ModelSource(name=name, problem=said))


def _outside(root: Path, folder: Path, document: Document) -> list[Problem]:
    """Return the fields that name a file outside the registry; links inside it may lead anywhere."""
    return [
        Problem(
            field, repr(location), f"a file of the registry {root}, or package://NAME/PATH", document.line((field,))
        )
        for field in ("checkpoint", "program")
        if isinstance(location := document.data.get(field), str)
        and not location.startswith("package://")
        and not Path(os.path.abspath(folder / location)).is_relative_to(root)
    ]


def _no_program(sidecar: Sidecar, document: Document, place: ModelFolder, program: str) -> list[Problem]:
    if sidecar.factory or sidecar.program or program:
        return []
    seen = ", ".join(place.programs) or "no .pt2 file"
    return [Problem("program", f"nothing, beside {seen}", "a factory or a program", document.line(()))]


def _with_plans(model: JobModel, known: Sequence[str] | None) -> JobModel:
    """Refuse patterns that match no bit-plan: the model would be left out without a word."""
    patterns = model.plans
    if not patterns or known is None or any(fnmatchcase(name, one) for name in known for one in patterns):
        return model
    problem = f"{model.origin}: bit_plans {', '.join(patterns)} match none of the job's: {', '.join(known)}"
    return JobModel(ModelSource(name=model.source.name, problem=problem), origin=model.origin)


def _named(model: JobModel, path_name: str, taken: Container[str], found: Mapping[str, JobModel]) -> JobModel:
    """Return ``model`` under a name that is one and that nobody has, with a problem where that is not its own."""
    name = model.source.name
    try:
        _NAME.validate_python(name)
        problem = f"{model.origin}: the name {name!r} is used by another model: give another one in {SIDECAR}"
    except ValidationError:
        problem = f"{model.origin}: the path gives {name!r}, which cannot be a model's name: give one in {SIDECAR}"
    else:
        if name not in taken and name not in found:
            return model
    base = safe_name(path_name)
    free = (f"{base}+{number}" if number > 1 else base for number in itertools.count(1))
    unused = next(one for one in free if one not in taken and one not in found)
    return replace(model, source=ModelSource(name=unused, problem=model.source.problem or problem))


def safe_name(name: str) -> str:
    """Return a name made of ``name``: other characters become ``-``, and a digest keeps such names apart."""
    plain = re.sub(r"[^A-Za-z0-9_+-]+", "-", name.replace("..", "--"))[:_LONGEST]
    if plain == name:
        return name
    return f"{plain}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
