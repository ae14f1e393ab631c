"""Networks for the tests of dfmpc.models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList


@pytest.fixture(scope="session")
def make_source() -> Callable[..., ModelSource]:
    """Return the function that makes a source of some fields."""

    def source(**fields: object) -> ModelSource:
        return ModelSource.model_validate({"name": "net", **fields})

    return source


@pytest.fixture(scope="session")
def torchvision_models(project: Path) -> ModuleType:
    """Return torchvision.models (as the benches import it), or skip."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (extra 'vision')")
    file = project / "scripts" / "torchvision_beside_cpu_torch.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.torchvision_models()


@pytest.fixture(scope="session")
def builtin_allow() -> AllowList:
    """Return the allow-list without additions."""
    return AllowList.default()
