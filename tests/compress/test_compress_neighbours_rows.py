"""Methods that see one layer's rows: cases worked out by hand, and what each method promises."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from dfmpc.compress.neighbours import ROW_METHODS, quantize_rows
from dfmpc.compress.neighbours.hqq import shrink
from dfmpc.compress.neighbours.segments import exact_sum, small_sum
from dfmpc.compress.neighbours.squant import flip_roundings, in_steps
from dfmpc.compress.neighbours.steps import STEPS
from dfmpc.errors import NonFiniteError
from dfmpc.job.methods import BitPlan
from dfmpc.kernels import CodeFormat, Grid, Quantized, dequantize, uniform, unpack
from pydantic import TypeAdapter
from torch import Tensor

GRIDS = {
    "twn-exact": Grid.TERNARY,
    "omse": Grid.SYMMETRIC,
    "vecq": Grid.DOREFA,
    "mul2q": Grid.ASYMMETRIC,
    "daq": Grid.ASYMMETRIC,
    "squant": Grid.ASYMMETRIC,
    "hqq": Grid.ASYMMETRIC,
}
SHAPES = {"channel": (7, 45), "depthwise": (12, 9), "one-weight": (5, 1), "group:16": (6, 40), "tensor": (4, 27)}


def quantized(method: str, rows: Tensor, bits: int, granularity: str = "channel", **fields: Any) -> Quantized:
    """Quantize float32 rows whose kernels have 9 positions where that divides them."""
    length, taps = rows.shape[1], fields.pop("taps", 9 if rows.shape[1] % 9 == 0 else 1)
    plan = TypeAdapter(BitPlan).validate_python({"name": "p", "method": method, "bits": bits, **fields})
    group = int(granularity.removeprefix("group:")) if granularity.startswith("group:") else length
    grid = Grid.DOREFA if method == "twn-exact" and bits != 2 else GRIDS[method]
    grid = Grid.SYMMETRIC if fields.get("symmetric") else grid
    return quantize_rows(rows, CodeFormat(grid, bits, length, group, granularity == "tensor"), plan, taps)


def codes(found: Quantized) -> list[list[int]]:
    return unpack(found.codes, found.format.bits, found.format.length).tolist()


def values(found: Quantized) -> Tensor:
    return dequantize(found.format, found.codes, found.scale, found.zero_point).double()


def noise(shape: tuple[int, int], seed: int = 0, scale: float = 0.05) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_twn_exact_by_hand() -> None:
    # (Σ top k)²/k of 6 2 1 1 is 36, 64/2 = 32, 81/3 = 27, 100/4 = 25: k = 1 and α = 6, where 0.7·mean = 1.75 takes two.
    # Of -4 3 1 0.5 it is 16, 24.5, 21.3, 18.1: k = 2 and α = 3.5.
    found = quantized("twn-exact", torch.tensor([[6.0, 2, 1, -1], [-4.0, 3, 1, 0.5]]), 2)
    assert codes(found) == [[2, 1, 1, 1], [0, 2, 1, 1]]
    assert found.scale.tolist() == [[6.0], [3.5]]


@pytest.mark.parametrize("seed", range(6))
def test_twn_exact_is_the_best_of_all_subsets(seed: int) -> None:
    """Of every set of weights that could be non-zero, with its own best α; halves of integers make ties."""
    rows = (noise((4, 9), seed, 4.0).round() / 2).float()
    found = quantized("twn-exact", rows, 2)
    for row, value in zip(rows.double(), values(found), strict=True):
        magnitude = row.abs()
        gains = [float(magnitude[list(s)].sum()) ** 2 / n for n in range(1, 10) for s in combinations(range(9), n)]
        assert float((row - value).square().sum()) == pytest.approx(float(row.square().sum()) - max(gains), abs=1e-9)


def test_twn_exact_rounds_other_widths_like_dfmpc() -> None:
    rows = noise((5, 18))
    found, expected = quantized("twn-exact", rows, 6), uniform(rows, 6, Grid.DOREFA, group_size=18)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


def test_omse_by_hand() -> None:
    # 2 bits: levels -α, 0, α. At α = 4 the twos lie half way and go to 0: error 12. With all at α the best is their
    # mean 2.5: 3·0.25 + 2.25 = 3; with only the 4 at its α the error is 12 again. 2.5 is 10/16 of the largest.
    found = quantized("omse", torch.tensor([[2.0, 2, -2, 4]]), 2)
    assert found.scale.tolist() == [[2.5]]
    assert codes(found) == [[3, 3, 1, 3]]
    assert float(found.original_norm - 2 * found.dot + found.quantized_norm) == 3.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["channel", "group:16", "tensor"])
def test_omse_is_never_worse_than_round_to_nearest(bits: int, granularity: str) -> None:
    rows = torch.cat([noise((6, 48)), noise((6, 48), 1) ** 3, torch.ones(1, 48)])
    found = quantized("omse", rows, bits, granularity)
    nearest = uniform(
        rows, bits, Grid.SYMMETRIC, group_size=found.format.group_size, layer_wise=granularity == "tensor"
    )
    errors = [(values(item) - rows).square().view(len(rows), -1, 16).sum(2) for item in (found, nearest)]
    if granularity != "group:16":
        errors = [error.sum(1) if granularity == "channel" else error.sum() for error in errors]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_omse_finds_what_a_fine_search_finds() -> None:
    rows = noise((4, 400))
    error = (values(quantized("omse", rows, 3)) - rows).square().sum(1)
    scales = rows.abs().amax(1)[None].double() / 3 * torch.linspace(0.05, 1, 2000, dtype=torch.float64)[:, None]
    steps = (rows / scales[..., None]).round().clamp(-3, 3) * scales[..., None]
    least = (steps - rows).square().sum(2).amin(0)
    assert bool((error <= least * 1.002).all())


def test_vecq_by_hand() -> None:
    # std of -3 -1 1 3 is √5, the step of 2 bits 0.9957·√5 = 2.226: w/step - ½ = -1.85 -0.95 -0.05 0.85 rounds to
    # -2 -1 0 1, so v = -1.5 -0.5 0.5 1.5; α = ⟨w, v⟩/⟨v, v⟩ = 10/5 = 2; DoReFa's scale is α·3/2 = 3.
    found = quantized("vecq", torch.tensor([[-3.0, -1, 1, 3]]), 2)
    assert codes(found) == [[0, 1, 2, 3]]
    assert found.scale.tolist() == [[3.0]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_vecqs_alpha_is_the_least_squares_one(bits: int) -> None:
    """The error is orthogonal to the levels, and they are the ones at the Gaussian step."""
    rows = noise((6, 64), bits)
    found = quantized("vecq", rows, bits)
    assert bool(((found.dot - found.quantized_norm).abs() <= 1e-6 * found.original_norm).all())
    step, half = STEPS[bits] * rows.double().std(1, correction=0, keepdim=True), 2 ** (bits - 1)
    assert codes(found) == ((rows / step - 0.5).round().clamp(-half, half - 1) + half).int().tolist()


def test_mul2q_by_hand() -> None:
    # mean 1, centred -3 -1 1 3 with v = -1.5 -0.5 0.5 1.5 as above; α = 0.9957·√5 and no re-fit: values α v + 1.
    alpha = 0.9957 * math.sqrt(5)
    found = quantized("mul2q", torch.tensor([[-2.0, 0, 2, 4]]), 2)
    assert codes(found) == [[0, 1, 2, 3]]
    assert float(found.scale) == pytest.approx(alpha, rel=1e-6)
    assert found.zero_point is not None
    assert float(found.zero_point) == pytest.approx(1.5 - 1 / alpha, rel=1e-6)
    assert values(found)[0].tolist() == pytest.approx([1 + alpha * v for v in (-1.5, -0.5, 0.5, 1.5)], rel=1e-6)


def test_daq_standardises_every_channel_and_mul2q_the_tensor() -> None:
    # Rows that are shifted and scaled copies have the same codes by channel; over the tensor the large row saturates.
    row = torch.tensor([-2.0, 0, 2, 4])
    rows = torch.stack([row, 10 * row + 30])
    by_channel = quantized("daq", rows, 2)
    assert codes(by_channel) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert values(by_channel)[1].tolist() == pytest.approx((10 * values(by_channel)[0] + 30).tolist(), rel=1e-6)
    # Mean 20.5, squared distances 1541 + 3521, so std = √(5062/8) = 25.15 and the step 25.05: w/step - ½ about the mean
    # is -1.40 -1.32 -1.24 -1.16 and -0.92 -0.12 0.68 1.48.
    over_all = quantized("mul2q", rows, 2, "tensor")
    assert codes(over_all) == [[1, 1, 1, 1], [1, 2, 3, 3]]
    assert float(over_all.scale) == pytest.approx(0.9957 * math.sqrt(5062 / 8), rel=1e-6)


def test_hqq_by_hand() -> None:
    # s = 3/(3 - 0) = 1, z = 0: q = 0 0 0 0 3 and w - w_r = 0 .4 .4 .4 0, in all 1.2. shrink(.4) = .4 - .4^-0.3/10
    # = .26836, so z = mean(q - (w - w_e)) = -3·.13164/5 = -.078982. Then the errors are 2·.078982 + 3·.321018 = 1.121.
    found = quantized("hqq", torch.tensor([[0, 0.4, 0.4, 0.4, 3]]), 2, steps=1)
    assert found.zero_point is not None
    assert found.scale.tolist() == [[1.0]]
    assert float(found.zero_point) == pytest.approx(-0.078982, abs=1e-6)
    assert codes(found) == [[0, 0, 0, 0, 3]]


def test_hqqs_shrinkage_is_the_formula() -> None:
    x = torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.17, 0.18, 2.0], dtype=torch.float64)
    expected = [math.copysign(max(abs(v) - abs(v) ** -0.3 / 10, 0), v) if v else 0.0 for v in x.tolist()]
    assert shrink(x, 10.0, 0.7).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [0.05, 20.0], ids=["errors-below-the-shrinkage", "errors-above-it"])
def test_hqqs_mean_error_is_never_above_that_of_min_max(bits: int, scale: float) -> None:
    rows = noise((8, 128), bits, scale)
    found, nearest = quantized("hqq", rows, bits, "group:64"), uniform(rows, bits, Grid.ASYMMETRIC, group_size=64)
    assert torch.equal(found.scale, nearest.scale)
    errors = [(values(item) - rows).abs().view(8, 2, 64).sum(2) for item in (found, nearest)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    assert float(errors[0].sum()) < 0.999 * float(errors[1].sum())


def test_squant_by_hand() -> None:
    # Steps of 1 (largest weight 7, 4 bits). Kernel A: p = 0 -.4 -.3, sum -.7: one flip, the 1.4 goes to 2, sum +.3.
    # B: p = -.3 -.1 0, sum -.4: none. C: p = -.45, none. Channel: .3 - .4 - .45 = -.55: one flip, and of the candidates
    # of that sign, B's .3 and C's .45, the second has the largest error: 0.45 goes to 1. The sum is .45.
    rows = torch.tensor([[7, 1.4, 2.3, 0.3, 0.1, 5, 0.45, 0, 0]])
    found = quantized("squant", rows, 4, symmetric=True, taps=3)
    assert found.scale.tolist() == [[1.0]]
    assert values(found)[0].tolist() == [7, 2, 2, 0, 0, 5, 1, 0, 0]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("kernels", "taps"), [(40, 9), (1, 9), (64, 1), (5, 25)], ids=str)
def test_squants_signed_errors_stay_within_its_constraints(bits: int, symmetric: bool, kernels: int, taps: int) -> None:
    rows = noise((12, kernels * taps), bits)
    found = quantized("squant", rows, bits, symmetric=symmetric, taps=taps)
    target = in_steps(rows.double(), found.scale, found.zero_point, found.format)
    error = unpack(found.codes, bits, rows.shape[1]).double() - target
    by_kernel = error.view(12, kernels, taps).sum(2)
    assert float(error.abs().max()) < 1
    assert float(error.sum(1).abs().max()) <= 0.5 + 1e-6
    assert float(by_kernel.abs().max()) <= (0.5 if kernels == 1 else 1) + 1e-6
    # a channel flips a kernel's candidate at most once, and only as many kernels as its sum asks for
    assert bool(((by_kernel.abs() > 0.5 + 1e-6).sum(1) <= kernels / 2 + 1).all())


def test_squant_leaves_no_kernel_above_half_where_channels_ask_for_nothing() -> None:
    half = (torch.rand(1, 8, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.98 + 5).expand(
        6, 8, 9
    )
    mirrored = torch.cat([half, 20 - half], 1)  # every kernel has its opposite, so each channel's sum is 0
    error = flip_roundings(mirrored.reshape(6, -1), 9) - mirrored.reshape(6, -1)
    assert float(error.view(6, 16, 9).sum(2).abs().max()) <= 0.5 + 1e-6


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_gives_codes_of_its_grid(method: str, shape: str, bits: int) -> None:
    rows = noise(SHAPES[shape], bits)
    found = quantized(method, rows, bits, shape if shape in ("group:16", "tensor") else "channel")
    groups = 1 if shape == "tensor" else found.format.groups
    assert found.scale.shape == (1 if shape == "tensor" else len(rows), groups)
    assert (found.zero_point is not None) == (found.format.grid is Grid.ASYMMETRIC)
    found_codes = unpack(found.codes, bits, rows.shape[1])
    assert int(found_codes.max()) <= (2 if found.format.grid is Grid.TERNARY else 2**bits - 1)
    assert int(found_codes.min()) >= (found.format.grid is Grid.SYMMETRIC)
    assert bool((found.scale >= 0).all())
    if bits >= 4:
        assert float((values(found) - rows).square().sum()) < 0.05 * float(rows.double().square().sum())


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_and_constant_rows_are_exact(method: str, bits: int) -> None:
    rows = torch.tensor([0.0, 0.3, -0.7])[:, None].expand(3, 18).contiguous()
    found = values(quantized(method, rows, bits))
    assert not found[0].any()
    torch.testing.assert_close(found, rows.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0)], ids=str)
def test_empty_layers_work(method: str, shape: tuple[int, int]) -> None:
    found = quantized(method, torch.zeros(shape), 4)
    assert values(found).shape == shape
    assert found.dot.shape == (shape[0],)


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_not_a_number_is_refused(method: str, bad: float) -> None:
    rows = noise((4, 18))
    rows[2, 5] = bad
    with pytest.raises(NonFiniteError, match="row 2"):
        quantized(method, rows, 4)


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("factor", [2.0**-120, 2.0**100], ids=["denormal-scales", "huge"])
def test_extreme_magnitudes_keep_their_codes(method: str, factor: float) -> None:
    """A power of two in the weights is a power of two in the scales; HQQ's shrinkage alone knows an absolute size."""
    rows = noise((5, 36), 1, 1.0)
    plain, scaled = (quantized(method, rows * f, 4) for f in (1.0, factor))
    if method != "hqq":
        assert codes(plain) == codes(scaled)
    assert bool(torch.isfinite(values(scaled)).all())


@pytest.mark.parametrize("method", ROW_METHODS)
def test_rows_are_quantized_on_their_own(method: str) -> None:
    """Many chunks of rows, and one row alone, give the same codes."""
    rows = noise((300, 450), 5)
    whole, alone = quantized(method, rows, 3), quantized(method, rows[217:218], 3)
    assert torch.equal(whole.codes[217:218], alone.codes)
    assert torch.equal(whole.scale[217:218], alone.scale)


def test_sums_do_not_depend_on_the_order() -> None:
    terms = noise((3, 5000), 2, 1e3).double() ** 3
    shuffled = terms[:, torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(exact_sum(terms.clone()), exact_sum(shuffled.clone()))
    assert exact_sum(terms.clone()).tolist() == pytest.approx([math.fsum(row) for row in terms.tolist()], rel=1e-6)
    small, mixed = (x.float() / float(terms.abs().max()) for x in (terms, shuffled))
    expected = [math.fsum(row) for row in small.tolist()]
    assert torch.equal(small_sum(small, 0), small_sum(mixed, 0))
    assert small_sum((terms / terms.abs().max()).float(), 0).tolist() == pytest.approx(expected, abs=1e-6)
