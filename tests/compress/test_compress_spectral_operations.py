"""Every operation gives H of the right size and finite statistics, known to the spectral model or not."""

from __future__ import annotations

import pytest
import torch
from dfmpc.compress.rows import to_rows
from dfmpc.compress.spectral.calibrator import SpectralMoments
from dfmpc.compress.spectral.torus import torus
from dfmpc.models.capture import capture
from torch import Tensor, nn


class Gated(nn.Module):
    """Max pool, squeeze and excite, SiLU, concatenation, a spatial pad and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.pad = nn.ZeroPad2d(1)
        self.behind, self.behind_norm = nn.Conv2d(16, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.up, self.up_norm = nn.ConvTranspose2d(6, 6, 2, 2), nn.BatchNorm2d(6)
        self.head, self.head_norm = nn.Linear(6 * 64, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = torch.cat([nn.functional.silu(x), x.abs()], 1)
        x = self.behind_norm(self.behind(self.pad(x)))
        x = torch.relu(self.up_norm(self.up(x)))
        return self.head_norm(self.head(x.flatten(1)))


class Tokens(nn.Module):
    """A one-dimensional convolution and a linear layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.two = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.norm(self.one(x))))


@pytest.mark.parametrize(
    ("module", "shape"), [(Gated(), (1, 3, 16, 16)), (Tokens(), (1, 4, 12))], ids=["gated", "tokens"]
)
def test_unchanged_weights_leave_statistics_unchanged(module: nn.Module, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    graph = capture(module.eval().requires_grad_(False), shape)
    state = {
        name: (0.5 + torch.rand(value.shape, generator=generator) if "var" in name else value)
        for name, value in module.state_dict().items()
    }
    moments = SpectralMoments(graph, lambda name: state[name].double())
    for node in graph.nodes:
        if node.layer is not None:
            layer = node.layer
            H = moments.input_moments(node)
            assert H.shape == (layer.groups, layer.length, layer.length)
            assert bool(torch.isfinite(H).all())
            rows = to_rows(state[layer.weight], layer)
            moments.through_layer(node, rows, rows, state[layer.bias] if layer.bias else None)
        elif node.norm is not None:
            found = moments.restate(node)
            assert torch.equal(found.mean, state[node.norm.running_mean].double())
            assert torch.equal(found.variance, state[node.norm.running_var].double())
        else:
            moments.propagate(node)


@pytest.mark.parametrize("sides", [(4, 4), (8, 2), (1, 6), (1, 1)], ids=str)
def test_covariance_and_spectrum_are_inverse(sides: tuple[int, int]) -> None:
    grid = torus(*sides)
    generator = torch.Generator().manual_seed(1)
    ahead, behind = (torch.randn(len(grid.points), 3, 2, generator=generator) for _ in range(2))
    alone = grid.pairs == 1
    behind[alone] = ahead[alone]
    spectrum = grid.spectrum(ahead, behind)
    torch.testing.assert_close(grid.covariance(spectrum), ahead, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grid.covariance(spectrum, -grid.points), behind, rtol=1e-5, atol=1e-5)
