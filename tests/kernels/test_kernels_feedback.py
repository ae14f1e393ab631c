"""Rounding with error feedback: a case by hand, the formula written down plainly, launcher against reference."""

from __future__ import annotations

import pytest
import torch
from dfmpc.kernels.feedback import feedback_round_reference, feedback_round_triton
from dfmpc.kernels.formats import Grid
from dfmpc.kernels.grids import grid_steps
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

GRIDS = [(Grid.TERNARY, 2), (Grid.DOREFA, 2), (Grid.DOREFA, 6), (Grid.SYMMETRIC, 3), (Grid.ASYMMETRIC, 8)]


def upper_factor(batch: int, length: int) -> Tensor:
    """V of a random H = V D Vᵀ; moderate, so that no column of the seeds below comes near a tie."""
    generator = torch.Generator().manual_seed(length)
    a = torch.randn(batch, length, 2 * length + 2, generator=generator, dtype=torch.float64)
    lower = torch.linalg.cholesky(a @ a.mT)
    return (lower / lower.diagonal(dim1=1, dim2=2)[:, None]).flip(1, 2).float()


def problem(batch: int, rows: int, length: int, groups: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rows + length)
    scale = torch.rand(batch, rows, groups, generator=generator) * 0.4 + 0.2
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    return {
        "weight": torch.randn(batch, rows, length, generator=generator),
        "factor": upper_factor(batch, length),
        "scale": scale,
        "zero_point": torch.rand(batch, rows, groups, generator=generator) * 5,
        "group": order * groups // length,
    }


def plain(weight: Tensor, factor: Tensor, grid: Grid, bits: int, scale: Tensor, point: Tensor, group: Tensor) -> Tensor:
    """The recurrence in float64, one batch, row and column at a time."""
    steps = grid_steps(grid, bits, scale, point)
    levels = torch.zeros(weight.shape, dtype=torch.uint8)
    for b, row in ((b, row) for b in range(weight.shape[0]) for row in range(weight.shape[1])):
        lost = torch.zeros(weight.shape[2], dtype=torch.float64)
        for k in range(weight.shape[2]):
            step, offset = (t[b, row, group[b, k]].double() for t in (steps.step, steps.offset))
            x = weight[b, row, k].double() + lost[:k] @ factor[b, :k, k].double()
            u = (x / step + offset).round().clamp(steps.low, steps.high)
            lost[k] = weight[b, row, k].double() - (u - offset) * step
            levels[b, row, k] = int(u)
    return levels


def run_both(device: str, grid: Grid, bits: int, case: dict[str, Tensor], grouped: bool) -> tuple[Tensor, Tensor]:
    group = case["group"] if grouped else None
    arguments = (case["weight"], case["factor"], grid, bits, case["scale"], case["zero_point"])
    there = [part.to(device) if isinstance(part, Tensor) else part for part in arguments]
    found = feedback_round_triton(*there, group=None if group is None else group.to(device))
    return found.cpu(), feedback_round_reference(*arguments, group=group)


def test_two_columns_by_hand() -> None:
    # H = [[1, 0.8], [0.8, 1]] has V_01 = H_01 / H_11 = 0.8. Column 0: 0.4 -> 0, lost 0.4. Column 1: 0.4 + 0.8 * 0.4 =
    # 0.72 -> 1, though 0.4 alone would give 0; the loss falls from 0.576 to 0.16 + 0.36 - 2 * 0.8 * 0.24 = 0.136.
    factor = torch.tensor([[[1.0, 0.8], [0.0, 1.0]]])
    weight, scale = torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 1, 1)
    assert feedback_round_reference(weight, factor, Grid.TERNARY, 2, scale).tolist() == [[[1, 2]]]
    assert feedback_round_reference(weight, 0 * factor, Grid.TERNARY, 2, scale).tolist() == [[[1, 1]]]


@pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["one-scale", "five-groups"])
def test_reference_is_the_recurrence(grid: Grid, bits: int, grouped: bool) -> None:
    case = problem(2, 3, 45, groups=5 if grouped else 1)
    found = feedback_round_reference(
        case["weight"], case["factor"], grid, bits, case["scale"], case["zero_point"], group=case["group"]
    )
    expected = plain(
        *(case[n] for n in ("weight", "factor")), grid, bits, case["scale"], case["zero_point"], case["group"]
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 17), (3, 1, 9), (2, 3, 23)], ids=str)
def test_launcher_equals_reference(grid: Grid, bits: int, shape: tuple[int, int, int], device: str) -> None:
    found, expected = run_both(device, grid, bits, problem(*shape), grouped=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["one-scale", "three-groups"])
