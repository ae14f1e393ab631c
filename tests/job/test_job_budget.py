"""Budgets in a job file: one unit, sane bounds, no widths beside them, and what is written reads back."""

from __future__ import annotations

import pytest
from dfmpc.job.budget import Budget
from dfmpc.job.methods import DfmpcPlan
from pydantic import ValidationError


def plan(**fields: object) -> DfmpcPlan:
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", **fields})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1_500_000, 1_500_000),
        ("1.5MB", 1_500_000),
        ("1.5 MiB", 1_572_864),
        ("800kB", 800_000),
        ("800KiB", 819_200),
        ("12B", 12),
        ("0.1GiB", 107_374_182),
    ],
)
def test_bytes_are_a_number_or_a_number_with_a_unit(written: object, expected: int) -> None:
    assert Budget.model_validate({"bytes": written}).bytes == expected


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits_per_weight": 1}, "greater than or equal to 2"),
        ({"bits_per_weight": 40}, "less than or equal to 16"),
        ({"ratio": 0.5}, "greater than 1"),
        ({"ratio": 1000}, "less than or equal to 64"),
        ({"bytes": 0}, "greater than 0"),
        ({"bytes": "3 pounds"}, "such as 1.5MB or 800KiB"),
        ({"bytes": 1.5}, "integer"),
        ({}, "exactly one of bits_per_weight, bytes, ratio; got none"),
        ({"ratio": 8, "bytes": 1000}, "exactly one of .*; got bytes, ratio"),
        ({"size": 3}, "Extra inputs"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_nonsense_is_an_error_of_the_job_file(budget: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plan(budget=budget)


@pytest.mark.parametrize("widths", [{"low": 2}, {"high": 6}, {"low": 3, "high": 5}], ids=str)
def test_a_budget_and_widths_exclude_each_other(widths: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=f"got budget beside {' and '.join(widths)}"):
        plan(budget={"ratio": 8}, **widths)


def test_pareto_needs_a_budget() -> None:
    assert plan(budget={"ratio": 8}, pareto=5).pareto == 5
    with pytest.raises(ValidationError, match="a budget beside pareto"):
        plan(pareto=5)


@pytest.mark.parametrize(
    "fields", [{"budget": {"bits_per_weight": 3.0}, "pareto": 4}, {"low": 3}, {}], ids=["budget", "low", "defaults"]
)
def test_a_written_plan_reads_back(fields: dict[str, object]) -> None:
    expected = plan(**fields)
    assert DfmpcPlan.model_validate(expected.model_dump(mode="json")) == expected
    assert DfmpcPlan.model_validate_json(expected.model_dump_json()) == expected


def test_a_plan_writes_either_its_budget_or_its_widths() -> None:
    assert {"low", "high"}.isdisjoint(plan(budget={"ratio": 8}).model_dump())
    assert {"budget", "pareto"}.isdisjoint(plan(low=3).model_dump())
    assert plan(low=3).model_dump()["low"] == 3


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"bits_per_weight": 3.0}, "3 bits a weight"),
        ({"bytes": "1.5MB"}, "1,500,000 bytes"),
        ({"ratio": 8}, "a ratio of 8"),
    ],
    ids=["bits_per_weight", "bytes", "ratio"],
)
def test_a_budget_says_itself(budget: dict[str, object], text: str) -> None:
    assert str(Budget.model_validate(budget)) == text


def test_with_a_budget_two_bits_are_four_levels_unless_it_says_otherwise() -> None:
    assert plan(low=2).low_levels == 3
    sized = plan(budget={"ratio": 8})
    assert sized.low_levels == 4
    assert DfmpcPlan.model_validate(sized.model_dump(mode="json")) == sized
    assert plan(budget={"ratio": 8}, low_levels=3).low_levels == 3


@pytest.mark.parametrize(
    ("said", "levels"),
    [
        ({"ternary": "exact"}, 3),
        ({"recipe": "published"}, 3),
        ({"recipe": "published", "clip": "mse"}, 4),
        ({"clip": "absmax"}, 3),
        ({"clip": "mse"}, 4),
    ],
)
def test_four_levels_need_clipped_scales_and_nobody_who_asks_for_ternary(said: dict[str, str], levels: int) -> None:
    assert plan(budget={"ratio": 8}, **said).low_levels == levels
