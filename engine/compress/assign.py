"""Which layer gets which role, width, grid and granularity under a bit-plan and the job's layer rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dfmpc.kernels.formats import CodeFormat, Grid

from ..job.methods import DfmpcPlan, RtnPlan, role_granularity
from ..job.neighbours import DfqPlan, NeighbourPlan, SquantPlan
from ..job.schema import LayerRule
from ..models.graph import Layer, Pairing

Role = Literal["low", "high", "unpaired"]
AnyPlan = DfmpcPlan | RtnPlan | NeighbourPlan


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
    def format(self) -> CodeFormat:
        """Grid and width of its codes."""
        return CodeFormat(
            self.grid,
            self.bits,
            self.layer.length,
            self.layer.length if self.layer_wise else self.group_size,
            self.layer_wise,
        )

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


def _dfmpc_grid(role: Role, bits: int, low_levels: int) -> Grid:
    return Grid.TERNARY if role == "low" and bits == 2 and low_levels == 3 else Grid.DOREFA


_NEIGHBOUR_GRIDS = {
    "omse": Grid.SYMMETRIC,
    "vecq": Grid.DOREFA,
    "mul2q": Grid.ASYMMETRIC,
    "daq": Grid.ASYMMETRIC,
    "hqq": Grid.ASYMMETRIC,
}


def _neighbour_grid(plan: NeighbourPlan, bits: int) -> Grid:
    if isinstance(plan, DfqPlan | SquantPlan):
        return Grid.SYMMETRIC if plan.symmetric else Grid.ASYMMETRIC
    if plan.method == "twn-exact":
        return Grid.TERNARY if bits == 2 else Grid.DOREFA
    return _NEIGHBOUR_GRIDS[plan.method]


def _planned_bits(plan: AnyPlan, side: Literal["low", "high"]) -> int:
    if isinstance(plan, NeighbourPlan):
        return plan.width(side)
    return plan.bits if isinstance(plan, RtnPlan) else int(getattr(plan, side))


def _assign_one(
    layer: Layer, plan: AnyPlan, rule: LayerRule | None, pairing: Pairing, chosen: int | None
) -> Assignment:
    role = _role(layer, pairing)
    side: Literal["low", "high"] = "low" if role == "low" else "high"
    planned = _planned_bits(plan, side)
    bits = rule.bits if rule and rule.bits else chosen or planned
    granularity = rule.granularity if rule and rule.granularity else role_granularity(plan, side)
    if isinstance(plan, RtnPlan):
        grid = Grid.SYMMETRIC if plan.symmetric else Grid.ASYMMETRIC
    elif isinstance(plan, NeighbourPlan):
        grid = _neighbour_grid(plan, bits)
    else:
        grid = _dfmpc_grid(role, bits, plan.low_levels)
    reason = pairing.reasons.get(layer.name, "")
    return Assignment(layer, role, bits, grid, granularity, bool(rule and rule.keep), reason)


def assign(
    layers: Sequence[Layer],
    plan: AnyPlan,
    rules: Sequence[LayerRule],
    pairing: Pairing,
    chosen_bits: Mapping[str, int] | None = None,
) -> dict[str, Assignment]:
    """Return every layer's assignment by name, in the order of ``layers``; the first rule that matches wins."""
    chosen = {}
    for layer in layers:
        rule = next((rule for rule in rules if fnmatchcase(layer.name, rule.match)), None)
        chosen[layer.name] = _assign_one(layer, plan, rule, pairing, (chosen_bits or {}).get(layer.name))
    return chosen
