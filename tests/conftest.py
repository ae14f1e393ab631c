"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from safetensors.torch import save_file
from torch import Tensor

# Triton reads this when it is first imported and decorates every kernel accordingly, so it is set before any test
# module imports dfmpc.kernels. With a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, however long drawing them takes: who changes something else is not to meet a new one.
hypothesis_settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let what a test draws without a seed of its own not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project() -> Path:
    """Return the project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with pretrained networks and images, or skip."""
    folder = Path(os.environ.get("DFMPC_SHARED", ROOT.parent / "shared"))
    if not (folder / "models" / "cifar_models.py").is_file():
        pytest.skip(f"needs the shared networks and images: {folder} is absent (set DFMPC_SHARED)")
    return folder


NETWORKS = ROOT / "tests" / "networks"


@dataclass(frozen=True)
class Bench:
    """A folder with tiny networks and jobs over them; see tests/networks/tiny_networks.py."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def state(self, factory: str = "plain", *args: int, seed: int = 0) -> dict[str, Tensor]:
        """Return a seeded state dict whose BatchNorm statistics look trained."""
        spec = importlib.util.spec_from_file_location("tiny_networks", NETWORKS / "tiny_networks.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(seed)
        state: dict[str, Tensor] = getattr(module, factory)(*args).state_dict()
        for name, tensor in state.items():
            if name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
        return state

    def checkpoint(self, name: str, state: dict[str, Tensor]) -> str:
        """Save ``state`` as ``<name>.safetensors`` and return the file's name."""
        save_file(state, self.folder / f"{name}.safetensors")
        return f"{name}.safetensors"

    def model(self, name: str, factory: str = "plain", *args: int | str, checkpoint: str = "") -> dict[str, object]:
        """Return a model of a job; without ``checkpoint`` one is made that fits the network ``plain``."""
        file = checkpoint or self.checkpoint(name, self.state())
        return {
            "name": name,
            "factory": f"tiny_networks:{factory}",
            "args": list(args),
            "checkpoint": file,
            "input": [1, 3, 16, 16],
        }

    def job(self, models: list[dict[str, object]], plans: list[dict[str, object]], **fields: object) -> Path:
        """Write a job file over ``models`` and ``plans``."""
        content = {"version": 1, "name": "bench", "output": str(self.store), "models": models, "bit_plans": plans}
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump({**content, **fields}))
        return file


@pytest.fixture(scope="session")
def make_bench() -> Callable[[Path], Bench]:
    """Return what makes a bench of a folder, for fixtures that outlive one test."""
    return Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return an empty bench whose networks are on the allow-list of this process and its children."""
    monkeypatch.setenv("DFMPC_ALLOW_CODE", str(NETWORKS))
    return Bench(tmp_path)
