"""What the gates say to a task's figures."""

from __future__ import annotations

import pickle

import pytest
from dfmpc.evaluate.gates import Figures, check_gates
from dfmpc.job.gates import SAFE_AGREEMENT, Gates, effective_gates
from pydantic import ValidationError

LABELLED = Figures(91.5, 88.0, agreement=0.9, logit_sqnr_db=20.0, bits_per_weight=4.125, seconds=12.0)
NOISE = Figures(agreement=0.9, logit_sqnr_db=20.0, bits_per_weight=4.125, seconds=12.0)


@pytest.mark.parametrize(
    ("gates", "figures", "status"),
    [
        ({}, LABELLED, "none"),
        ({"max_top1_drop": 3.5}, LABELLED, "pass"),
        ({"max_top1_drop": 3.4}, LABELLED, "fail"),
        ({"max_top1_drop": {"warn": 3.4}}, LABELLED, "warn"),
        ({"max_top1_drop": {"warn": 3.4, "fail": 4}}, LABELLED, "warn"),
        ({"max_top1_drop": {"warn": 3, "fail": 3.4}}, LABELLED, "fail"),
        ({"max_top1_drop": {"fail": 3.5, "warn": 3.5}}, LABELLED, "pass"),
        ({"min_agreement": 0.9}, NOISE, "pass"),
        ({"min_agreement": 0.91}, NOISE, "fail"),
        ({"min_agreement": {"warn": 0.95, "fail": 0.9}}, NOISE, "warn"),
        ({"max_top1_drop": 3.0, "min_agreement": None}, NOISE, "none"),
        ({"max_top1_drop": 3.0, "min_agreement": 0.5}, NOISE, "pass"),
        ({"max_top1_drop": 9.0, "min_agreement": 0.95}, LABELLED, "fail"),
        ({"min_sqnr_db": 20}, NOISE, "pass"),
        ({"min_sqnr_db": 20.1}, NOISE, "fail"),
        ({"max_bits_per_weight": 4.125}, NOISE, "pass"),
        ({"max_bits_per_weight": 4.1}, NOISE, "fail"),
        ({"max_seconds": 12}, NOISE, "pass"),
        ({"max_seconds": {"warn": 10, "fail": 100}}, NOISE, "warn"),
        ({"max_seconds": {"warn": 10}, "min_agreement": 0.95}, NOISE, "fail"),
        ({"max_seconds": 11}, Figures(), "none"),
    ],
)
def test_status(gates, figures, status):
    assert check_gates(Gates(**gates), figures).status == status


def test_a_failure_is_named_before_a_warning_and_what_was_not_checked():
    gates = Gates(max_top1_drop={"warn": 3}, min_agreement=0.95, min_sqnr_db={"warn": 25.5}, max_bits_per_weight=4)
    assert check_gates(gates, LABELLED).reasons == (
        "agreement is 0.9000, min_agreement is 0.95",
        "4.125 bits a weight, max_bits_per_weight is 4",
        "top-1 fell by 3.50 points, max_top1_drop warns at 3",
        "logit SQNR is 20.00 dB, min_sqnr_db warns at 25.5",
    )
    assert check_gates(Gates(max_seconds=5, max_top1_drop=3), NOISE).reasons == (
        "it took 12.0 s, max_seconds is 5",
        "max_top1_drop was not checked: no labelled images, give evaluate.data",
    )


def test_a_bound_that_cannot_be_checked_is_named():
    assert check_gates(Gates(max_bits_per_weight=3.0), Figures(agreement=1.0)).reasons == (
        "max_bits_per_weight was not checked: no weight is quantized",
    )


LOW = Figures(agreement=SAFE_AGREEMENT - 0.01, bits_per_weight=4.0)
HIGH = Figures(agreement=SAFE_AGREEMENT, bits_per_weight=4.0)
LOW_LABELLED = Figures(91.5, 91.0, agreement=SAFE_AGREEMENT - 0.01)


