"""One choice a layer, least cost within a size: the multiple-choice knapsack, solved exactly.

Lagrangian bound and incumbent first, then dynamic programming over the choices that may still beat the incumbent
(Dyer, Riha and Walker, "A hybrid dynamic programming / branch-and-bound algorithm for the multiple-choice knapsack
problem", 1995; dominance after Nemhauser and Ullmann, 1969).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STATES = 400_000
"""Partial solutions kept at a time; beyond, the incumbent is returned with its gap."""
_WIDENINGS = 4
"""The search admits 2^-4 of the distance between bound and incumbent first, doubling it until its find is proved."""
_ROUNDING = 1e-12
"""Relative error of sums of float64 costs, by which every comparison errs on the side of keeping."""


@dataclass(frozen=True)
class Choices:
    """The choices of one layer."""

    sizes: tuple[int, ...]
    """What each one takes of the capacity, >= 0."""
    costs: tuple[float, ...]
    """What each one costs: finite, >= 0."""


@dataclass(frozen=True)
class Solved:
    """A feasible selection and how good it is known to be."""

    picks: tuple[int, ...]
    """Index of the choice of every layer."""
    size: int
    cost: float
    gap: float
    """(cost - lower bound) / cost: 0 where the selection is proved optimal."""


@dataclass(frozen=True)
class _Relaxed:
    """Solution of the linear relaxation: the price of a unit of size, the bound it gives, and a feasible rounding."""

    price: float
    bound: float
    picks: tuple[int, ...]


def solve(layers: Sequence[Choices], capacity: int) -> Solved:
    """Return the selection of least total cost whose total size is at most ``capacity``.

    Raises ValueError where even the smallest choices do not fit.
    """
    smallest = sum(min(layer.sizes) for layer in layers)
    if smallest > capacity:
        raise ValueError(f"the smallest choices take {smallest}, above the capacity of {capacity}")
    best = tuple(min(range(len(layer.sizes)), key=lambda i: (layer.costs[i], layer.sizes[i])) for layer in layers)
    if _size(layers, best) <= capacity:
        return _solved(layers, best, None)
    relaxed = _relax(layers, capacity)
    incumbent = relaxed.picks
    distance = _cost(layers, incumbent) - relaxed.bound
    for halvings in range(_WIDENINGS, -1, -1):
        allowed = distance / 2**halvings
        searched = _search(layers, capacity, relaxed, allowed)
        if searched is None:
            return _solved(layers, incumbent, relaxed.bound)
        if searched and _cost(layers, searched) <= _cost(layers, incumbent):
            incumbent = searched
        if searched and _cost(layers, searched) <= relaxed.bound + allowed:
            break
    return _solved(layers, incumbent, None)


def _solved(layers: Sequence[Choices], picks: tuple[int, ...], bound: float | None) -> Solved:
    cost = _cost(layers, picks)
    gap = 0.0 if bound is None or cost == 0 else max(0.0, (cost - bound) / cost)
    return Solved(picks, _size(layers, picks), cost, gap)


def _size(layers: Sequence[Choices], picks: Sequence[int]) -> int:
    return sum(layer.sizes[pick] for layer, pick in zip(layers, picks, strict=True))


def _cost(layers: Sequence[Choices], picks: Sequence[int]) -> float:
    return math.fsum(layer.costs[pick] for layer, pick in zip(layers, picks, strict=True))


def _hull(layer: Choices) -> list[int]:
    """Return the choices on the lower convex hull of cost over size, from the smallest to the cheapest."""
    hull: list[int] = []
    for index in sorted(range(len(layer.sizes)), key=lambda i: (layer.sizes[i], layer.costs[i])):
        if hull and layer.costs[index] >= layer.costs[hull[-1]]:
            continue
        while len(hull) > 1 and _saving(layer, hull[-2], index) >= _saving(layer, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return hull


def _saving(layer: Choices, small: int, large: int) -> float:
    """Return the cost that a unit of size saves on the way from one choice to a larger one."""
    return (layer.costs[small] - layer.costs[large]) / (layer.sizes[large] - layer.sizes[small])


def _relax(layers: Sequence[Choices], capacity: int) -> _Relaxed:
    """Buy the steps of all hulls by falling saving; the first that does not fit sets the price."""
    hulls = [_hull(layer) for layer in layers]
    steps = [
        (_saving(layer, hull[k], hull[k + 1]), i, k)
        for i, (layer, hull) in enumerate(zip(layers, hulls, strict=True))
        for k in range(len(hull) - 1)
    ]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    level = [0] * len(layers)
    left = capacity - sum(layer.sizes[hull[0]] for layer, hull in zip(layers, hulls, strict=True))
    price = 0.0
    for saving, i, k in steps:
        taken = layers[i].sizes[hulls[i][k + 1]] - layers[i].sizes[hulls[i][k]]
        if level[i] == k and taken <= left:
            level[i], left = k + 1, left - taken
        elif price == 0:
            price = saving
    least = math.fsum(min(_priced(layer, price)) for layer in layers)
    picks = tuple(hull[k] for hull, k in zip(hulls, level, strict=True))
    return _Relaxed(price, least - price * capacity, picks)


def _priced(layer: Choices, price: float) -> list[float]:
    return [cost + price * size for size, cost in zip(layer.sizes, layer.costs, strict=True)]


@dataclass(frozen=True)
class _Stage:
    """One layer of the search: the choices that are left, and the step of the trace back."""

    index: int
    options: Tensor
    """int64 [m]: positions among the layer's choices."""
    sizes: Tensor
    costs: Tensor
    excess: Tensor
    """float64 [m]: priced cost above the layer's least, what the bound loses by the choice."""


