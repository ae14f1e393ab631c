"""The spectral model against Monte Carlo on a torus, where circular padding makes the model's geometry exact."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from dfmpc.compress.rows import to_rows
from dfmpc.compress.spectral.calibrator import SpectralMoments
from dfmpc.compress.spectral.options import SpectralOptions
from dfmpc.compress.spectral.torus import Torus
from dfmpc.models.capture import capture
from dfmpc.models.graph import Graph, Op
from torch import Tensor, nn

SIDE, WIDTH, COLOURS = 8, 32, 12
FIELDS = 1500


GAUSSIAN = SpectralOptions(tau=None, exponent=1.0, colour_correlation=0.0, contrast=0.0, independence=0.0)
"""The plain model, with an input of many independent channels: sums behind the ReLUs come near to Gaussian."""


class Residual(nn.Module):
    """conv - norm - relu - conv - norm, plus a projected shortcut, all with circular padding; then a stride of 2."""

    def __init__(self, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(COLOURS, WIDTH, 3, padding=1, padding_mode="circular", bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTH)
        self.one = nn.Conv2d(WIDTH, WIDTH, 3, stride, padding=1, padding_mode="circular", groups=groups, bias=False)
        self.one_norm = nn.BatchNorm2d(WIDTH)
        self.two = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular", bias=False)
        self.two_norm = nn.BatchNorm2d(WIDTH)
        self.short = nn.Conv2d(WIDTH, WIDTH, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.last = nn.Conv2d(WIDTH, 4, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.two_norm(self.two(torch.relu(self.one_norm(self.one(x)))))
        return self.last_norm(self.last(torch.relu(y + self.short(x))))


@dataclass(frozen=True)
class Model:
    graph: Graph
    state: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.state[name].double()


def _model(groups: int = 1, stride: int = 1) -> Model:
    """A network with random weights and norms."""
    module = Residual(groups, stride).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        norm = "norm" in name and "bias" not in name and "mean" not in name
        state[name] = 0.5 + noise.abs() if norm else 0.3 * noise
    return Model(capture(module, (1, COLOURS, SIDE, SIDE)), state)


def _gaussian_images(model: SpectralMoments, seed: int) -> Tensor:
    """Draws of the model's own input prior, float32 [FIELDS, 3, SIDE, SIDE]."""
    field = model.original.fields["x"]
    grid = field.torus
    full = torch.zeros(SIDE, SIDE, COLOURS, COLOURS, dtype=torch.complex64)
    for (y, x), value in zip(grid.points.tolist(), torch.complex(*field.spectrum), strict=True):
        full[y, x], full[-y % SIDE, -x % SIDE] = value, value.conj()
    roots = torch.linalg.cholesky(full + 1e-6 * torch.eye(COLOURS))
    noise = torch.randn(FIELDS, COLOURS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    coloured = torch.einsum("yxij,njyx->niyx", roots, torch.fft.fft2(noise))
    return torch.fft.ifft2(coloured).real


def _rounded(rows: Tensor) -> Tensor:
    step = rows.abs().amax(1, keepdim=True) / 1.5
    return (rows / step).round() * step


def _walk(model: Model, moments: SpectralMoments, quantized: dict[str, Tensor]) -> dict[str, Tensor]:
    """Visit every node; return what was said: H by layer, new statistics by norm tensor."""
    said: dict[str, Tensor] = {}
    for node in model.graph.nodes:
        if node.layer is not None:
            said[node.layer.name] = moments.input_moments(node)
            rows = to_rows(model.state[node.layer.weight], node.layer)
            moments.through_layer(node, rows, to_rows(quantized[node.layer.weight], node.layer), None)
        elif node.norm is not None:
            found = moments.restate(node)
            said[node.norm.running_mean], said[node.norm.running_var] = found.mean, found.variance
        else:
            moments.propagate(node)
    return said


def _gaussian_input(model: Model) -> SpectralMoments:
    return SpectralMoments(model.graph, model.tensor, GAUSSIAN)


def _with_rounded_weights(model: Model) -> dict[str, Tensor]:
    return {
        layer.weight: _rounded(to_rows(model.state[layer.weight], layer)).view(layer.shape)
        for layer in model.graph.layers
    }


@torch.inference_mode()
def _measured(model: Model, images: Tensor, quantized: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``_walk`` says, measured: both networks run with batch statistics, every norm's output at β, γ."""
    said: dict[str, Tensor] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {"x": (images, images)}
    for node in model.graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        if node.layer is not None:
            layer = node.layer
            patches = torch.nn.functional.unfold(inputs[0][1], layer.shape[2:], stride=layer.stride)
            flat = patches.movedim(1, 2).flatten(0, 1).view(-1, layer.groups, layer.length)
            flat = flat - flat.mean(0)
            said[layer.name] = torch.einsum("ngi,ngj->gij", flat, flat) / len(flat)
            weights = model.state[layer.weight], quantized[layer.weight]
            values[node.name] = tuple(
                torch.conv2d(x, w, stride=layer.stride, groups=layer.groups)
                for x, w in zip(inputs[0], weights, strict=True)
            )
        elif node.norm is not None:
            norm = node.norm
            means = [x.mean((0, 2, 3)).double() for x in inputs[0]]
            variances = [x.var((0, 2, 3), correction=0).double() for x in inputs[0]]
            sigma = (model.state[norm.running_var].double() + norm.eps).sqrt()
            shift = (means[1] - means[0]) * sigma / variances[0].sqrt()
            said[norm.running_mean] = model.state[norm.running_mean] + shift
            said[norm.running_var] = model.state[norm.running_var] * variances[1] / variances[0]
            values[node.name] = tuple(
                torch.nn.functional.batch_norm(
                    x, None, None, model.state[norm.weight], model.state[norm.bias], training=True, eps=1e-9
                )
                for x in inputs[0]
            )
        elif node.op is Op.RELU:
            values[node.name] = tuple(torch.relu(x) for x in inputs[0])
        elif node.op is Op.ADD:
            values[node.name] = tuple(a + b for a, b in zip(*inputs, strict=True))
        elif node.op is Op.IDENTITY:
            pad = node.shape[2] - inputs[0][0].shape[2]
            values[node.name] = tuple(
                torch.nn.functional.pad(x, (pad // 2,) * 4, mode="circular") if pad else x for x in inputs[0]
            )
    return said


# In front of the first ReLU values are Gaussian and so is the model exact: what differs is sampling (1500 fields of 64
# correlated positions, 3 %). Behind it a value is a sum of few rectified ones, which the model takes for Gaussian: the
# fewer it sums, the worse, so a depthwise layer is checked in front only.
EXACT, NEARLY = 0.06, 0.15


@pytest.mark.parametrize(
    ("groups", "stride", "checked"),
    [(1, 1, ["two", "last"]), (2, 2, ["two", "short", "last"]), (WIDTH, 1, [])],
    ids=["plain", "grouped-stride2", "depthwise"],
)
def test_moments_agree_with_monte_carlo(groups: int, stride: int, checked: list[str]) -> None:
    model = _model(groups, stride)
    quantized = _with_rounded_weights(model)
    moments = _gaussian_input(model)
    moments.propagate(model.graph.nodes[0])
    measured = _measured(model, _gaussian_images(moments, seed=1), quantized)
    said = _walk(model, _gaussian_input(model), quantized)
    for name, tolerance in [("stem", EXACT), ("one", EXACT), *((name, NEARLY) for name in checked)]:
        assert _distance(said[name], measured[name]) < tolerance, name
    norms = ["stem_norm", "one_norm", *(f"{name}_norm" for name in checked if name != "short")]
    for norm in norms:
        mean, variance = f"{norm}.running_mean", f"{norm}.running_var"
        # In standard deviations, and relative.
        assert float(((said[mean] - measured[mean]) / model.tensor(variance).sqrt()).abs().max()) < 0.1, norm
        assert float((said[variance] / measured[variance] - 1).abs().max()) < 0.1, norm


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative distance of two batches of matrices in the Frobenius norm."""
    return float((one - other).norm() / other.norm())


def test_the_sum_of_branches_needs_their_covariance() -> None:
    """Without the branch-stream covariance the variance behind the addition would be off by more than the tolerance."""
    model = _model()
    moments = _gaussian_input(model)
    for node in model.graph.nodes:
        if node.op is Op.ADD:
            branch, stream = (moments.original.fields[name] for name in node.inputs)
            moments.propagate(node)
            both = moments.original.fields[node.name]
            assert float((both.variance / (branch.variance + stream.variance) - 1).abs().max()) > 0.1
            return
        _visit(model, moments, node, {})


def _visit(model: Model, moments: SpectralMoments, node, quantized: dict[str, Tensor]) -> None:
    if node.layer is not None:
        rows = to_rows(model.state[node.layer.weight], node.layer)
        moments.through_layer(
            node, rows, to_rows(quantized.get(node.layer.weight, model.state[node.layer.weight]), node.layer), None
        )
    elif node.norm is not None:
        moments.restate(node)
    else:
        moments.propagate(node)


@pytest.mark.parametrize("stride", [1, 2])
def test_unchanged_weights_leave_statistics_unchanged(stride: int) -> None:
    model = _model(2, stride)
    same = {layer.weight: model.state[layer.weight] for layer in model.graph.layers}
    said = _walk(model, SpectralMoments(model.graph, model.tensor), same)
    for name in (name for name in said if "running" in name):
        assert torch.equal(said[name], model.state[name].double()), name


def test_channel_permutation_commutes() -> None:
    model = _model()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))
    state = dict(model.state)
    for name in [name for name in state if name.startswith("one_norm.") and state[name].dim() == 1] + ["one.weight"]:
        state[name] = state[name][order]
    state["two.weight"] = state["two.weight"][:, order]
    permuted = Model(model.graph, state)
    said, other = (_walk(m, SpectralMoments(m.graph, m.tensor), _with_rounded_weights(m)) for m in (model, permuted))
    H = said["two"].view(WIDTH, 9, WIDTH, 9)[order][:, :, order].reshape(9 * WIDTH, 9 * WIDTH)
    # float32 sums in another order
    torch.testing.assert_close(other["two"][0], H, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other["last_norm.running_var"], said["last_norm.running_var"], rtol=1e-4, atol=1e-5)


def test_every_field_is_freed_in_the_end() -> None:
    model = _model(1, 2)
    moments = SpectralMoments(model.graph, model.tensor)
    for node in model.graph.nodes:
        _visit(model, moments, node, {})
    assert not moments.original.fields
    assert not moments.quantized.fields


@pytest.mark.parametrize(
    ("sides", "strides"),
    [
        ((8, 8), (2, 2)),
        ((4, 4), (2, 2)),
        ((8, 4), (4, 2)),
        ((4, 4), (4, 1)),
        ((2, 2), (2, 2)),
        # strides that do not divide a side: or that leave three places of one
        ((16, 16), (3, 3)),
        ((16, 12), (5, 3)),
        ((7, 7), (2, 2)),
        ((9, 12), (3, 4)),
        ((1, 16), (1, 3)),
    ],
)
def test_decimation_leaves_no_negative_power(sides: tuple[int, int], strides: tuple[int, int]) -> None:
    grid = Torus(*sides)
    draw = torch.Generator().manual_seed(0)
    factor = torch.complex(*(torch.randn(len(grid.points), 3, 1, generator=draw) for _ in range(2)))
    alone = grid.pairs == 1
    factor[alone] = factor[alone].real.to(factor.dtype)
    origin = torch.zeros(1, 2, dtype=torch.int64)
    # decimation is linear, and every spectrum is a sum of waves of one frequency
    for frequency, wave in enumerate(factor @ factor.mH):
        spectrum = torch.zeros(2, len(grid.points), 3, 3)
        spectrum[:, frequency] = torch.stack((wave.real, wave.imag))
        small, found = grid.decimated(spectrum, strides)
        powers = torch.linalg.eigvalsh(torch.complex(found[0], found[1]))
        assert float(powers.min()) > -1e-5 * float(powers.max())
        there, before = small.covariance(found, origin), grid.covariance(spectrum, origin)
        torch.testing.assert_close(there, before, rtol=1e-4, atol=1e-5)
