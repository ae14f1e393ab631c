"""The re-solve of a layer: its normal equations, what it minimises, and the paper's c as its diagonal case."""

from __future__ import annotations

import pytest
import torch
from dfmpc.compress.calibrate import InputMoments
from dfmpc.compress.least_squares import resolve
from dfmpc.models.graph import Layer, Op
from torch import Tensor

DENSE = Layer("c", "c.weight", None, Op.CONV, (4, 3, 2, 1))
GROUPED = Layer("c", "c.weight", None, Op.CONV, (4, 3, 2, 1), groups=2)


def drawn(layer: Layer, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Centred inputs h [groups, M, K], targets t [groups, M, out / groups], and a weight [out, K]."""
    generator = torch.Generator().manual_seed(seed)
    groups, rows = layer.groups, layer.out_channels // layer.groups
    h = torch.randn(groups, 200, layer.length, generator=generator) @ torch.randn(
        groups, layer.length, layer.length, generator=generator
    )
    t = torch.randn(groups, 200, rows, generator=generator)
    weight = torch.randn(layer.out_channels, layer.length, generator=generator)
    t = t + h @ weight.view(groups, rows, -1).transpose(1, 2)
    return h - h.mean(1, keepdim=True), t - t.mean(1, keepdim=True), weight


def moments(h: Tensor, t: Tensor) -> InputMoments:
    return InputMoments(h.transpose(1, 2) @ h / h.shape[1], t.transpose(1, 2) @ h / h.shape[1])


def test_two_inputs_by_hand() -> None:
    """H = [[2, 1], [1, 2]], W = [1, 0], Cov(t, h) = [3, 3]: R = [1, 2]; with δ = 0.5 the matrix is [[3, 1], [1, 3]].

    Its inverse is [[3, -1], [-1, 3]] / 8, so the step is [1, 5] / 8.
    """
    layer = Layer("c", "c.weight", None, Op.CONV, (1, 2, 1, 1))
    given = InputMoments(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.tensor([[[3.0, 3.0]]]))
    found = resolve(torch.tensor([[1.0, 0.0]]), layer, given, delta=0.5)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([[1.125, 0.625]]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layer", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_without_damping_the_residual_is_orthogonal_to_the_inputs(layer: Layer) -> None:
    h, t, weight = drawn(layer)
    found = resolve(weight, layer, moments(h, t), delta=0.0)
    assert found is not None
    residual = t - h @ found.view(layer.groups, -1, layer.length).transpose(1, 2)
    correlation = (residual.transpose(1, 2) @ h / 200).abs().max()
    assert float(correlation) < 1e-4 * float((t.transpose(1, 2) @ h / 200).abs().max())


@pytest.mark.parametrize("layer", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_the_damped_objective_is_least_there(layer: Layer) -> None:
    """E‖t − W h‖² + δ mean(diag H) ‖W − W₀‖² rises in every direction, and its gradient vanishes."""
    h, t, start = drawn(layer)
    given = moments(h, t)
    found = resolve(start, layer, given, delta=0.1)
    assert found is not None
    penalty = 0.1 * given.second.diagonal(dim1=1, dim2=2).mean(1).double()

    def objective(weight: Tensor) -> Tensor:
        grouped, from_start = (part.double().view(layer.groups, -1, layer.length) for part in (weight, weight - start))
        error = (t.double() - h.double() @ grouped.transpose(1, 2)).square().sum((1, 2)) / 200
        return (error + penalty * from_start.square().sum((1, 2))).sum()

    weight = found.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(weight), weight)
    assert float(gradient.abs().max()) < 1e-3
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        step = 0.05 * torch.randn(found.shape, generator=generator)
        assert float(objective(found + step)) > float(objective(found))
    assert float(objective(found)) < float(objective(start))


def test_a_layer_that_gives_what_is_wanted_stays_as_it_is() -> None:
    h, _, weight = drawn(DENSE)
    found = resolve(weight, DENSE, moments(h, h @ weight.T))
    assert found is not None
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)


def test_the_papers_c_is_the_diagonal_case() -> None:
    """Pointwise HIGH layer, inputs uncorrelated, LOW's ternary rows with gain g: the re-solve is one factor a channel.

    c minimises E(c x̂ − x)², the objective of the paper's equation without its bias term: c = ⟨x̂, x⟩ / ‖x̂‖².
    """
    layer = Layer("high", "high.weight", None, Op.CONV, (3, 4, 1, 1))
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    dot, norm = torch.tensor([0.9, 1.1, 0.7, 1.3]), torch.tensor([1.5, 0.8, 0.9, 2.0])
    c = dot / norm
    cross = weight * dot  # t = Σ w_i x_i, Cov(t, x̂_i) = w_i ⟨x_i, x̂_i⟩
    found = resolve(weight, layer, InputMoments(torch.diag(norm)[None], cross[None]), delta=0.0)
    assert found is not None
    torch.testing.assert_close(found, weight * c, rtol=1e-6, atol=1e-6)


def test_where_the_target_is_unknown_nothing_is_solved() -> None:
    h, t, weight = drawn(DENSE)
    assert resolve(weight, DENSE, InputMoments(moments(h, t).second)) is None


@pytest.mark.parametrize("spoiled", ["indefinite", "zero", "nan"])
def test_a_matrix_without_factor_solves_nothing(spoiled: str) -> None:
    h, t, weight = drawn(DENSE)
    given = moments(h, t)
    assert given.cross is not None
    broken = {
        "indefinite": given.second - 100 * torch.eye(6),
        "zero": torch.zeros_like(given.second),
        "nan": given.second * float("nan"),
    }[spoiled]
    assert resolve(weight, DENSE, InputMoments(broken, given.cross)) is None


def test_a_single_group_without_factor_leaves_the_whole_layer() -> None:
    h, t, weight = drawn(GROUPED)
    given = moments(h, t)
    second = given.second.clone()
    second[1] = 0
    assert resolve(weight, GROUPED, InputMoments(second, given.cross)) is None
