from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dfmpc.errors import CheckpointError, MismatchError, NonFiniteError, UnsupportedModelError
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.graph import Op
from dfmpc.models.load import LoadedModel, input_files, load_model, rebuild_module
from safetensors.torch import load_file, save_file
from torch import nn

CODE = """
import torch
from torch import nn


def net(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten(),
        nn.Linear(64, 3),
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))
"""


@pytest.fixture(scope="module")
def allow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AllowList]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "loadnets_test.py").write_text(CODE)
    before = list(sys.path)
    yield AllowList.default([str(folder)])
    sys.path[:] = before


@pytest.fixture
def state(allow: AllowList, make_source: Callable[..., ModelSource]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = allow.build(make_source(factory="loadnets_test:net"))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    net(torch.randn(4, 3, 8, 8))
    return dict(net.state_dict())


@pytest.fixture
def load(
    allow: AllowList, make_source: Callable[..., ModelSource], tmp_path: Path
) -> Callable[[dict[str, torch.Tensor]], LoadedModel]:
    def load_state(state: dict[str, torch.Tensor]) -> LoadedModel:
        file = tmp_path / "net.safetensors"
        save_file(state, file)
        fields = {"factory": "loadnets_test:net", "checkpoint": str(file), "input": [1, 3, 8, 8]}
        return load_model(make_source(**fields), allow)

    return load_state


def test_a_model_is_ready_to_run(
    load: Callable[..., LoadedModel], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = load(state)
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert list(model.state) == list(model.module.state_dict())
    assert all(torch.equal(tensor, model.module.state_dict()[name]) for name, tensor in model.state.items())
    assert model.input_shape == (1, 3, 8, 8)
    assert model.program is None
    assert model.checkpoint_bytes == (tmp_path / "net.safetensors").stat().st_size
    assert input_files(model.source) == [tmp_path / "net.safetensors"]
    ops = [Op.INPUT, Op.CONV, Op.BATCH_NORM, Op.RELU, Op.CONV, Op.FLATTEN, Op.LINEAR, Op.OUTPUT]
    assert [node.op for node in model.graph.nodes] == ops


def test_half_precision_is_kept_in_state_and_computed_in_float32(
    load: Callable[..., LoadedModel], state: dict[str, torch.Tensor]
) -> None:
    half = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    model = load(half)
    assert model.state["0.weight"].dtype is torch.float16
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert torch.equal(model.module.state_dict()["0.weight"], half["0.weight"].float())


def test_a_missing_counter_is_tolerated(load: Callable[..., LoadedModel], state: dict[str, torch.Tensor]) -> None:
    del state["1.num_batches_tracked"]
    model = load(state)
    assert "1.num_batches_tracked" not in model.state


def test_missing_unexpected_and_misshapen_tensors_are_named(
    load: Callable[..., LoadedModel], state: dict[str, torch.Tensor]
) -> None:
    del state["3.bias"]
    state["extra.weight"] = torch.ones(1)
    state["5.weight"] = torch.ones(3, 65)
    with pytest.raises(MismatchError) as caught:
        load(state)
    said = str(caught.value)
    assert "net.safetensors: the tensors do not fit the network" in said
    assert "1 missing: 3.bias;" in said
    assert "1 unexpected: extra.weight;" in said
    assert "1 of another shape: 5.weight ([3, 65], expected [3, 64])" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_weights_of_a_type_that_cannot_be_computed_with_are_named(
    load: Callable[..., LoadedModel], state: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    state["0.weight"] = state["0.weight"].to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(MismatchError, match=rf"1 of another type: 0\.weight \({kind}, expected a floating type of 16"):
        load(state)


def test_only_eight_names_are_listed(load: Callable[..., LoadedModel], state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MismatchError, match=r"12 unexpected: xa, .*xh, … \(4 more\)"):
        load({**state, **{f"x{letter}": torch.ones(1) for letter in "abcdefghijkl"}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_named(
    load: Callable[..., LoadedModel], state: dict[str, torch.Tensor], value: float
) -> None:
    state["1.running_var"][2] = value
    state["3.weight"][0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"NaN or Inf in 2 tensors: 1\.running_var, 3\.weight"):
        load(state)


def test_a_missing_checkpoint(allow: AllowList, make_source: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = make_source(factory="loadnets_test:net", checkpoint=str(tmp_path / "no.pt"), input=[1, 3, 8, 8])
    with pytest.raises(CheckpointError, match=r"checkpoint: .*no\.pt: no such file"):
        load_model(source, allow)


def test_an_input_that_does_not_fit(
    allow: AllowList, make_source: Callable[..., ModelSource], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "net.safetensors")
    fields = {"factory": "loadnets_test:net", "checkpoint": str(tmp_path / "net.safetensors"), "input": [1, 4, 8, 8]}
    with pytest.raises(UnsupportedModelError, match=r"for an input of shape \[1, 4, 8, 8\].*check the model's 'input'"):
        load_model(make_source(**fields), allow)


def test_rebuild_gives_the_same_outputs(
    allow: AllowList, load: Callable[..., LoadedModel], state: dict[str, torch.Tensor]
) -> None:
    model = load(state)
    images = torch.randn(2, 3, 8, 8)
    rebuilt = rebuild_module(factory="loadnets_test:net", args=[], kwargs={}, state=model.state, allow=allow)
    assert torch.equal(rebuilt(images), model.module(images))
    assert not any(parameter.requires_grad for parameter in rebuilt.parameters())
    with pytest.raises(MismatchError, match=r"loadnets_test:net: .*1 missing: 0\.weight"):
        rebuild_module(
            factory="loadnets_test:net",
            state={name: tensor for name, tensor in model.state.items() if name != "0.weight"},
            allow=allow,
        )


@pytest.mark.parametrize("names", [("first",), ("second",), ("first", "second")], ids="+".join)
def test_tied_parameters(
    allow: AllowList, make_source: Callable[..., ModelSource], tmp_path: Path, names: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6)
    state = {f"{name}.weight": weight.clone() for name in names}
    state |= {"first.bias": torch.randn(6), "norm.weight": torch.rand(6), "norm.bias": torch.randn(6)}
    state |= {"norm.running_mean": torch.randn(6), "norm.running_var": torch.rand(6)}
    save_file(state, tmp_path / "tied.safetensors")
    file = str(tmp_path / "tied.safetensors")
    model = load_model(make_source(factory="loadnets_test:Tied", checkpoint=file, input=[2, 6]), allow)
    assert "first.weight" in model.state
    assert "second.weight" not in model.state
    assert [layer.name for layer in model.graph.layers] == ["first"]
    images = torch.randn(3, 6)
    expected = model.module(images)
    doubled = {name: tensor * 2 if name == "first.weight" else tensor for name, tensor in model.state.items()}
    rebuilt = rebuild_module(factory="loadnets_test:Tied", state=doubled, allow=allow)
    parameters = dict(rebuilt.named_parameters(remove_duplicate=False))
    assert parameters["second.weight"] is parameters["first.weight"]
    assert torch.equal(parameters["second.weight"], 2 * weight)
    assert not torch.equal(rebuilt(images), expected)


def test_the_shared_networks_load(make_source: Callable[..., ModelSource], shared: Path) -> None:
    allow = AllowList.default([str(shared / "models")])
    file = shared / "models" / "resnet20.safetensors"
    fields = {"factory": "cifar_models:resnet20", "checkpoint": str(file), "input": [1, 3, 32, 32]}
    model = load_model(make_source(**fields), allow)
    stored = load_file(file)
    assert model.state["conv1.weight"].dtype is stored["conv1.weight"].dtype is torch.float16
    assert torch.equal(model.module.state_dict()["conv1.weight"], stored["conv1.weight"].float())
    assert model.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
