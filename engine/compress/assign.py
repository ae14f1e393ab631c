"""Which layer gets which role, width, grid and granularity under a bit-plan and the job's layer rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dfmpc.kernels.formats import Grid

from ..job.methods import DfmpcPlan, RtnPlan, role_granularity
from ..job.schema import LayerRule
from ..models.graph import Layer, Pairing

Role = Literal["low", "high", "unpaired"]


@dataclass(frozen=True)
class Assignment:
    """How one layer is to be quantized; ``keep`` leaves it as it is."""

    layer: Layer
    role: Role
    bits: int
    grid: Grid
    granularity: str
    keep: bool = False
    reason: str = ""

    @property
    def group_size(self) -> int:
        """Elements of a row that share a scale."""
        if self.granularity.startswith("group:"):
            return min(int(self.granularity.removeprefix("group:")), self.layer.length)
        return self.layer.length

    @property
    def layer_wise(self) -> bool:
        """One scale for the whole tensor."""
        return self.granularity == "tensor"


def _role(layer: Layer, pairing: Pairing) -> Role:
    if layer.name in pairing.lows:
        return "low"
    return "high" if layer.name in pairing.highs else "unpaired"


def _dfmpc_grid(role: Role, bits: int) -> Grid:
    return Grid.TERNARY if role == "low" and bits == 2 else Grid.DOREFA


def _assign_one(layer: Layer, plan: DfmpcPlan | RtnPlan, rule: LayerRule | None, pairing: Pairing) -> Assignment:
    role = _role(layer, pairing)
    side: Literal["low", "high"] = "low" if role == "low" else "high"
    planned = plan.bits if isinstance(plan, RtnPlan) else getattr(plan, side)
    bits = rule.bits if rule and rule.bits else planned
    granularity = rule.granularity if rule and rule.granularity else role_granularity(plan, side)
    if isinstance(plan, RtnPlan):
        grid = Grid.SYMMETRIC if plan.symmetric else Grid.ASYMMETRIC
    else:
        grid = _dfmpc_grid(role, bits)
    reason = pairing.reasons.get(layer.name, "")
    return Assignment(layer, role, bits, grid, granularity, bool(rule and rule.keep), reason)


def assign(
    layers: Sequence[Layer], plan: DfmpcPlan | RtnPlan, rules: Sequence[LayerRule], pairing: Pairing
) -> dict[str, Assignment]:
    """Return every layer's assignment by name, in the order of ``layers``; the first rule that matches wins."""
    chosen = {}
    for layer in layers:
        rule = next((rule for rule in rules if fnmatchcase(layer.name, rule.match)), None)
        chosen[layer.name] = _assign_one(layer, plan, rule, pairing)
    return chosen
