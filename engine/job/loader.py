"""A job file on disk as a checked job; everything wrong with it is said at once, before anything starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import JobFileError, Problem
from .checks import Allows, Checks
from .document import Document, FieldPath, parse, path_text
from .problems import schema_problems
from .schema import Job

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class LoadedJob:
    """A valid job and where it lies; all paths are absolute."""

    job: Job
    path: Path
    """The job file."""
    folder: Path
    """Its folder, from which relative inputs count."""
    store: Path
    """The output folder."""


def load_job(path: Path, *, output: str | None = None, allows: Allows | None = None) -> LoadedJob:
    """Read and check the job file ``path``.

    ``output`` replaces the job's own (both count from the current folder); ``allows`` says whether a factory may run
    (None: no check). Raises JobFileError with every problem found: file, line, field path, value seen and what
    was expected. A missing model file is no problem of the job: it fails its own tasks later.
    """
    document, problems = _with_environment(parse(path))
    folder = Path(os.path.abspath(path)).parent
    job: Job | None = None
    try:
        job = Job.model_validate(document.data)
    except ValidationError as error:
        problems += schema_problems(error, document)
    problems += Checks(document, folder, allows).run()
    if job is None or problems:
        # A field's first problem is the cause of its others: an unset variable makes a path that is not there.
        first: dict[str, Problem] = {}
        for problem in problems:
            first.setdefault(problem.field, problem)
        raise JobFileError(str(path), sorted(first.values(), key=lambda problem: problem.line or 0))
    store = Path(os.path.abspath(output if output is not None else job.output))
    return LoadedJob(job=job, path=Path(os.path.abspath(path)), folder=folder, store=store)


def _with_environment(document: Document) -> tuple[Document, list[Problem]]:
    """Replace every ``${NAME}`` in a text; an unset one is a problem and stays as it was written."""
    problems: list[Problem] = []

    def filled(value: Any, path: FieldPath) -> Any:
        if isinstance(value, dict):
            return {key: filled(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in dict.fromkeys(_VARIABLE.findall(value)):
            if name not in os.environ:
                expected = f"the environment variable {name} to be set"
                problems.append(Problem(path_text(path), repr(value), expected, document.line(path)))
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)

    return replace(document, data=filled(document.data, ())), problems
