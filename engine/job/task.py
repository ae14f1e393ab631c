"""A task as it travels: frozen, in the ledger, to the workers. Whoever only does tasks needs no job file."""

from __future__ import annotations

from pydantic import Field

from .fields import Strict
from .gates import Gates
from .methods import BitPlan
from .schema import LayerRule
from .sources import ModelSource


class Task(Strict):
    """One model under one bit-plan: the unit of work, of retry and of resume."""

    id: str = Field(description="MODEL/PLAN.")
    model: ModelSource = Field(description="Where the network comes from.")
    plan: BitPlan = Field(description="The bit-plan with its defaults filled in.")
    layers: list[LayerRule] = Field(default=[], description="Overrides by layer name: the model's own, the job's.")
    gates: Gates | None = Field(None, description="Bounds of this model's tasks where it has its own; null: the job's.")
