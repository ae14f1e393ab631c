"""What the budgets of a job come to: which bits every layer would get, found without compressing anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..compress.budget.choose import BitChoice, choose_bits
from ..errors import ModelError
from ..job.expand import expand
from ..job.loader import LoadedJob
from ..job.methods import DfmpcPlan
from ..job.task import Task
from ..models.factory import AllowList
from ..models.load import load_model


@dataclass(frozen=True)
class ChosenBits:
    """One task whose bit-plan has a budget."""

    task: str
    budget: str
    """As messages write it, such as ``3 bits a weight``."""
    choice: BitChoice


@dataclass(frozen=True)
class BitChoices:
    """The choices in the job's order; ``problems`` are the models that do not load and the budgets out of reach."""

    rows: list[ChosenBits]
    problems: list[str]


def choose_all_bits(loaded: LoadedJob, allow_code: Sequence[str] = ()) -> BitChoices:
    """Return the bits that running ``loaded`` would choose for its budgets.

    Loads every model that has one, so code on the allow-list runs; the sweep looks at every weight once and takes
    about as long as compressing in closed form. Writes nothing.
    """
    groups: dict[str, list[tuple[Task, DfmpcPlan]]] = {}
    for task in expand(loaded):
        if isinstance(task.plan, DfmpcPlan) and task.plan.budget is not None:
            groups.setdefault(task.model.name, []).append((task, task.plan))
    problems: list[str] = []
    allow = AllowList.default(allow_code)
    rows = [row for tasks in groups.values() for row in _rows(tasks, allow, problems)]
    return BitChoices(rows, problems)


def _rows(tasks: Sequence[tuple[Task, DfmpcPlan]], allow: AllowList, problems: list[str]) -> Iterator[ChosenBits]:
    """Yield the choices for one model's tasks; what would fail them goes to ``problems``."""
    source = tasks[0][0].model
    try:
        model = load_model(source, allow)
    except ModelError as error:
        problems.append(f"{source.name}: {error}")
        return
    for task, plan in tasks:
        try:
            with torch.inference_mode():
                yield ChosenBits(task.id, str(plan.budget), choose_bits(model, plan, task.layers))
        except ModelError as error:
            problems.append(f"{task.id}: {error}")
