from __future__ import annotations

import math

import pytest
import torch
from dfmpc.evaluate.metrics import agreement, kl_nats, logit_sqnr_db, top_k

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 5.0], [2.0, 9.0, 1.0], [1.0, 0.0, -1.0]])


@pytest.mark.parametrize(("k", "percent"), [(1, 50.0), (2, 75.0), (3, 100.0), (5, 100.0)])
def test_top_k_of_four_rows_worked_by_hand(k, percent):
    # largest: 0, 2, 1, 0; second: 1, 1, 0, 1
    assert top_k(LOGITS, torch.tensor([0, 2, 0, 2]), k) == percent


def test_agreement_counts_equal_classes():
    other = torch.tensor([[1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert agreement(LOGITS, other) == 0.5
    assert agreement(LOGITS, LOGITS * 2) == 1.0


def test_kl_by_hand():
    # softmax: (3/4, 1/4) against (1/2, 1/2), then twice the same
    original = torch.tensor([[math.log(3), 0.0], [7.0, 7.0]])
    compressed = torch.tensor([[5.0, 5.0], [-1.0, -1.0]])
    of_the_first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_nats(original, compressed) == pytest.approx(of_the_first / 2, rel=1e-6)
    assert kl_nats(compressed, original) == pytest.approx((0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2, rel=1e-6)


def test_kl_is_zero_for_logits_that_differ_by_a_constant_a_row_and_stays_finite_at_extremes():
    shifted = LOGITS + torch.tensor([[4.0], [-2.0], [0.5], [0.0]])
    assert kl_nats(LOGITS, shifted) == pytest.approx(0.0, abs=1e-12)
    assert kl_nats(LOGITS, LOGITS.clone()) == 0.0
    far = torch.tensor([[1000.0, -1000.0]])
    assert kl_nats(far, -far) == pytest.approx(2000.0)


def test_sqnr_by_hand():
    original = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    compressed = torch.tensor([[3.0, 4.5], [0.5, 5.0]])
    # signal 50, error 0.5
    assert logit_sqnr_db(original, compressed) == pytest.approx(20.0)


def test_sqnr_of_equal_logits_is_infinite_and_of_a_silent_original_minus_infinite():
    assert logit_sqnr_db(LOGITS, LOGITS.clone()) == math.inf
    assert logit_sqnr_db(torch.zeros(1, 2), torch.ones(1, 2)) == -math.inf
