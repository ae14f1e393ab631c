from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dfmpc.errors import FactoryError, UsageError
from dfmpc.job.sources import ModelSource
from dfmpc.models import factory
from dfmpc.models.factory import AllowList

CODE = """
import os
import torch
from functools import partial
from pathlib import Path

Path(__file__).with_suffix(".ran").touch()


class Nets:
    @staticmethod
    def linear(inputs, outputs=2):
        return torch.nn.Linear(inputs, outputs)


def fails():
    raise ValueError("no such size")


def number():
    return 3


constant = 3
two_out = partial(Nets.linear, outputs=2)
borrowed = partial(os.mkdir, mode=0o700)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mynets_test.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("mynets_test", None)


def test_prefixes_match_on_dotted_boundaries() -> None:
    allow = AllowList.default(["mine.nets"])
    assert allow.allows("torchvision.models:resnet18")
    assert allow.allows("torchvision.models.resnet:resnet18")
    assert allow.allows("timm:create_model")
    assert allow.allows("mine.nets.deep:net")
    assert not allow.allows("mine:net")
    assert not allow.allows("mine.netsuite:net")
    assert not allow.allows("torchvision.models_evil:net")
    assert not allow.allows("torchvision:models.resnet18")
    assert not allow.allows("os:system")


def test_the_environment_adds_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFMPC_ALLOW_CODE", f"one.two, {folder}")
    allow = AllowList.default()
    assert allow.allows("one.two:f")
    assert allow.allows("mynets_test:number")
    assert not allow.allows("os:system")
    assert not allow.allows("..mynets_test:number")


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone: no such folder; give an existing folder or a module prefix"):
        AllowList.default([str(tmp_path / "gone")])


def test_nothing_runs_before_it_is_allowed(folder: Path, make_source: Callable[..., ModelSource]) -> None:
    source = make_source(factory="mynets_test:Nets.linear", args=[3])
    sys.path.insert(0, str(folder))
    with pytest.raises(FactoryError, match=r"'mynets_test:Nets.linear' is not on the allow-list .*--allow-code"):
        AllowList.default().build(source)
    assert not (folder / "mynets_test.ran").exists()
    module = AllowList.default([str(folder)]).build(source)
    assert (folder / "mynets_test.ran").exists()
    assert isinstance(module, torch.nn.Linear)


def test_arguments_reach_the_factory(folder: Path, make_source: Callable[..., ModelSource]) -> None:
    source = make_source(factory="mynets_test:Nets.linear", args=[3], kwargs={"outputs": 7})
    module = AllowList.default([str(folder)]).build(source)
    assert isinstance(module, torch.nn.Linear)
    assert module.weight.shape == (7, 3)


@pytest.mark.parametrize(
    ("factory", "home"),
    [
        ("mynets_test:os.mkdir", "posix"),
        ("mynets_test:borrowed", "posix"),
        ("mynets_test:torch.hub.load", "torch.hub"),
    ],
)
def test_what_an_allowed_module_only_imports_does_not_run(
    folder: Path, make_source: Callable[..., ModelSource], factory: str, home: str
) -> None:
    made = folder / "made"
    source = make_source(factory=factory, args=[str(made)])
    with pytest.raises(FactoryError, match=rf"is defined in {home}, which is not on the allow-list .*--allow-code"):
        AllowList.default([str(folder)]).build(source)
    assert not made.exists()


def test_what_torchvision_only_imports_does_not_run(
    torchvision_models: ModuleType, make_source: Callable[..., ModelSource]
) -> None:
    source = make_source(factory=f"{torchvision_models.__name__}:resnet.torch.load", args=["weights.pt"])
    with pytest.raises(FactoryError, match=r"is defined in torch.serialization, which is not on the allow-list"):
        AllowList.default().build(source)


def test_a_partial_of_an_allowed_function_runs(folder: Path, make_source: Callable[..., ModelSource]) -> None:
    module = AllowList.default([str(folder)]).build(make_source(factory="mynets_test:two_out", args=[3]))
    assert module.weight.shape == (2, 3)


def test_the_allow_list_needs_no_torch() -> None:
    code = "import sys, dfmpc.commands.options, dfmpc.models.factory, dfmpc.run.scheduler"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("mynets_test:fails", "failed: ValueError: no such size; check its args and kwargs"),
        ("mynets_test:number", "gave a int; expected a torch.nn.Module"),
        ("mynets_test:constant", "is not callable"),
        ("mynets_test:absent", "mynets_test has no function absent; correct the name"),
        ("mynets_test:numbr", "mynets_test has no function numbr; did you mean number?"),
        ("mynets_test:Nets.liner", "Nets has no function liner; did you mean linear?"),
        ("timm.no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_failures_name_the_factory(
    folder: Path, make_source: Callable[..., ModelSource], factory: str, said: str
) -> None:
    with pytest.raises(FactoryError) as caught:
        AllowList.default([str(folder)]).build(make_source(factory=factory))
    assert factory in str(caught.value)
    assert said in str(caught.value)


def test_messages_show_how_to_allow_code(make_source: Callable[..., ModelSource]) -> None:
    with pytest.raises(FactoryError) as refused:
        AllowList.default().build(make_source(factory="faraway_nets.small:net"))
    assert "--allow-code FOLDER_OR_MODULE (from Python allow_code=[…], or DFMPC_ALLOW_CODE, comma" in str(refused.value)
    with pytest.raises(FactoryError, match=r"give --allow-code the folder that holds faraway_nets.py or faraway_nets/"):
        AllowList.default(["faraway_nets"]).build(make_source(factory="faraway_nets.small:net"))


def test_distribution_version(folder: Path) -> None:
    allow = AllowList.default([str(folder)])
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert allow.distribution_version("mynets_test:number") == f"sha256:{digest}"
    assert allow.distribution_version("torch.nn:Linear") == f"torch=={torch.__version__}"
    assert allow.distribution_version("no_such_module_here:f") == "unknown"
    assert not (folder / "mynets_test.ran").exists()


def test_the_installed_distributions_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a tenth of a second, and is asked for every model."""
    real, asked = factory.importlib.metadata.packages_distributions, []

    def counted() -> object:
        asked.append(True)
        return real()

    monkeypatch.setattr(factory.importlib.metadata, "packages_distributions", counted)
    factory._distributions.cache_clear()
    found = {AllowList.default().distribution_version(f"torch.nn:{name}") for name in ("Linear", "Conv2d")}
    assert (found, len(asked)) == ({f"torch=={importlib.metadata.version('torch')}"}, 1)
