"""Output moments straight from the weight: against plain float64, by hand, and the kernel equal to the reference."""

from __future__ import annotations

import math

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import LayerInput, OutputMoments, moments, tap_sums
from dfmpc.kernels.moments import grouped_moments, moments_reference, moments_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter is NumPy, which mentions what a GPU does silently (integers that wrap).
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FLOAT_MAX = torch.finfo(torch.float32).max


def layer(rows: int, channels: int, taps: int, groups: int = 1, rho: float = 0.3) -> LayerInput:
    generator = torch.Generator().manual_seed(rows * 1000 + channels)
    weight = torch.randn(rows, channels * taps, generator=generator)
    mean = torch.randn(channels * groups, generator=generator, dtype=torch.float64)
    variance = torch.rand(channels * groups, generator=generator, dtype=torch.float64)
    return LayerInput(weight, taps, mean, variance * torch.logspace(-6, 0, len(variance), dtype=torch.float64), rho)


def moved(given: LayerInput, device: str) -> LayerInput:
    return LayerInput(given.weight.to(device), given.taps, given.mean, given.variance, given.rho)


def of(given: LayerInput) -> tuple[Tensor, int, Tensor, Tensor, float]:
    return given.weight, given.taps, given.mean, given.variance, given.rho


def plain(given: LayerInput) -> tuple[Tensor, Tensor]:
    found, rows = tap_sums(given.weight, given.taps), len(given.weight)
    groups = len(given.mean) // found.sums.shape[1]
    there = torch.arange(rows) // (rows // groups)
    mean, variance = (vector.view(groups, -1)[there] for vector in (given.mean, given.variance))
    power = (1 - given.rho) * found.squares + given.rho * found.sums.square()
    return (found.sums * mean).sum(1), (power * variance).sum(1)


def assert_same(found: OutputMoments, expected: OutputMoments) -> None:
    for a, b in ((found.mean, expected.mean), (found.variance, expected.variance)):
        assert (a.dtype, a.shape, a.device.type) == (torch.float64, b.shape, "cpu")
        assert torch.equal(a, b)


CASES = [(5, 16, 9, 1), (70, 1, 9, 70), (33, 1, 25, 33), (6, 7, 3, 2), (12, 5, 1, 4), (4, 1, 1, 1), (3, 131, 1, 1)]


@pytest.mark.parametrize(("rows", "channels", "taps", "groups"), CASES)
def test_the_kernel_equals_its_reference_and_both_the_formula(
    rows: int, channels: int, taps: int, groups: int, device: str
) -> None:
    given = layer(rows, channels, taps, groups)
    expected = moments_reference(*of(given))
    assert_same(moments_triton(*of(moved(given, device))), expected)
    mean, variance = plain(given)
    # a term is exact to 2^-41 of the largest that weights, taps and moments allow
    largest = given.weight.abs().amax().double() * 2 ** (taps - 1).bit_length()
    torch.testing.assert_close(expected.mean, mean, rtol=0, atol=channels * float(largest * 16) * 2.0**-40)
    torch.testing.assert_close(expected.variance, variance, rtol=1e-7, atol=0)


@pytest.mark.parametrize("length", [1300, 5000])
def test_rows_longer_than_a_tile_are_walked_over(length: int, device: str) -> None:
    for taps in (1, 4):
        given = layer(2, length // taps, taps)
        assert_same(moments_triton(*of(moved(given, device))), moments_reference(*of(given)))


def test_by_hand() -> None:
    # Two channels of two taps: S = (3, -1), Q = (5, 13). Mean 3·10 - 1·4 = 26; at ρ = 1/4 the powers are
    # (3/4)·5 + (1/4)·9 = 6 and (3/4)·13 + (1/4)·1 = 10: variance 6·2 + 10·0.5 = 17.
    weight = torch.tensor([[1.0, 2.0, 2.0, -3.0]])
    vectors = torch.tensor([[10.0, 4.0], [2.0, 0.5]], dtype=torch.float64)
    found = moments(weight, 2, vectors[0], vectors[1], 0.25)
    assert (found.mean.tolist(), found.variance.tolist()) == ([26.0], [17.0])


def test_no_order_of_the_channels_changes_a_bit(device: str) -> None:
    given = layer(4, 129, 3)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(1))
    weight = given.weight.view(4, 129, 3)[:, order].reshape(4, -1)
    turned = LayerInput(weight, 3, given.mean[order], given.variance[order], given.rho)
    expected = moments_reference(*of(given))
    assert_same(moments_reference(*of(turned)), expected)
    assert_same(moments_triton(*of(moved(turned, device))), expected)