def test_launcher_equals_reference_beyond_a_block(grouped: bool, device: str) -> None:
    case = problem(1, 2, 133, groups=3 if grouped else 1)
    found, expected = run_both(device, Grid.ASYMMETRIC, 4, case, grouped)
    assert torch.equal(found, expected)


def couplings(batch: int, length: int) -> Tensor:
    """H_jk / H_kk with a diagonal of zeros."""
    a = torch.randn(batch, length, 2 * length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    moments = a @ a.mT
    found = moments / moments.diagonal(dim1=1, dim2=2)[:, None]
    return (found - torch.eye(length)).float()


@pytest.mark.parametrize("grouped", [False, True], ids=["one-scale", "three-groups"])
@pytest.mark.parametrize("shape", [(2, 3, 23), (1, 2, 133)], ids=str)
def test_descent_rounds_each_column_given_all_others(shape: tuple[int, int, int], grouped: bool, device: str) -> None:
    case = problem(*shape, groups=3 if grouped else 1)
    case["factor"] = couplings(shape[0], shape[2])
    start = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    arguments = (case["weight"], case["factor"], Grid.DOREFA, 3, case["scale"], None)
    found = feedback_round_reference(*arguments, group=case["group"] if grouped else None, start=start)
    assert torch.equal(found, plain_descent(case, start, 3))
    there = [part.to(device) if isinstance(part, Tensor) else part for part in arguments]
    group = case["group"].to(device) if grouped else None
    assert torch.equal(feedback_round_triton(*there, group=group, start=start.to(device)).cpu(), found)


def plain_descent(case: dict[str, Tensor], start: Tensor, bits: int) -> Tensor:
    """A pass over DoReFa levels in float64, one batch, row and column at a time."""
    levels, top = start.clone(), 2**bits - 1
    for b, row in ((b, row) for b in range(start.shape[0]) for row in range(start.shape[1])):
        scale = case["scale"][b, row, case["group"][b]].double()
        weight, factor = case["weight"][b, row].double(), case["factor"][b].double()
        for k in range(start.shape[2]):
            lost = weight - scale * (2 * levels[b, row].double() / top - 1)
            x = weight[k] + lost @ factor[:, k]
            levels[b, row, k] = int(((x / scale[k] + 1) * top / 2).round().clamp(0, top))
    return levels


@pytest.mark.parametrize(("grid", "middle"), [(Grid.TERNARY, 1), (Grid.SYMMETRIC, 4)])
@pytest.mark.parametrize("grouped", [False, True], ids=["one-scale", "one-group"])
def test_a_scale_of_zero_gives_zeros_and_no_nan(grid: Grid, middle: int, grouped: bool, device: str) -> None:
    case = problem(1, 3, 11)
    case["scale"][0, 1], case["weight"][0, 1] = 0.0, 0.0
    found, expected = run_both(device, grid, 3, case, grouped)
    assert found[0, 1].tolist() == [middle] * 11
    assert torch.equal(found, expected)


def test_batches_equal_a_loop() -> None:
    case = problem(4, 2, 25)
    whole = feedback_round_reference(case["weight"], case["factor"], Grid.DOREFA, 4, case["scale"])
    for b in range(4):
        part = (case[name][b : b + 1] for name in ("weight", "factor", "scale"))
        weight, factor, scale = part
        assert torch.equal(whole[b : b + 1], feedback_round_reference(weight, factor, Grid.DOREFA, 4, scale))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    case = problem(1, 2, 5)
    with pytest.raises(ValueError, match=r"factor has shape \(1, 5, 4\)"):
        feedback_round_reference(case["weight"], case["factor"][:, :, :4], Grid.TERNARY, 2, case["scale"])
    with pytest.raises(ValueError, match=r"scale has shape \(1, 2, 3\)"):
        feedback_round_reference(case["weight"], case["factor"], Grid.TERNARY, 2, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="float64"):
        feedback_round_reference(case["weight"].double(), case["factor"], Grid.TERNARY, 2, case["scale"])
    with pytest.raises(ValueError, match="zero_point"):
        feedback_round_reference(case["weight"], case["factor"], Grid.ASYMMETRIC, 4, case["scale"])
