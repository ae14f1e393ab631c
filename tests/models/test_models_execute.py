"""A captured program run node by node gives what the network gives, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from dfmpc.errors import UnsupportedModelError
from dfmpc.models.capture import capture_program, export_program
from dfmpc.models.execute import Executor
from dfmpc.models.graph import Op
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional


class Mixed(nn.Module):
    """In-place activations, a pool with indices, a view with the batch in it, a slice of channels, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.tied = nn.Linear(8, 8)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norm(self.conv(x)))
        x, _ = functional.max_pool2d_with_indices(x, 2)
        x = x + functional.softmax(x, 1) * x[:, :1].sigmoid()
        x = self.tied(self.tied(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.fc(x.contiguous().view(x.shape[0], -1))


class Windows(nn.Module):
    """Sizes of the batch in views, a token for every image, an axis before the batch, and tensors made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.token = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        windows = x.view(x.size(0), 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        x = functional.softmax(windows, 1).reshape(x.size(0), 64, 8)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).transpose(0, 1)
        x = x * torch.arange(8, dtype=x.dtype, device=x.device) + torch.ones(8, device=x.device).to(x.device)
        return self.fc(x.mean(0))


class AcrossTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sum(0)


def run(module: nn.Module, shape: tuple[int, ...], images: Tensor) -> tuple[Tensor, int]:
    """Execute ``module`` exported for ``shape`` on ``images``; return the output and how many nodes there were."""
    return execute(export_program(module.eval(), shape), images)


def execute(program: ExportedProgram, images: Tensor, device: str = "cpu") -> tuple[Tensor, int]:
    graph = capture_program(program)
    executor = Executor(program, program.state_dict, graph, device)
    values: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op is Op.INPUT:
            values[node.name] = images.clone()
        elif node.op is not Op.OUTPUT:
            values[node.name] = executor.run(node, values)
    return values[executor.source(graph.nodes[-1])], len(graph.nodes)


@pytest.mark.parametrize("exported", [1, 2, 6])
def test_the_program_runs_on_any_multiple_of_its_batch(exported: int) -> None:
    torch.manual_seed(0)
    module, images = Mixed().requires_grad_(False), torch.randn(6, 3, 8, 8)
    found, nodes = run(module, (exported, 3, 8, 8), images)
    assert nodes > 10
    torch.testing.assert_close(found, module(images), rtol=1e-5, atol=1e-5)


def test_a_replaced_tensor_takes_its_place_wherever_it_is_used() -> None:
    module = Mixed().eval().requires_grad_(False)
    program = export_program(module, (1, 3, 8, 8))
    graph = capture_program(program)
    executor = Executor(program, dict(module.state_dict()), graph)
    executor.replace("tied.weight", torch.zeros(8, 8))
    linears = [node for node in graph.nodes if node.layer is not None and node.layer.name == "tied"]
    assert len(linears) == 2
    for node in linears:
        result = executor.run(node, {executor.source(node): torch.randn(3, 4, 4, 8)})
        torch.testing.assert_close(result, module.tied.bias.expand(3, 4, 4, 8))


def test_an_operation_across_the_batch_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not treat its images one by one.*calibrator: analytic"):
        run(AcrossTheBatch(), (1, 4), torch.randn(3, 4))


def with_dynamic_batch(module: nn.Module) -> ExportedProgram:
    return export(module.eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch")},), strict=False)


@pytest.mark.parametrize("module", [Mixed, Windows])
@pytest.mark.parametrize("images", [1, 5])
def test_a_program_with_a_dynamic_batch_runs_on_any_batch(module: type[nn.Module], images: int) -> None:
    torch.manual_seed(0)
    network, pictures = module().requires_grad_(False), torch.randn(images, 3, 8, 8)
    found, _ = execute(with_dynamic_batch(network), pictures)
    torch.testing.assert_close(found, network(pictures), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_tensors_made_on_the_way_lie_on_the_device_that_is_asked_for(dynamic: bool) -> None:
    """Meta tensors, like those of a GPU, do not mix with the CPU's."""
    network = Windows().requires_grad_(False)
    program = with_dynamic_batch(network) if dynamic else export_program(network.eval(), (4, 3, 8, 8))
    found, _ = execute(program, torch.zeros(4, 3, 8, 8, device="meta"), "meta")
    assert (found.device.type, found.shape) == ("meta", (4, 5))
