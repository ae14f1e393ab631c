"""A bit-plan given as Python arguments: checked, and its faults told, as in a job file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import Problem, UsageError
from .document import Document
from .methods import BitPlan
from .problems import schema_problems
from .schema import Job

_PLACE = "bit_plans[0]"


def plan_from(fields: Mapping[str, Any]) -> BitPlan:
    """Return the bit-plan with ``fields``; ``name`` may be left out. Raises UsageError with every problem."""
    data = {
        "version": 1,
        "name": "plan",
        "output": "store",
        "models": [{"program": "network.pt2"}],
        "bit_plans": [{"name": "plan", **fields}],
    }
    try:
        return Job.model_validate(data).bit_plans[0]
    except ValidationError as error:
        problems = [_text(problem) for problem in schema_problems(error, Document("", data, {}))]
        raise UsageError(f"compress() got no valid bit-plan: {'; '.join(problems)}") from error


def _text(problem: Problem) -> str:
    field = problem.field.removeprefix(_PLACE).removeprefix(".") or "the plan"
    return f"{field}: got {problem.value}; expected {problem.expected}"
