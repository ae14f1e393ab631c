"""The knapsack of widths against brute force, at its bounds, and at the size of a large network."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from dfmpc.compress.budget import solver
from dfmpc.compress.budget.solver import Choices, solve


def brute_force(layers: list[Choices], capacity: int) -> float:
    return min(
        sum(layer.costs[pick] for layer, pick in zip(layers, picks, strict=True))
        for picks in itertools.product(*(range(len(layer.sizes)) for layer in layers))
        if sum(layer.sizes[pick] for layer, pick in zip(layers, picks, strict=True)) <= capacity
    )


def random_layers(seed: int, *, ordered: bool) -> list[Choices]:
    """Costs are whole numbers, so that every sum is exact; ``ordered`` costs fall with the size, as errors do."""
    rng = random.Random(seed)
    layers = []
    for _ in range(rng.randint(1, 6)):
        sizes, costs = ([rng.randint(0, 30) for _ in range(rng.randint(1, 5))] for _ in range(2))
        count = min(len(sizes), len(costs))
        sizes, costs = sizes[:count], costs[:count]
        if ordered:
            sizes, costs = sorted(sizes), sorted(costs, reverse=True)
        layers.append(Choices(tuple(sizes), tuple(float(cost) for cost in costs)))
    return layers


def network(layers: int, seed: int) -> list[Choices]:
    """As a sweep gives them: sizes in whole rows, errors falling by about 4 a bit, effects over four decades."""
    rng = random.Random(seed)
    found = []
    for _ in range(layers):
        rows, length = rng.choice([16, 32, 64, 128, 256, 512]), rng.choice([9, 27, 64, 144, 288, 576, 1152, 2304])
        weight = 10 ** rng.uniform(-3, 1)
        sizes = tuple(rows * ((length * bits + 7) // 8 + 4) for bits in range(2, 9))
        costs = [weight * 4.0**-bits * rng.uniform(0.8, 1.2) for bits in range(2, 9)]
        found.append(Choices(sizes, tuple(sorted(costs, reverse=True))))
    return found


@pytest.mark.parametrize("ordered", [True, False], ids=["falling", "any order"])
@pytest.mark.parametrize("first", range(0, 120, 20), ids=lambda first: f"seeds {first}-{first + 19}")
def test_the_optimum_is_that_of_brute_force(first: int, ordered: bool) -> None:
    for seed in range(first, first + 20):
        layers = random_layers(seed, ordered=ordered)
        least, most = (sum(extreme(layer.sizes) for layer in layers) for extreme in (min, max))
        for capacity in sorted({least, (2 * least + most) // 3, (least + most) // 2, most, most + 5}):
            found = solve(layers, capacity)
            assert found.cost == brute_force(layers, capacity)
            assert found.gap == 0
            assert found.size <= capacity
            assert found.size == sum(layer.sizes[pick] for layer, pick in zip(layers, found.picks, strict=True))
            assert found.cost == sum(layer.costs[pick] for layer, pick in zip(layers, found.picks, strict=True))


def test_a_choice_off_the_convex_hull_is_found() -> None:
    # the hull of the first layer is its ends (10 saved by 10), so a Lagrangian alone never takes the middle;
    # with 6 of room the middle of the first (cost 6) beats the second layer's step (cost 10 + 4)
    layers = [Choices((0, 6, 10), (10.0, 6.0, 0.0)), Choices((0, 5), (4.0, 1.0))]
    found = solve(layers, 6)
    assert (found.picks, found.cost, found.size, found.gap) == ((1, 0), 10.0, 6, 0.0)


def test_layers_of_one_choice_stay() -> None:
    layers = [Choices((7,), (3.0,)), Choices((1, 2), (5.0, 1.0))]
    assert solve(layers, 9).picks == (0, 1)
    assert solve(layers, 8).picks == (0, 0)


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="take 7, above the capacity of 6"):
        solve([Choices((7, 8), (1.0, 0.0))], 6)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_two_hundred_layers_take_less_than_a_second(share: float) -> None:
    layers = network(200, seed=1)
    least, most = (sum(extreme(layer.sizes) for layer in layers) for extreme in (min, max))
    started = time.thread_time()  # not what other threads of this process do meanwhile
    found = solve(layers, int(least + share * (most - least)))
    assert time.thread_time() - started < 1
    assert found.gap == 0


def test_where_the_search_is_cut_short_the_gap_holds_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = network(40, seed=2)
    capacity = int(1.6 * sum(layer.sizes[0] for layer in layers)) + 1
    exact = solve(layers, capacity)
    monkeypatch.setattr(solver, "MAX_STATES", 1)
    cut = solve(layers, capacity)
    assert cut.gap > 0
    assert cut.size <= capacity
    assert cut.cost * (1 - cut.gap) <= exact.cost <= cut.cost