@pytest.mark.parametrize(
    ("gates", "figures", "status"),
    [
        ({}, LOW, "warn"),
        ({}, HIGH, "pass"),
        ({}, LOW_LABELLED, "none"),
        ({}, Figures(), "none"),
        ({"min_agreement": None}, LOW, "none"),
        ({"min_agreement": 0.01}, LOW, "pass"),
        ({"min_agreement": 0.01}, HIGH, "pass"),
        ({"min_agreement": SAFE_AGREEMENT}, LOW_LABELLED, "fail"),
        ({"max_bits_per_weight": 3.0}, LOW, "fail"),
        ({"max_bits_per_weight": 5.0}, LOW, "warn"),
    ],
)
def test_without_labels_and_without_a_word_of_agreement_it_has_a_default_that_only_warns(gates, figures, status):
    frozen = Gates.model_validate_json(Gates(**gates).model_dump_json())  # as a run keeps it
    for one in (Gates(**gates), frozen, effective_gates(Gates(), Gates(**gates)), pickle.loads(pickle.dumps(frozen))):
        assert check_gates(one, figures).status == status


def test_the_default_says_that_it_is_one():
    assert check_gates(Gates(max_top1_drop=3), LOW).reasons == (
        f"agreement is {LOW.agreement:.4f}, min_agreement warns at {SAFE_AGREEMENT:g}, "
        "the default without labels (docs/fidelity.md)",
        "max_top1_drop was not checked: no labelled images, give evaluate.data",
    )
    asked = check_gates(Gates(min_agreement={"warn": SAFE_AGREEMENT}), LOW).reasons
    assert asked == (f"agreement is {LOW.agreement:.4f}, min_agreement warns at {SAFE_AGREEMENT:g}",)


def test_a_models_null_switches_the_default_off_and_its_bound_replaces_it():
    assert check_gates(effective_gates(Gates(), Gates(min_agreement=None)), LOW).status == "none"
    assert check_gates(effective_gates(Gates(min_agreement=None), Gates(max_seconds=9)), LOW).status == "none"
    assert check_gates(effective_gates(Gates(), Gates(max_bits_per_weight=9)), LOW).status == "warn"
    assert check_gates(effective_gates(Gates(), Gates(min_agreement=0.99)), HIGH).status == "fail"


def test_better_than_the_original_passes():
    better = Figures(88.0, 91.0, agreement=0.9)
    assert check_gates(Gates(max_top1_drop=0.0), better).status == "pass"


def test_a_drop_of_exactly_the_bound_passes_also_where_binary_says_more():
    assert 60.0 - 56.9 > 3.1
    assert check_gates(Gates(max_top1_drop=3.1), Figures(60.0, 56.9)).status == "pass"


def test_logits_that_did_not_change_have_no_end_to_their_sqnr():
    assert check_gates(Gates(min_sqnr_db=200.0), Figures(agreement=1.0, logit_sqnr_db=None)).status == "pass"
    assert check_gates(Gates(min_sqnr_db=200.0), Figures()).status == "none"


def test_what_is_no_number_keeps_no_bound():
    nothing = float("nan")
    for gates in (Gates(min_agreement=0.1), Gates(max_seconds=1e9)):
        assert check_gates(gates, Figures(agreement=nothing, seconds=nothing)).status == "fail"


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"max_top1_drop": -1}, "greater than or equal to 0"),
        ({"max_top1_drop": "3"}, "a number, or a mapping with warn, fail or both"),
        ({"max_top1_drop": True}, "a number, or a mapping with warn, fail or both"),
        ({"max_top1_drop": {}}, "warn, fail or both"),
        ({"max_top1_drop": {"warn": 3, "fail": 2}}, "warn not above fail, got 3 and 2"),
        ({"min_agreement": {"warn": 0.8, "fail": 0.9}}, "warn not below fail, got 0.8 and 0.9"),
        ({"min_agreement": 90}, "numbers from 0 to 1"),
        ({"min_agreement": {"warn": 1.5}}, "numbers from 0 to 1"),
        ({"min_sqnr": 3}, "Extra inputs"),
    ],
)
def test_bounds_that_are_none_are_refused(gates, expected):
    with pytest.raises(ValidationError, match=expected):
        Gates.model_validate(gates)


def test_a_models_own_bounds_replace_the_jobs_one_by_one_and_null_switches_one_off():
    job = Gates(max_top1_drop=3, min_agreement={"warn": 0.95, "fail": 0.9}, max_seconds=60)
    own = effective_gates(job, Gates.model_validate({"min_agreement": 0.99, "max_seconds": None}))
    assert own == Gates(max_top1_drop=3, min_agreement=0.99)
    assert effective_gates(job, None) == job
    assert Gates.model_validate_json(job.model_dump_json()) == job, "as a run freezes it"
