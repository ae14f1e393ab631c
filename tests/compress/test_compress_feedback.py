"""Error feedback on a layer: its objective never grows, its fallbacks are told, groups and columns may be permuted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dfmpc.compress import feedback
from dfmpc.compress.factorise import Factor, factorise
from dfmpc.compress.feedback import (
    MAX_FEEDBACK,
    FeedbackOptions,
    error_feedback,
    ternary_feedback,
    uniform_feedback,
    values_of,
)
from dfmpc.compress.scale_search import Rounded, clip_search, nearest_levels, ternary_optimum
from dfmpc.kernels import Grid, feedback_round
from dfmpc.kernels.segments import code_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]
SHARES = [{}, {"group_size": 8}, {"layer_wise": True}]
SHARE_NAMES = ["channel", "group", "tensor"]


def random_rows(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * 0.1


def random_moments(batch: int, length: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """H of inputs whose neighbours are correlated and whose channels differ in strength; float64."""
    generator = torch.Generator().manual_seed(seed + 1)
    a = torch.randn(batch, length, rank or 3 * length, generator=generator, dtype=torch.float64)
    a[:, 1:] += 0.8 * a[:, :-1].clone()
    a *= torch.rand(batch, length, 1, generator=generator) + 0.1
    return a @ a.mT / a.shape[2]


def losses(rows: Tensor, rounded: Rounded, moments: Tensor) -> Tensor:
    """Float64 [rows]: (w − q)'H(w − q)."""
    error = (rows - values_of(rounded)).double().view(len(moments), -1, rows.shape[1])
    return ((error @ moments) * error).sum(2).flatten()


def nearest(rows: Tensor, bits: int, grid: Grid, **share: object) -> Rounded:
    form = code_format(rows, grid, bits, share.get("group_size", rows.shape[1]), share.get("layer_wise", False))
    found = clip_search(rows, bits, grid, **share)
    return Rounded(form, nearest_levels(rows, form, found), found.scale, found.zero_point)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 24),
    rank=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    grid=st.sampled_from(UNIFORM),
    share=st.sampled_from([{}, {"group_size": 8}]),
    order=st.sampled_from(["falling", "natural"]),
    descents=st.integers(0, 2),
)
def test_no_row_loses_more_than_by_rounding_to_nearest(
    rows: int, length: int, rank: int, seed: int, bits: int, grid: Grid, share: dict, order: str, descents: int
) -> None:
    weight, moments = random_rows(rows, length, seed), random_moments(1, length, seed, rank)
    options = FeedbackOptions(order=order, descents=descents)
    for start, end in (
        (nearest(weight, bits, grid, **share), uniform_feedback(weight, moments, bits, options, grid=grid, **share)),
        (ternary_optimum(weight, **share), ternary_feedback(weight, moments, options, **share)),
    ):
        before, after = losses(weight, start, moments), losses(weight, end, moments)
        # H and the choice between the two are in float32
        assert (after <= before * (1 + 1e-5) + 1e-6 * moments.abs().max() * weight.square().sum(1)).all()


@pytest.mark.parametrize("share", SHARES, ids=SHARE_NAMES)
def test_feedback_takes_a_good_part_of_the_loss(share: dict[str, object]) -> None:
    weight, moments = random_rows(24, 72), random_moments(1, 72)
    start, end = ternary_optimum(weight, **share), ternary_feedback(weight, moments, **share)
    assert losses(weight, end, moments).sum() < 0.65 * losses(weight, start, moments).sum()
    assert (end.damp, end.fallback) == (0.01, "")
    assert (end.levels.dtype, end.levels.shape, end.scale.shape) == (torch.uint8, (24, 72), start.scale.shape)
    for grid in UNIFORM:
        found = uniform_feedback(weight, moments, 4, grid=grid, **share)
        assert (
            losses(weight, found, moments).sum()
            < 0.6 * losses(weight, nearest(weight, 4, grid, **share), moments).sum()
        )
        assert (found.zero_point is None) == (grid is not Grid.ASYMMETRIC)


def test_descent_improves_on_the_sweep_and_a_second_pass_on_the_first() -> None:
    weight, moments = random_rows(16, 72), random_moments(1, 72)
    found = [
        float(losses(weight, ternary_feedback(weight, moments, FeedbackOptions(descents=n)), moments).sum())
        for n in (0, 1, 2)
    ]
    assert found[2] < found[1] < 0.97 * found[0]


