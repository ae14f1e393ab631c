"""Networks for the tests of dfmpc.models."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from dfmpc.job.expand import ModelSource
from dfmpc.models.factory import AllowList
from torch import nn


def source(**fields: object) -> ModelSource:
    """Return a model's source with a name."""
    return ModelSource.model_validate({"name": "net", **fields})


def conv_norm(inputs: int, outputs: int, kernel: int = 3, activation: nn.Module | None = None) -> list[nn.Module]:
    """Return a convolution that keeps the size, its norm, and its activation."""
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation]


@pytest.fixture(scope="session")
def make_source() -> Callable[..., ModelSource]:
    """Return the function that makes a source of some fields."""
    return source


@pytest.fixture
def small_net() -> nn.Module:
    """Return a plain network of three convolutions and a classifier with lived-in statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *conv_norm(3, 8, activation=nn.ReLU()),
        *conv_norm(8, 8, activation=nn.ReLU()),
        *conv_norm(8, 8, activation=nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    net(torch.randn(16, 3, 8, 8))
    return net.eval()


@pytest.fixture(scope="session")
def torchvision_models() -> Iterator[ModuleType]:
    """Return torchvision.models, or skip.

    PyPI's torchvision is built for a CUDA torch: beside a CPU-only one its C++ operators are absent and its import
    stops at the fake kernels it registers for them. The networks need none of these operators, so the missing schemas
    are defined and the import is tried again.
    """
    pytest.importorskip("torchvision.version", reason="torchvision is not installed", exc_type=ImportError)
    library = torch.library.Library("torchvision", "FRAGMENT")
    yield _import_torchvision(library)


def _import_torchvision(library: torch.library.Library) -> ModuleType:
    for _ in range(4):
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing.group(1)}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")


@pytest.fixture(scope="session")
def builtin_allow() -> AllowList:
    """Return the allow-list without additions."""
    return AllowList.default()
