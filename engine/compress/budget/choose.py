"""A budget becomes one width a layer: sweep, effects, and the exact choice (docs/methods.md, "Bit-plans by size")."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UnsupportedModelError
from ...job.budget import Budget
from ...job.methods import DfmpcPlan
from ...job.schema import LayerRule
from ...models.graph import Pairing
from ...models.load import LoadedModel
from ...models.pairs import find_pairs
from ..assign import Assignment, assign
from ..fold_scales import norms_for_scales
from .sensitivity import LayerUse, layer_uses
from .sizes import layer_bytes, overhead
from .solver import Choices, solve
from .sweep import measure

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class LayerSweep:
    """One layer at the widths it may have: one where a layer rule fixes it, else 2 to 8 bits."""

    name: str
    role: str
    params: int
    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    """Bytes of its codes and scales at each width."""
    errors: tuple[float, ...]
    """Noise-to-signal at its output at each width, over all channels, after the best factor of a row."""
    effects: tuple[float, ...]
    """Noise-to-signal that each width brings to the network's output: what the choice minimises the sum of."""


@dataclass(frozen=True)
class SizedPoint:
    """Widths for all layers, what they take and what they lose."""

    bits: Mapping[str, int]
    """By layer, kept layers left out."""
    bits_per_weight: float
    """Codes and factors over quantized weights: what the artifact will say, exactly."""
    bytes: int
    """Of the artifact's files: an estimate, made to be a little too high."""
    objective: float
    """Predicted noise-to-signal of the network's output."""
    gap: float
    """(objective - proved bound) / objective: 0 where no choice of this size is better."""


@dataclass(frozen=True)
class BitChoice(SizedPoint):
    """The choice for a budget, the sweep behind it and, where asked for, the curve."""

    sweep: tuple[LayerSweep, ...]
    pareto: tuple[SizedPoint, ...] = ()
    """By rising size, from 2 bits everywhere to 8 bits everywhere."""


def choose_bits(model: LoadedModel, plan: DfmpcPlan, rules: Sequence[LayerRule] = ()) -> BitChoice:
    """Return the widths of least predicted noise at the network's output within ``plan.budget``.

    Layers that a rule of the job keeps or gives a width stay as they are; a tied weight is one layer. No images.

    Raises UnsupportedModelError where the budget is below what the least widths take, or above half precision.
    """
    if plan.budget is None:
        raise ValueError(f"plan {plan.name} has no budget")
    problem = _Problem(model, plan, rules)
    chosen = problem.point(problem.capacity(plan.budget))
    curve = tuple(problem.point(capacity) for capacity in problem.capacities(plan.pareto or 0))
    return BitChoice(**vars(chosen), sweep=problem.sweep, pareto=curve)


class _Problem:
    """One model's sweep as a knapsack; capacities are bytes of codes and scales."""

    def __init__(self, model: LoadedModel, plan: DfmpcPlan, rules: Sequence[LayerRule]) -> None:
        self.model = model
        pairing = find_pairs(model.graph)
        options = _options(model, plan, rules, pairing)
        if not options:
            raise UnsupportedModelError(f"{model.source.name}: no layer is quantized, so a budget means nothing")
        self.sweep = _sweep(model, options, norms_for_scales(model.graph) if plan.fold_scales else {})
        self.choices = [Choices(layer.sizes, layer.effects) for layer in self.sweep]
        self.params = sum(layer.params for layer in self.sweep)
        self.overhead = overhead(model, plan, {name: found[0] for name, found in options.items()}, pairing)
        self.least = sum(min(layer.sizes) for layer in self.sweep)
        self.most = sum(max(layer.sizes) for layer in self.sweep)

    def capacity(self, budget: Budget) -> int:
        """Return the bytes that codes and scales may take. Raises UnsupportedModelError beyond the bounds."""
        fixed = self.overhead.factors + (0 if budget.bits_per_weight is not None else self.overhead.rest)
        capacity = self._bytes_of(budget) - fixed
        if self.least <= capacity <= 2 * self.params:
            return capacity
        least, half = self._as_asked(budget, self.least + fixed), self._as_asked(budget, 2 * self.params + fixed)
        wrong = "out of reach" if capacity < self.least else "above half precision"
        raise UnsupportedModelError(
            f"{self.model.source.name}: a budget of {budget} is {wrong}: this model takes {least} with 2 bits wherever "
            f"no layer rule says otherwise, and {half} in half precision; ask for something between"
        )

    def _bytes_of(self, budget: Budget) -> int:
        if budget.bits_per_weight is not None:
            return int(budget.bits_per_weight * self.params / 8)
        return budget.bytes if budget.bytes is not None else int(self.model.checkpoint_bytes / (budget.ratio or 1))

    def _as_asked(self, budget: Budget, size: int) -> str:
        if budget.bits_per_weight is not None:
            return f"{8 * size / self.params:.3f} bits a weight"
        if budget.bytes is not None:
            return f"about {size:,} bytes"
        return f"a ratio of about {self.model.checkpoint_bytes / size:.2f}"

    def capacities(self, count: int) -> list[int]:
        """Return ``count`` sizes, evenly from the least to the most."""
        return [self.least + round(i * (self.most - self.least) / (count - 1)) for i in range(count)]

    def point(self, capacity: int) -> SizedPoint:
        """Return the best choice within ``capacity``."""
        solved = solve(self.choices, capacity)
        size = solved.size + self.overhead.factors
        return SizedPoint(
            bits={layer.name: layer.bits[pick] for layer, pick in zip(self.sweep, solved.picks, strict=True)},
            bits_per_weight=8 * size / self.params,
            bytes=size + self.overhead.rest,
            objective=solved.cost,
            gap=solved.gap,
        )


def _options(
    model: LoadedModel, plan: DfmpcPlan, rules: Sequence[LayerRule], pairing: Pairing
) -> dict[str, list[Assignment]]:
    """Return each quantized layer's assignments by rising width; a layer whose width a rule fixes has one."""
    found: dict[str, list[Assignment]] = {}
    for bits in WIDTHS:
        widths = plan.model_copy(update={"low": bits, "high": bits})
        for name, option in assign(model.graph.layers, widths, rules, pairing).items():
            options = found.setdefault(name, [])
            if not option.keep and option.bits not in [other.bits for other in options]:
                options.append(option)
    return {name: options for name, options in found.items() if options}


def _sweep(
    model: LoadedModel, options: Mapping[str, Sequence[Assignment]], in_norms: Container[str]
) -> tuple[LayerSweep, ...]:
    uses = layer_uses(model)
    return tuple(_sweep_one(model, found, uses[name], name in in_norms) for name, found in options.items())


def _sweep_one(
    model: LoadedModel, options: Sequence[Assignment], uses: Sequence[LayerUse], in_norm: bool
) -> LayerSweep:
    layer = options[0].layer
    found = measure(model.state[layer.weight], options, uses)
    return LayerSweep(
        name=layer.name,
        role=options[0].role,
        params=layer.params,
        bits=tuple(option.bits for option in options),
        sizes=tuple(layer_bytes(option, in_norm) for option in options),
        errors=_settled(found.errors),
        effects=_settled(found.effects),
    )


def _settled(values: Sequence[float]) -> tuple[float, ...]:
    """Six digits hide the last bits in which matrix products differ between machines, so that the choice does not."""
    return tuple(float(f"{value:.6g}") for value in values)