def test_layers_of_one_launch_keep_their_inputs_and_places(device: str) -> None:
    layers = [layer(6, 8, 9), layer(20, 1, 9, 20, 0.5), layer(5, 33, 1, rho=0.0), layer(4, 3, 1, 2, 1.0)]
    half = layer(3, 16, 1)
    layers.append(LayerInput(half.weight.bfloat16(), 1, half.mean, half.variance, 0.5))
    found = grouped_moments([moved(given, device) for given in layers])
    for given, one in zip(layers, found, strict=True):
        assert_same(one, moments_reference(*of(given)))


# denormal weights share the least normal one's exponent, -125; two bits more for the taps, twice that for the variance
@pytest.mark.parametrize(("factor", "reach"), [(2.0**-149, -123), (2.0**-126, -117), (2.0**120, 129)])
def test_the_ends_of_float32_and_rows_of_zeros(factor: float, reach: int, device: str) -> None:
    given = layer(5, 9, 3)
    weight = given.weight.clamp(-4, 4).mul(30).round() * factor  # below 2^7
    weight[2], weight[3] = 0.0, -FLOAT_MAX
    given = LayerInput(weight, 3, given.mean, given.variance, 0.5)
    found = moments_reference(*of(given))
    assert_same(moments_triton(*of(moved(given, device))), found)
    assert (found.mean[2].item(), found.variance[2].item()) == (0.0, 0.0)
    mean, variance = plain(given)
    rest = [0, 1, 4]
    torch.testing.assert_close(found.mean[rest], mean[rest], rtol=1e-12, atol=9 * 4 * 2.0 ** (reach - 41))
    torch.testing.assert_close(found.variance[rest], variance[rest], rtol=1e-12, atol=9 * 2.0 ** (2 * reach - 41))
    torch.testing.assert_close(found.variance[3], variance[3], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_counts_as_its_float32_value(dtype: torch.dtype, device: str) -> None:
    given = layer(5, 16, 9)
    weight = given.weight.to(dtype)
    expected = moments_reference(weight.float(), *of(given)[1:])
    assert_same(moments_reference(weight, *of(given)[1:]), expected)
    assert_same(moments_triton(weight.to(device), *of(given)[1:]), expected)


def test_inputs_that_are_all_zero_give_zeros(device: str) -> None:
    given = layer(3, 8, 1)
    nothing = torch.zeros(8, dtype=torch.float64)
    found = moments_triton(given.weight.to(device), 1, nothing, nothing, 0.5)
    assert found.mean.tolist() == found.variance.tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_a_weight_without_elements_has_moments_of_zero(shape: tuple[int, int], device: str) -> None:
    vector = torch.ones(shape[1], dtype=torch.float64)
    for run in (moments_reference, moments_triton):
        found = run(torch.zeros(shape, device=device), 1, vector, vector, 0.5)
        assert found.mean.tolist() == found.variance.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_is_refused_by_name(value: float, device: str) -> None:
    given = layer(4, 10, 1)
    broken = given.weight.clone()
    broken[2, 9] = value
    vector = given.mean.clone()
    vector[3] = value
    for run in (moments_reference, moments_triton):
        with pytest.raises(NonFiniteError, match=r"1 of 4 weight rows hold NaN or Inf, the first is row 2"):
            run(broken.to(device), *of(given)[1:])
        with pytest.raises(NonFiniteError, match=rf"the input's mean holds {value}; use finite numbers below 2\^500"):
            run(given.weight.to(device), 1, vector, given.variance, 0.5)
        with pytest.raises(NonFiniteError, match=r"the input's variance holds"):
            run(given.weight.to(device), 1, given.mean, vector, 0.5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"taps": 4}, "taps is 4 for rows of 18; it must divide them"),
        ({"rho": 1.5}, "rho is 1.5; use 0 to 1"),
        (
            {"mean": torch.zeros(5, dtype=torch.float64)},
            r"variance is torch.float64 with shape \(6,\); expected .* \(5,\)",
        ),
        ({"mean": torch.zeros(6)}, r"mean is torch.float32 with shape \(6,\); expected float64 \(6,\)"),
        ({"taps": 18, "rows": 4}, "mean has 6 channels for 4 rows of 1; use 1, or that many for each"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], text: str) -> None:
    vectors = {"mean": torch.zeros(6, dtype=torch.float64), "variance": torch.zeros(6, dtype=torch.float64)}
    given = {"rows": 3, "taps": 3, "rho": 0.5, **vectors, **changes}
    weight = torch.zeros(given.pop("rows"), 18)
    for run in (moments_reference, moments_triton):
        with pytest.raises(ValueError, match=text):
            run(weight, **given)
