"""Bit-plans of the other methods: which forms there are, and what stands for the rest."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.methods import BitPlan, role_granularity
from dfmpc.job.neighbours import DfqPlan, HqqPlan, Mul2qPlan, NeighbourPlan
from dfmpc.job.plan import plan_from
from pydantic import TypeAdapter

METHODS = ("twn-exact", "omse", "vecq", "mul2q", "daq", "dfq", "squant", "hqq")


def parsed(**fields: Any) -> NeighbourPlan:
    plan: NeighbourPlan = TypeAdapter(BitPlan).validate_python({"name": "p", **fields})
    return plan


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_has_one_width_or_the_two_of_a_pair(method: str) -> None:
    single, pair = parsed(method=method, bits=4), parsed(method=method, low=2, high=6)
    assert (single.paired, single.width("low"), single.width("high")) == (False, 4, 4)
    assert (pair.paired, pair.width("low"), pair.width("high")) == (True, 2, 6)


@pytest.mark.parametrize(
    "widths",
    [{}, {"low": 2}, {"high": 6}, {"bits": 4, "high": 6}, {"bits": 4, "low": 2, "high": 6}],
    ids=["none", "low-alone", "high-alone", "bits-and-high", "all-three"],
)
@pytest.mark.parametrize("method", METHODS)
def test_other_combinations_are_told(method: str, widths: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="either bits, or low and high together"):
        plan_from({"method": method, **widths})


@pytest.mark.parametrize("bits", [1, 9])
def test_widths_are_2_to_8(bits: int) -> None:
    with pytest.raises(UsageError, match="bits: got"):
        plan_from({"method": "omse", "bits": bits})


def test_a_plan_survives_being_written_and_read() -> None:
    for method in METHODS:
        plan = parsed(method=method, low=3, high=5, granularity={"low": "group:32"})
        assert TypeAdapter(BitPlan).validate_json(plan.model_dump_json()) == plan


def test_what_shares_a_scale_is_as_published_unless_said() -> None:
    defaults = {method: role_granularity(parsed(method=method, bits=4), "low") for method in METHODS}
    assert defaults == {**dict.fromkeys(METHODS, "channel"), "mul2q": "tensor", "hqq": "group:64"}
    by_role = Mul2qPlan.model_validate(
        {"name": "p", "method": "mul2q", "bits": 4, "granularity": {"low": "channel", "high": "tensor"}}
    )
    assert (role_granularity(by_role, "low"), role_granularity(by_role, "high")) == ("channel", "tensor")


def test_hqq_has_the_authors_settings() -> None:
    plan = HqqPlan(name="p", method="hqq", bits=4)
    assert (plan.p, plan.beta, plan.kappa, plan.steps) == (0.7, 10.0, 1.01, 20)


def test_only_dfq_re_estimates_anything() -> None:
    found = {
        method: (parsed(method=method, bits=4).tier, parsed(method=method, bits=4).calibrator) for method in METHODS
    }
    assert found == {**dict.fromkeys(METHODS, ("none", "none")), "dfq": ("closed-form", "bias-correction")}
    weights_only = DfqPlan(name="p", method="dfq", bits=4, correct=False, absorb=False)
    assert (weights_only.tier, weights_only.calibrator) == ("none", "none")


def test_plans_need_no_torch() -> None:
    code = "import sys, dfmpc.job.neighbours; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