@dataclass(frozen=True)
class _States:
    """Partial solutions that none other dominates, by rising size and falling cost."""

    size: Tensor
    cost: Tensor
    excess: Tensor


def _search(layers: Sequence[Choices], capacity: int, relaxed: _Relaxed, allowed: float) -> tuple[int, ...] | None:
    """Return the best selection within ``allowed`` of the bound, () where there is none, None beyond MAX_STATES."""
    scale = abs(relaxed.bound) + relaxed.price * capacity
    limit = allowed + _ROUNDING * len(layers) * scale
    stages = sorted((_stage(i, layer, relaxed.price, limit) for i, layer in enumerate(layers)), key=_spread)
    least = _remaining([int(stage.sizes.min()) for stage in stages])
    most = _remaining([int(stage.sizes.max()) for stage in stages])
    states = _States(*(torch.zeros(1, dtype=kind) for kind in (torch.int64, torch.float64, torch.float64)))
    trace: list[tuple[Tensor, Tensor]] = []
    for step, stage in enumerate(stages):
        states, parents, options = _extend(states, stage)
        slack = (capacity - most[step + 1] - states.size).clamp_min(0)
        keep = (states.size + least[step + 1] <= capacity) & (states.excess + relaxed.price * slack <= limit)
        states, kept = _undominated(states, keep)
        trace.append((parents[kept], options[kept]))
        if len(states.size) > MAX_STATES:
            return None
    return _trace_back(stages, trace, int(states.cost.argmin())) if len(states.size) else ()


def _stage(index: int, layer: Choices, price: float, limit: float) -> _Stage:
    priced = torch.tensor(_priced(layer, price), dtype=torch.float64)
    excess = priced - priced.min()
    options = torch.nonzero(excess <= limit).flatten()
    sizes = torch.tensor(layer.sizes, dtype=torch.int64)[options]
    return _Stage(index, options, sizes, torch.tensor(layer.costs, dtype=torch.float64)[options], excess[options])


def _spread(stage: _Stage) -> tuple[int, int]:
    """Order of the search: the layers with the widest choice of sizes first, so that the bound bites early."""
    return -int(stage.sizes.max() - stage.sizes.min()), stage.index


def _remaining(sizes: Sequence[int]) -> list[int]:
    """Return what the stages from each on add up to, 0 behind the last."""
    sums = [0]
    for size in reversed(sizes):
        sums.append(sums[-1] + size)
    return sums[::-1]


def _extend(states: _States, stage: _Stage) -> tuple[_States, Tensor, Tensor]:
    count, options = len(states.size), len(stage.options)
    grown = _States(
        (states.size[:, None] + stage.sizes).flatten(),
        (states.cost[:, None] + stage.costs).flatten(),
        (states.excess[:, None] + stage.excess).flatten(),
    )
    parents = torch.arange(count).repeat_interleave(options)
    return grown, parents, torch.arange(options).repeat(count)


def _undominated(states: _States, keep: Tensor) -> tuple[_States, Tensor]:
    """Return the kept states that no smaller one beats in cost, and where they stood."""
    index = torch.nonzero(keep).flatten()
    index = index[torch.argsort(states.cost[index], stable=True)]
    index = index[torch.argsort(states.size[index], stable=True)]
    cost = states.cost[index]
    best = torch.cummin(cost, 0).values
    better = torch.ones(len(index), dtype=torch.bool)
    better[1:] = cost[1:] < best[:-1]
    index = index[better]
    return _States(states.size[index], states.cost[index], states.excess[index]), index


def _trace_back(stages: Sequence[_Stage], trace: Sequence[tuple[Tensor, Tensor]], last: int) -> tuple[int, ...]:
    picks = [0] * len(stages)
    for stage, (parents, options) in zip(reversed(stages), reversed(trace), strict=True):
        picks[stage.index] = int(stage.options[options[last]])
        last = int(parents[last])
    return tuple(picks)
