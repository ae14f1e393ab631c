"""Closed-form moments against Monte Carlo and against limits worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress import gaussian
from dfmpc.compress.gaussian import Moments
from torch import Tensor

MEANS = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0, 7.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0, 1.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("closed", "sampled"),
    [
        (gaussian.relu, lambda x: x.clamp_min(0)),
        (gaussian.relu6, lambda x: x.clamp(0, 6)),
        (lambda m: gaussian.leaky_relu(m, 0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    ],
    ids=["relu", "relu6", "leaky_relu"],
)
def test_moments_agree_with_a_million_samples(
    closed: Callable[[Moments], Moments], sampled: Callable[[Tensor], Tensor]
) -> None:
    noise = torch.randn(1_000_000, len(MEANS), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = sampled(MEANS + VARIANCES.sqrt() * noise)
    found = closed(Moments(MEANS, VARIANCES))
    # Six standard errors of a sample mean of 1e6 values whose sd is at most 1.8.
    torch.testing.assert_close(found.mean, values.mean(0), atol=0.011, rtol=0)
    torch.testing.assert_close(found.variance, values.var(0), atol=0.03, rtol=0.01)


def test_relu_of_a_standard_normal_by_hand() -> None:
    found = gaussian.relu(Moments(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)))
    # E = 1/sqrt(2 pi), E[y^2] = 1/2.
    assert found.mean.item() == pytest.approx(0.3989422804, abs=1e-9)
    assert found.variance.item() == pytest.approx(0.5 - 1 / (2 * torch.pi), abs=1e-9)


@pytest.mark.parametrize(("mean", "expected"), [(-2.0, 0.0), (0.0, 0.0), (3.0, 3.0), (8.0, 6.0)])
def test_zero_variance_is_the_activation_itself(mean: float, expected: float) -> None:
    found = gaussian.relu6(Moments(torch.tensor([mean], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    assert found.mean.item() == expected
    assert found.variance.item() == 0
