"""Contractions and the refined input mean against dense formulas."""

from __future__ import annotations

import pytest
import torch
from dfmpc.compress.taps import Taps, refine_mean
from dfmpc.kernels import tap_sums
from dfmpc.models.graph import Layer, Op
from torch import Tensor


def layer_of(outs: int, ins: int, side: int, groups: int) -> tuple[Layer, Tensor, Taps]:
    weight = torch.randn(outs, ins // groups, side, side, generator=torch.Generator().manual_seed(outs + ins))
    layer = Layer("conv", "conv.weight", None, Op.CONV, tuple(weight.shape), groups)
    found = tap_sums(weight.reshape(outs, -1), layer.taps)
    return layer, weight.double(), Taps.of(layer, found.sums, found.squares)


SHAPES = pytest.mark.parametrize(
    ("outs", "ins", "side", "groups"), [(6, 4, 3, 1), (4, 6, 1, 1), (6, 6, 3, 6), (8, 4, 3, 2)], ids=str
)


def dense(weight: Tensor, groups: int) -> Tensor:
    """[out, in] tap sums with zeros between groups."""
    sums = weight.flatten(2).sum(2)
    outs, width = sums.shape
    full = torch.zeros(outs, width * groups, dtype=torch.float64)
    for row in range(outs):
        start = row // (outs // groups) * width
        full[row, start : start + width] = sums[row]
    return full


@SHAPES
def test_apply_is_the_convolution_of_a_constant_image(outs: int, ins: int, side: int, groups: int) -> None:
    _, weight, taps = layer_of(outs, ins, side, groups)
    means = torch.linspace(-1, 1, ins, dtype=torch.float64)
    image = means.view(1, ins, 1, 1).expand(1, ins, side, side)
    expected = torch.nn.functional.conv2d(image, weight, groups=groups).flatten()
    torch.testing.assert_close(taps.apply(means), expected, atol=1e-12, rtol=0)


@SHAPES
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_quadratic_is_the_variance_of_equicorrelated_taps(
    outs: int, ins: int, side: int, groups: int, rho: float
) -> None:
    _, weight, taps = layer_of(outs, ins, side, groups)
    variance = torch.linspace(0, 2, ins, dtype=torch.float64)
    covariance = rho * torch.ones(side * side, side * side) + (1 - rho) * torch.eye(side * side)
    width = ins // groups
    for row in range(outs):
        start = row // (outs // groups) * width
        flat = weight[row].flatten(1)
        expected = sum(variance[start + i] * flat[i] @ covariance.double() @ flat[i] for i in range(width))
        assert taps.quadratic(variance, rho)[row].item() == pytest.approx(float(expected), rel=1e-10, abs=1e-12)


@SHAPES
def test_refined_mean_is_the_dense_formula(outs: int, ins: int, side: int, groups: int) -> None:
    _, weight, taps = layer_of(outs, ins, side, groups)
    generator = torch.Generator().manual_seed(3)
    mean, target = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (ins, outs))
    variance, noise = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (ins, outs))
    variance[0] = 0  # a dead channel: its mean stays
    S, tau = dense(weight, groups), 0.7
    gain = torch.diag(variance) @ S.T @ torch.linalg.inv(S @ torch.diag(variance) @ S.T + tau * torch.diag(noise))
    expected = mean + gain @ (target - S @ mean)
    found = refine_mean(taps, mean, variance, target, noise, tau)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert found[0] == mean[0]


def test_scaled_taps_are_those_of_scaled_inputs() -> None:
    layer, weight, taps = layer_of(8, 4, 3, 2)
    factor = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    by_row = torch.stack([factor[:2] if row < 4 else factor[2:] for row in range(8)])
    scaled = (weight * by_row[:, :, None, None]).reshape(8, -1)
    found = tap_sums(scaled.float(), layer.taps)
    expected = Taps.of(layer, found.sums, found.squares)
    torch.testing.assert_close(
        taps.scaled(factor).sums, expected.sums, atol=1e-6, rtol=1e-5
    )  # the scaled weight was rounded to float32
    torch.testing.assert_close(
        taps.scaled(factor).squares, expected.squares, atol=1e-6, rtol=1e-5
    )  # the scaled weight was rounded to float32