def test_two_columns_by_hand() -> None:
    # The kernel's hand-made case; ties of the diagonal keep the columns' order. The start is plain rounding, 0 0, and
    # the second column takes over what the first lost: 0.576 falls to 0.136.
    rows, moments = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    form = code_format(rows, Grid.SYMMETRIC, 3, 2, False)
    start = Rounded(form, torch.tensor([[4, 4]], dtype=torch.uint8), torch.ones(1, 1))
    factor = factorise(moments, 0.0, "natural")
    torch.testing.assert_close(factor.upper, torch.tensor([[[1.0, 0.8], [0.0, 1.0]]]))
    end = error_feedback(rows, start, factor)
    assert end.levels.tolist() == [[4, 5]]
    torch.testing.assert_close(losses(rows, end, moments[None].double()), torch.tensor([0.136], dtype=torch.float64))


def test_a_row_for_which_feedback_is_worse_stays_rounded_to_nearest() -> None:
    weight, moments = random_rows(64, 12, seed=3), random_moments(1, 12, seed=3)
    start = nearest(weight, 3, Grid.DOREFA)
    factor = factorise(moments, 0.01, "falling")
    swept = weight.gather(1, factor.order.expand(64, -1))
    levels = feedback_round(swept[None], factor.upper, Grid.DOREFA, 3, start.scale[None])[0]
    greedy = replace(start, levels=torch.empty_like(levels).scatter_(1, factor.order.expand(64, -1), levels))
    worse = losses(weight, greedy, moments) > losses(weight, start, moments)
    assert 0 < int(worse.sum()) < 32
    end = error_feedback(weight, start, factor, descents=0)
    assert torch.equal(end.levels[worse], start.levels[worse])
    assert torch.equal(end.levels[~worse], greedy.levels[~worse])


@pytest.mark.parametrize("grid", UNIFORM)
def test_white_inputs_give_plain_rounding(grid: Grid) -> None:
    weight = random_rows(6, 40)
    found = uniform_feedback(weight, torch.eye(40), 3, grid=grid)
    start = nearest(weight, 3, grid)
    assert torch.equal(found.levels, start.levels)
    assert torch.equal(found.scale, start.scale)
    assert torch.equal(ternary_feedback(weight, torch.eye(40)).levels, ternary_optimum(weight).levels)


def test_a_permutation_of_columns_commutes() -> None:
    weight, moments = random_rows(6, 33), random_moments(1, 33)[0]
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    for run in (ternary_feedback, lambda w, h: uniform_feedback(w, h, 4)):
        plain, permuted = run(weight, moments), run(weight[:, order].contiguous(), moments[order][:, order])
        assert torch.equal(plain.levels[:, order], permuted.levels)
        torch.testing.assert_close(plain.scale, permuted.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("groups", "rows", "length"), [(3, 4, 18), (40, 1, 9), (40, 1, 25)], ids=["grouped", "3x3", "5x5"]
)
def test_groups_of_a_convolution_equal_a_loop(groups: int, rows: int, length: int) -> None:
    weight, moments = random_rows(groups * rows, length), random_moments(groups, length)
    for run in (ternary_feedback, lambda w, h: uniform_feedback(w, h, 4)):
        whole = run(weight, moments)
        parts = [run(part, moments[g]) for g, part in enumerate(weight.split(rows))]
        assert torch.equal(whole.levels, torch.cat([part.levels for part in parts]))
        torch.testing.assert_close(whole.scale, torch.cat([part.scale for part in parts]), rtol=1e-5, atol=0)


def test_rows_of_zeros_stay_zero_beside_others() -> None:
    weight, moments = random_rows(4, 20), random_moments(1, 20)
    weight[1] = 0.0
    for found in (ternary_feedback(weight, moments), uniform_feedback(weight, moments, 4)):
        assert found.scale[1].item() == 0.0
        assert values_of(found)[1].abs().max() == 0.0
        assert values_of(found).isfinite().all()


def test_one_column_is_rounded_to_nearest() -> None:
    weight = random_rows(5, 1)
    found = uniform_feedback(weight, torch.tensor([[2.0]]), 4)
    torch.testing.assert_close(values_of(found), weight)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf], ids=["zero", "nan", "inf"])
