from __future__ import annotations

import pytest
from dfmpc.evaluate.cache import Scores
from dfmpc.evaluate.gates import check_gates
from dfmpc.job.schema import Gates

LABELLED = Scores(0.9, 20.0, 10, "images", top1_before=91.5, top1_after=88.0)
NOISE = Scores(0.9, 20.0, 10, "noise")


@pytest.mark.parametrize(
    ("gates", "scores", "status"),
    [
        ({}, LABELLED, "none"),
        ({"max_top1_drop": 3.5}, LABELLED, "pass"),
        ({"max_top1_drop": 3.4}, LABELLED, "fail"),
        ({"min_agreement": 0.9}, NOISE, "pass"),
        ({"min_agreement": 0.91}, NOISE, "fail"),
        ({"max_top1_drop": 3.0}, NOISE, "none"),
        ({"max_top1_drop": 3.0, "min_agreement": 0.5}, NOISE, "pass"),
        ({"max_top1_drop": 9.0, "min_agreement": 0.95}, LABELLED, "fail"),
    ],
)
def test_status(gates, scores, status):
    assert check_gates(Gates(**gates), scores).status == status


def test_reasons_name_figure_and_bound():
    result = check_gates(Gates(max_top1_drop=3.0, min_agreement=0.95), LABELLED)
    assert result.reasons == (
        "top-1 fell by 3.50 points, max_top1_drop is 3",
        "agreement is 0.9000, min_agreement is 0.95",
    )


def test_a_bound_that_cannot_be_checked_is_named():
    assert check_gates(Gates(max_top1_drop=3.0), NOISE).reasons == (
        "max_top1_drop was not checked: no labelled images, give evaluate.data",
    )


def test_better_than_the_original_passes():
    better = Scores(0.9, 20.0, 10, "images", top1_before=88.0, top1_after=91.0)
    assert check_gates(Gates(max_top1_drop=0.0), better).status == "pass"
