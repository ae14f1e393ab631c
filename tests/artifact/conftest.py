from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from dfmpc.artifact.key import TaskKey, task_key
from dfmpc.artifact.manifest import Manifest
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.compress.rows import to_rows
from dfmpc.job.methods import RtnPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.kernels import Grid, Quantized, ternary, uniform
from dfmpc.models.capture import export_program
from dfmpc.models.graph import Graph, Layer, Op
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

LAYERS = (
    Layer("conv", "conv.weight", "conv.bias", Op.CONV, (6, 5, 3, 3)),
    Layer("depthwise", "depthwise.weight", None, Op.CONV, (5, 1, 3, 3), 5),
    Layer("grouped", "grouped.weight", None, Op.CONV, (6, 3, 3, 3), 2),
    Layer("transposed", "transposed.weight", None, Op.CONV_TRANSPOSE, (4, 3, 2, 2), 2),
    Layer("line", "line.weight", None, Op.CONV, (7, 3, 5)),
    Layer("head", "head.weight", "head.bias", Op.LINEAR, (9, 13)),
)


def six_layers() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(5, 6, 3),
            "norm": nn.BatchNorm2d(6),
            "depthwise": nn.Conv2d(5, 5, 3, groups=5, bias=False),
            "grouped": nn.Conv2d(6, 6, 3, groups=2, bias=False),
            "transposed": nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
            "line": nn.Conv1d(3, 7, 5, bias=False),
            "head": nn.Linear(13, 9),
        }
    )


def quantize(weight: Tensor, layer: Layer, grid: Grid, bits: int, granularity: str) -> Quantized:
    rows = to_rows(weight.float(), layer)
    size = int(granularity.removeprefix("group:")) if granularity.startswith("group") else rows.shape[1]
    size, layer_wise = min(size, rows.shape[1]), granularity == "tensor"
    if grid is Grid.TERNARY:
        return ternary(rows, group_size=size, layer_wise=layer_wise)
    return uniform(rows, bits, grid, group_size=size, layer_wise=layer_wise)


@dataclass(frozen=True)
class Example:
    """A network with its compression, ready to be written."""

    model: LoadedModel
    compressed: Compressed
    task: Task
    key: TaskKey = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", task_key(self.task, ["d" * 64], distribution="zoo==1.0"))

    def write(self, folder: Path) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        return write_artifact(folder, model=self.model, compressed=self.compressed, task=self.task, key=self.key)


Make = Callable[..., Example]


@pytest.fixture
def make() -> Make:
    """Return a function that compresses a network of six layers (or the given one)."""

    def build(
        grid: Grid = Grid.SYMMETRIC,
        bits: int = 4,
        granularity: str = "channel",
        *,
        module: nn.Module | None = None,
        layers: Sequence[Layer] = LAYERS,
        input_scale: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        factory: str = "zoo:make",
    ) -> Example:
        torch.manual_seed(5)
        module = (module or six_layers()).eval()
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
        quantized = tuple(
            QuantizedLayer(
                layer,
                "unpaired",
                granularity,
                quantize(state[layer.weight], layer, grid, bits, granularity),
                (input_scale or {}).get(layer.name),
            )
            for layer in layers
        )
        corrected = {k: v.float() + 0.25 for k, v in state.items() if k.endswith("running_mean")}
        source = ModelSource(name="net", factory=factory, checkpoint="/x/net.pth", input=[1, 5, 8, 8])
        plan = RtnPlan(name="plan", method="rtn", bits=bits, granularity=granularity)
        model = LoadedModel(
            source=source,
            module=module,
            graph=Graph(()),
            state=state,
            input_shape=(1, 5, 8, 8),
            checkpoint_bytes=1000,
            exported=export_program(nn.Identity(), (1, 5, 8, 8)),
        )
        return Example(model, Compressed(quantized, corrected, {}), Task(id="net/plan", model=source, plan=plan))

    return build


@contextmanager
def limit_files(size: int) -> Iterator[None]:
    """Let the system refuse (EFBIG) to make a file larger than ``size``; Python ignores the signal that comes along."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context manager: within it no file can grow past so many bytes."""
    return limit_files
