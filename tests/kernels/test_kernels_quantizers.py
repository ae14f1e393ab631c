"""The references against formulas written down plainly, ties worked out by hand, and hashes of their bytes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from dfmpc.kernels import CodeFormat, Grid, Quantized, dequantize, ternary, uniform, unpack
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]


def random_rows(rows: int = 8, length: int = 203, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


def values(q: Quantized) -> torch.Tensor:
    return dequantize(q.format, q.codes, q.scale, q.zero_point)


def codes(q: Quantized) -> list[list[int]]:
    return unpack(q.codes, q.format.bits, q.format.length).tolist()


def plain_ternary(w: torch.Tensor) -> torch.Tensor:
    w = w.double()
    mask = w.abs() > 0.7 * w.abs().mean()
    return w.sign() * mask * w.abs()[mask].mean()


def plain_uniform(w: torch.Tensor, bits: int, grid: Grid) -> torch.Tensor:
    w, levels = w.double(), 2**bits - 1
    if grid is Grid.DOREFA:
        s = w.abs().max()
        return s * (2 / levels * (levels * (w / (2 * s) + 0.5)).round() - 1)
    if grid is Grid.SYMMETRIC:
        scale = w.abs().max() / (2 ** (bits - 1) - 1)
        return (w / scale).round() * scale
    scale = (w.max() - w.min()) / levels
    return ((w - w.min()) / scale).round() * scale + w.min()


def check_statistics(q: Quantized, weight: torch.Tensor) -> None:
    w, v = weight.double(), values(q).double()
    torch.testing.assert_close(q.dot, (v * w).sum(1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(q.quantized_norm, (v * v).sum(1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(q.original_norm, (w * w).sum(1), rtol=1e-9, atol=0)
    assert torch.equal(q.zeros, (v == 0).sum(1))


def test_ternary_is_the_formula_of_twn_row_by_row() -> None:
    weight = random_rows()
    q = ternary(weight, group_size=203)
    expected = torch.stack([plain_ternary(row) for row in weight])
    torch.testing.assert_close(values(q).double(), expected, rtol=1e-7, atol=0)
    check_statistics(q, weight)
    assert q.scale.shape == (8, 1)


def test_ternary_layer_wise_takes_one_threshold_for_all_rows() -> None:
    weight = random_rows() * torch.linspace(0.1, 2, 8)[:, None]
    q = ternary(weight, group_size=8, layer_wise=True)
    torch.testing.assert_close(values(q).double(), plain_ternary(weight), rtol=1e-7, atol=0)
    check_statistics(q, weight)
    assert q.scale.shape == (1, 1)
    assert q.format == CodeFormat(Grid.TERNARY, 2, 203, 203, layer_wise=True)


def test_ternary_threshold_is_strict() -> None:
    # Mean magnitude 10 and threshold float32(7): a weight of exactly 7 becomes 0, the next float above it stays.
    above = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0)).item()
    weight = torch.tensor([[7.0, -7.0, 13.0, -13.0], [above, -7.0, 13.0, -13.0]])
    q = ternary(weight[:1], group_size=4)
    assert codes(q) == [[1, 1, 2, 0]]
    assert q.scale.item() == 13.0
    # In the second row float32(0.7 * mean) is still 7, for the mean grew by less than half a step of 7.
    assert codes(ternary(weight[1:], group_size=4)) == [[2, 1, 2, 0]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", UNIFORM)
def test_uniform_is_the_plain_formula_group_by_group(grid: Grid, bits: int) -> None:
    weight = random_rows()
    q = uniform(weight, bits, grid, group_size=64)
    for row in range(8):
        for start in range(0, 203, 64):
            found = values(q)[row, start : start + 64].double()
            expected = plain_uniform(weight[row, start : start + 64], bits, grid)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    check_statistics(q, weight)
    assert q.scale.shape == (8, 4)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("grid", UNIFORM)
def test_uniform_layer_wise_takes_one_scale(grid: Grid, bits: int) -> None:
    weight = random_rows() * torch.logspace(-4, 1, 8)[:, None]
    q = uniform(weight, bits, grid, group_size=203, layer_wise=True)
    torch.testing.assert_close(values(q).double(), plain_uniform(weight, bits, grid), rtol=1e-5, atol=1e-5)
    check_statistics(q, weight)
    assert q.scale.shape == (1, 1)


def test_dorefa_ties_go_to_the_even_code() -> None:
    # Two bits, s = 3: u = rint(w * 3/6 + 3/2) = rint((w + 3) / 2). w = -2, 0, 2 give 0.5, 1.5, 2.5, exactly half-way
    # in binary too, and half to even makes them 0, 2, 2.
    q = uniform(torch.tensor([[-3.0, -2.0, 0.0, 2.0, 3.0]]), 2, Grid.DOREFA, group_size=5)
    assert codes(q) == [[0, 0, 2, 2, 3]]
    assert values(q).tolist() == [[-3.0, -3.0, 1.0, 1.0, 3.0]]
    assert (q.dot.item(), q.quantized_norm.item(), q.zeros.item()) == (9 + 6 + 0 + 2 + 9, 9 + 9 + 1 + 1 + 9, 0)


def test_symmetric_ties_go_to_the_even_code() -> None:
    # Three bits: Q = 3 and max|w| = 3, so the scale is 1 and q = rint(w). 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, and the same
    # below zero; stored as q + 4.
    weight = torch.tensor([[3.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -3.0]])
    q = uniform(weight, 3, Grid.SYMMETRIC, group_size=8)
    assert codes(q) == [[7, 4, 6, 6, 4, 2, 2, 1]]
    assert (q.scale.item(), q.zeros.item()) == (1.0, 2)


def test_asymmetric_uses_both_ends_and_keeps_a_constant_row_exactly() -> None:
    weight = torch.tensor([[1.0, 2.0, 2.5, 4.0], [-0.37, -0.37, -0.37, -0.37]])
    q = uniform(weight, 2, Grid.ASYMMETRIC, group_size=4)
    # Scale 1, zero point -1: u = rint(w - 1), and 1.5 goes to 2.
    assert codes(q) == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert values(q)[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(values(q)[1], weight[1])
    torch.testing.assert_close(q.dot[1], q.original_norm[1], rtol=1e-11, atol=0)


@pytest.mark.parametrize("grid", UNIFORM)
def test_rows_of_zeros_quantize_to_zeros(grid: Grid) -> None:
    for layer_wise in (False, True):
        q = uniform(torch.zeros(3, 10), 4, grid, group_size=8, layer_wise=layer_wise)
        assert torch.equal(values(q), torch.zeros(3, 10))
        assert q.zeros.tolist() == [10, 10, 10]
        assert q.dot.tolist() == q.quantized_norm.tolist() == [0, 0, 0]
    assert torch.equal(values(ternary(torch.zeros(3, 10), group_size=8)), torch.zeros(3, 10))


@pytest.mark.parametrize("factor", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**120])
@pytest.mark.parametrize("grid", [Grid.TERNARY, *UNIFORM])
def test_the_ends_of_float32_stay_finite(grid: Grid, factor: float) -> None:
    weight = random_rows(4, 40).clamp(-4, 4).mul(30).round().div(2) * factor
    q = ternary(weight, group_size=40) if grid is Grid.TERNARY else uniform(weight, 8, grid, group_size=40)
    assert bool(torch.isfinite(values(q)).all())
    assert bool(torch.isfinite(torch.stack([q.dot, q.quantized_norm, q.original_norm])).all())
    assert bool(((values(q).double() - weight.double()).abs() <= weight.double().abs().amax()).all())
    assert torch.equal(q.zeros, (values(q) == 0).sum(1))


@pytest.mark.parametrize("group_size", [203, 64])
@pytest.mark.parametrize("grid", [Grid.TERNARY, *UNIFORM])
def test_results_are_tensors_that_a_caller_can_change(grid: Grid, group_size: int) -> None:
    weight = random_rows()
    for layer_wise in (False, True):
        if grid is Grid.TERNARY:
            q = ternary_reference(weight, group_size=group_size, layer_wise=layer_wise)
        else:
            q = uniform_reference(weight, 5, grid, group_size=group_size, layer_wise=layer_wise)
        found = [q.codes, q.scale, q.zero_point, q.dot, q.quantized_norm, q.original_norm, q.zeros]
        before = [None if tensor is None else tensor.clone() for tensor in found]
        for number, tensor in enumerate(found):
            if tensor is not None:
                tensor.zero_()  # an error for a tensor of inference mode, and no other may share its memory
                before[number] = torch.zeros_like(tensor)
            for other, expected in zip(found, before, strict=True):
                assert other is expected or torch.equal(other, expected)


def test_half_precision_is_quantized_as_its_float32_value() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = random_rows().to(dtype)
        for grid in UNIFORM:
            a, b = (uniform(w, 5, grid, group_size=16) for w in (weight, weight.float()))
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale, b.scale)
            assert torch.equal(a.dot, b.dot)


def test_a_transposed_weight_is_quantized_as_its_copy() -> None:
    weight = random_rows(30, 50).T
    copy = weight.contiguous()
    assert torch.equal(ternary(weight, group_size=30).codes, ternary(copy, group_size=30).codes)
    a, b = (uniform(w, 3, Grid.DOREFA, group_size=8) for w in (weight, copy))
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("length", [9, 64])
def test_weights_that_take_part_in_training_give_the_same(length: int, layer_wise: bool) -> None:
    weight = torch.linspace(-1, 1, 6 * length).reshape(6, length)
    trained = weight.clone().requires_grad_()
    for quantize in (ternary_reference, lambda *args, **kw: uniform_reference(args[0], 4, Grid.DOREFA, **kw)):
        found, expected = (quantize(each, group_size=length, layer_wise=layer_wise) for each in (trained, weight))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert not found.scale.requires_grad


def test_many_rows_are_worked_on_in_chunks_with_the_same_result() -> None:
    weight = random_rows(700, 203)
    whole = uniform(weight, 4, Grid.SYMMETRIC, group_size=203)
    for start in (0, 322, 323, 699):
        part = uniform(weight[start : start + 1], 4, Grid.SYMMETRIC, group_size=203)
        assert torch.equal(whole.codes[start], part.codes[0])
        assert whole.dot[start] == part.dot[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": 12}, r"group_size is 12 for rows of 203; use a multiple of 8 or at least 203"),
        ({"group_size": 0}, r"group_size is 0"),
    ],
)
def test_a_bad_group_size_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ternary(random_rows(), **options)
    with pytest.raises(ValueError, match=text):
        uniform(random_rows(), 4, Grid.DOREFA, **options)


def test_bad_weights_widths_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.float64 with shape \(2, 8\)"):
        ternary(torch.zeros(2, 8, dtype=torch.float64), group_size=8)
    with pytest.raises(ValueError, match=r"bits is 9; use 2 to 8"):
        uniform(random_rows(), 9, Grid.DOREFA, group_size=8)
    with pytest.raises(ValueError, match=r"ternary grid is not uniform"):
        uniform(random_rows(), 2, Grid.TERNARY, group_size=8)


GOLDEN = {
    "ternary": "01f7d2b12925c54253c0bf27fc832bd67b213f1afc5844d11a5f6a9f93c557d1",
    "dorefa": "2b0455d404a7276c9ef5ec33199e7c1507c7b85347e98b58d033c31baec18f43",
    "symmetric": "f61e4d639c5ded5c2c11a69753933f58c81626985f85e51ae3578a1557e65fa0",
    "asymmetric": "94ce785b46f1cc75c11c8a76e1a1b39d69b5238ccc51ea0aef089c7eaaa15ec9",
}


@pytest.mark.parametrize("grid", GOLDEN)
def test_bytes_are_those_of_numerics_version_1(grid: str) -> None:
    """A refactor must not change these; whoever means to change them raises formats.NUMERICS_VERSION."""
    weight = torch.randint(-(2**20), 2**20, (31, 203), generator=torch.Generator().manual_seed(7)).float() / 2**18
    made = []
    for layer_wise in (False, True):
        options = {"group_size": 64, "layer_wise": layer_wise}
        if grid == "ternary":
            made.append(ternary(weight, **options))
        else:
            made += [uniform(weight, bits, Grid(grid), **options) for bits in range(2, 9)]
    digest = hashlib.sha256()
    for q in made:
        for tensor in (q.codes, q.scale, q.zero_point, q.dot, q.quantized_norm, q.original_norm, q.zeros):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[grid]
