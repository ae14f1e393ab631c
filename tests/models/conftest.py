"""Networks for the tests of dfmpc.models."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from dfmpc.job.expand import ModelSource
from dfmpc.models.factory import AllowList


@pytest.fixture(scope="session")
def make_source() -> Callable[..., ModelSource]:
    """Return the function that makes a source of some fields."""

    def source(**fields: object) -> ModelSource:
        return ModelSource.model_validate({"name": "net", **fields})

    return source


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """Return torchvision.models, or skip.

    PyPI's torchvision is built for a CUDA torch: beside a CPU-only one its C++ operators are absent and its import
    stops at the fake kernels it registers for them. The networks need none of these operators, so the missing schemas
    are defined and the import is tried again.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (extra 'vision')")
    for _ in range(4):
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _LIBRARY.define(f"{missing.group(1)}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")


@pytest.fixture(scope="session")
def builtin_allow() -> AllowList:
    """Return the allow-list without additions."""
    return AllowList.default()
