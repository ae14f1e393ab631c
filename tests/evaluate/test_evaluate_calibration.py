"""The figures of scripts/calibrate_fidelity.py, and that it works on a store."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def script(project):
    spec = importlib.util.spec_from_file_location("calibrate_fidelity", project / "scripts" / "calibrate_fidelity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate_fidelity"] = module
    spec.loader.exec_module(module)
    return module


def points(script, *drops_and_agreements):
    return [
        script.Point("resnet20", f"p{number}", drop, {"lit-leaves": script.Figures(agreement, 1 - agreement, 10.0)})
        for number, (drop, agreement) in enumerate(drops_and_agreements)
    ]


def test_rank_correlation_by_hand(script):
    # the squared differences of nine pairs of ranks sum to 48
    x = [44.4, 45.9, 41.9, 53.3, 44.7, 44.1, 50.7, 45.2, 60.1]
    y = [2.6, 3.1, 2.5, 5.0, 3.6, 4.0, 5.2, 2.8, 3.8]
    assert script.spearman(x, y) == pytest.approx(1 - 6 * 48 / (9 * 80))
    assert script.spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    # ties share their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert script.spearman([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_the_threshold_is_the_least_step_above_all_that_lost_too_much(script):
    own = points(script, (0.2, 0.99), (1.4, 0.913), (0.9, 0.80), (4.0, 0.70))
    assert script.threshold_of(own, "lit-leaves", 1.0) == pytest.approx(0.92)
    assert script.threshold_of(own, "lit-leaves", 3.0) == pytest.approx(0.71)
    assert script.threshold_of(points(script, (2.0, 0.9)), "lit-leaves", 1.0) == pytest.approx(0.91), "not at the bound"
    assert script.threshold_of(points(script, (2.0, 0.29)), "lit-leaves", 1.0) == pytest.approx(0.30), "in binary too"


def test_verdicts_count_both_errors(script):
    others = points(script, (0.2, 0.99), (1.4, 0.93), (0.9, 0.80), (4.0, 0.70), (1.0, 0.92))
    found = script.verdicts(others, "lit-leaves", 0.92, 1.0)
    assert (found.safe, found.unsafe, found.false_safe, found.false_alarms) == (3, 2, 1, 1)


def test_the_default_of_the_gate_is_the_documented_threshold(project):
    from dfmpc.job.gates import SAFE_AGREEMENT  # noqa: PLC0415 - beside the page it stands in

    page = (project / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert f"{{warn: {SAFE_AGREEMENT:g}}}" in page