def test_useless_moments_give_plain_rounding_and_a_reason(value: float) -> None:
    weight = random_rows(6, 10)
    moments = random_moments(3, 10)
    moments[1] = value
    found, start = uniform_feedback(weight, moments, 4), nearest(weight, 4, Grid.DOREFA)
    assert found.fallback.startswith("1 of 3 groups: the input's second moments are zero, not finite")
    assert torch.equal(found.levels[2:4], start.levels[2:4])
    assert torch.equal(found.levels[:2], uniform_feedback(weight[:2], moments[0], 4).levels)
    assert found.damp == 0.01
    alone = uniform_feedback(weight[2:4], moments[1], 4)
    assert (alone.damp, alone.fallback[:16]) == (0.0, "the input's seco")


def test_an_indefinite_matrix_gets_more_damping_and_the_others_do_not() -> None:
    good, bad = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    bad[0, 1] = bad[1, 0] = 1.05
    found = factorise(torch.stack([good, bad]), 0.01, "falling")
    assert found.damp == pytest.approx(0.1)
    assert found.ridge.tolist() == pytest.approx([0.01, 0.1])
    assert found.fallback == ""


def test_a_matrix_that_stays_indefinite_gives_plain_rounding_and_a_reason() -> None:
    moments, weight = torch.eye(6), random_rows(3, 6)
    moments[0, 1] = moments[1, 0] = 20.0
    found, start = ternary_feedback(weight, moments), ternary_optimum(weight)
    assert found.fallback.endswith("not positive definite: rounded to nearest")
    assert torch.equal(found.levels, start.levels)
    assert torch.equal(found.scale, start.scale)


def test_the_factor_is_that_of_the_ordered_matrix() -> None:
    moments = random_moments(2, 9)
    found = factorise(moments, 0.01, "falling")
    for b in range(2):
        ordered = moments[b][found.order[b]][:, found.order[b]]
        assert (ordered.diagonal().diff() <= 0).all()
        damped = ordered + 0.01 * ordered.diagonal().mean() * torch.eye(9)
        upper = found.upper[b].double()
        assert torch.equal(upper, upper.triu())
        pivots = torch.linalg.solve_triangular(upper, damped, upper=True) @ torch.linalg.inv(upper).mT
        torch.testing.assert_close(pivots, pivots.diagonal().diag(), rtol=1e-4, atol=1e-5)


def test_a_factor_serves_many_weights() -> None:
    moments = random_moments(1, 20)
    factor = factorise(moments, 0.01, "falling")
    assert isinstance(factor, Factor)
    for seed in range(3):
        weight = random_rows(4, 20, seed)
        assert torch.equal(ternary_feedback(weight, factor).levels, ternary_feedback(weight, moments).levels)


def test_rows_beyond_the_limit_are_rounded_to_nearest_without_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfmpc.compress.feedback.MAX_FEEDBACK", 16)
    weight = random_rows(3, 17)
    found = uniform_feedback(weight, random_moments(1, 17), 4)
    assert found.fallback == "rows of 17 are longer than error feedback takes (16)"
    assert torch.equal(found.levels, nearest(weight, 4, Grid.DOREFA).levels)
    assert MAX_FEEDBACK == 8192


def test_moments_that_do_not_fit_are_refused_with_their_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 9, 9\) do not fit rows of shape \(4, 10\)"):
        ternary_feedback(random_rows(4, 10), random_moments(1, 9))
    with pytest.raises(ValueError, match=r"\(3, 10, 10\) do not fit rows of shape \(4, 10\)"):
        ternary_feedback(random_rows(4, 10), random_moments(3, 10))


@pytest.mark.parametrize("grid", UNIFORM)
def test_several_scales_lose_less_than_the_one_of_least_squared_error(grid: Grid) -> None:
    weight, moments = random_rows(48, 72), random_moments(1, 72)
    one, several = (
        losses(weight, uniform_feedback(weight, moments, 3, options, grid=grid), moments)
        for options in (FeedbackOptions(coarse_starts=(1.0,)), FeedbackOptions())
    )
    assert (several <= one * (1 + 1e-5)).all()
    assert several.sum() < 0.97 * one.sum()


def test_starts_of_a_large_layer_are_tried_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = random_rows(16, 48), random_moments(1, 48)
    for run in (ternary_feedback, lambda w, h: uniform_feedback(w, h, 3)):
        monkeypatch.setattr(feedback, "TOGETHER", 2**23)
        together = run(weight, moments)
        monkeypatch.setattr(feedback, "TOGETHER", 1)
        alone = run(weight, moments)
        assert torch.equal(alone.levels, together.levels)
        torch.testing.assert_close(alone.scale, together.scale)
