from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.errors import CheckpointError, NonFiniteError, UnsafeCheckpointError, UnsupportedModelError
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import LoadedModel, load_model, rebuild_module, save_placeholder_program
from dfmpc.models.program import load_program
from dfmpc.models.program_check import _EXPRESSION
from dfmpc.models.reading import read_files
from torch import nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter


class Evil:
    """Pickles to a call that makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


class Net(nn.Module):
    """A network with a tied weight, a buffer that is not saved, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.second(torch.relu(self.first(x))) * self.scale + torch.tensor([0.5])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    made(torch.randn(16, 3, 8, 8))
    return made.eval()


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),), strict=False), path)
    return path


@pytest.fixture
def model(file: Path, make_source: Callable[..., ModelSource], builtin_allow: AllowList) -> LoadedModel:
    return load_model(make_source(program=str(file)), builtin_allow)


def loaded_program(path: Path) -> ExportedProgram:
    return load_program(read_files([path])[0])


def rewritten(file: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Copy an archive with some of its members changed."""
    reader = PT2ArchiveReader(str(file))
    kept = [name for name in reader.get_file_names() if not name.startswith(".data/") and name != "byteorder"]
    members = {name: reader.read_bytes(name) for name in kept}
    change(members)
    with PT2ArchiveWriter(str(target)) as writer:
        for name, content in members.items():
            writer.write_bytes(name, content)
    return target


def edit_model(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        model = json.loads(members["models/model.json"])
        edit(model)
        members["models/model.json"] = json.dumps(model).encode()

    return change


def test_a_program_loads_under_its_own_names(model: LoadedModel, net: nn.Module, file: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.module(images), net(images))
    assert model.input_shape == (2, 3, 8, 8)
    assert model.checkpoint_bytes == file.stat().st_size
    assert set(model.state) == set(net.state_dict()) - {"second.weight"}
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in model.state.items())
    assert [layer.name for layer in model.graph.layers] == ["conv", "first"]
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_copy_of_an_archive_loads(file: Path, tmp_path: Path) -> None:
    copied = rewritten(file, tmp_path / "copy.pt2", lambda _: None)
    assert set(loaded_program(copied).state_dict) == set(loaded_program(file).state_dict)


def test_a_placeholder_program_is_small_deterministic_and_holds_no_weights(
    model: LoadedModel, net: nn.Module, tmp_path: Path
) -> None:
    paths = [tmp_path / name / "program.pt2" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        assert model.program is not None
        save_placeholder_program(model.program, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    content = paths[0].read_bytes()
    for name in ("conv.weight", "norm.running_var", "first.weight"):
        assert net.state_dict()[name].numpy().tobytes() not in content
    reader = PT2ArchiveReader(str(paths[0]))
    weights = [name for name in reader.get_file_names() if name.startswith("data/weights/weight_")]
    assert len(weights) == len(model.state)
    assert sum(len(reader.read_bytes(name)) for name in weights) == 4 * (len(weights) - 1) + 8
    assert str(Path(__file__).parent).encode() not in content


def test_an_artifact_is_rebuilt_from_its_placeholder_program(
    model: LoadedModel, net: nn.Module, tmp_path: Path, builtin_allow: AllowList
) -> None:
    path = tmp_path / "program.pt2"
    assert model.program is not None
    save_placeholder_program(model.program, path)
    rebuilt = rebuild_module(factory=None, program=path, state=model.state, allow=builtin_allow)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(rebuilt(images), net(images))
    assert not any(parameter.requires_grad for parameter in rebuilt.parameters())
    doubled = {name: tensor * 2 if name == "first.weight" else tensor for name, tensor in model.state.items()}
    changed = rebuild_module(factory=None, program=path, state=doubled, allow=builtin_allow)
    assert torch.equal(changed.state_dict()["second.weight"], 2 * net.state_dict()["first.weight"])


def test_the_program_still_has_its_weights_after_saving_placeholders(
    model: LoadedModel, net: nn.Module, tmp_path: Path
) -> None:
    assert model.program is not None
    save_placeholder_program(model.program, tmp_path / "program.pt2")
    assert torch.equal(model.program.state_dict["conv.weight"], net.state_dict()["conv.weight"])


@pytest.mark.parametrize("keep", [0, 10, 3000, -10], ids=["empty", "10", "3000", "all but 10"])
def test_a_truncated_archive(file: Path, tmp_path: Path, keep: int) -> None:
    short = tmp_path / "short.pt2"
    short.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"short\.pt2: truncated, corrupt, or no program of torch\.export"):
        loaded_program(short)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"not a zip" * 1000)
    with pytest.raises(CheckpointError, match=r"net\.pt2: truncated, corrupt"):
        loaded_program(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"net\.pt2: made by torch\.save, not torch\.export\.save: a state"):
        loaded_program(path)


def test_a_torchscript_file_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "script.pt2"
    with PT2ArchiveWriter(str(path)) as writer:
        writer.write_string("code/x.py", "print(1)")
    with pytest.raises(CheckpointError, match=r"holds the programs none; expected one, models/model\.json"):
        loaded_program(path)


@pytest.mark.parametrize("member", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"])
def test_an_archive_with_an_evil_pickle_is_refused_and_does_not_run(file: Path, tmp_path: Path, member: str) -> None:
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save(((torch.ones(2, 3, 8, 8),), {"x": Evil(mark)}), buffer)

    def change(members: dict[str, bytes]) -> None:
        members[member] = buffer.getvalue()

    evil = rewritten(file, tmp_path / "evil.pt2", change)
    with pytest.raises(UnsafeCheckpointError, match=rf"evil\.pt2: {member} needs more than weights_only=True"):
        loaded_program(evil)
    assert not mark.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("folder", ["weights", "constants"])
@pytest.mark.parametrize("stored", ["weight_0", "tensor_0", "custom_obj_0", "opaque_obj_0"])
def test_pickled_tensors_and_objects_are_refused(file: Path, tmp_path: Path, folder: str, stored: str) -> None:
    config_name = f"data/{folder}/model_{folder}_config.json"

    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members[config_name])
        config["config"]["odd"] = {"path_name": stored, "is_param": False, "use_pickle": True, "tensor_meta": None}
        members[config_name] = json.dumps(config).encode()

    with pytest.raises(UnsafeCheckpointError, match=rf"'odd' is stored as a pickled object \({stored}\)"):
        loaded_program(rewritten(file, tmp_path / "evil.pt2", change))


def test_compiled_code_is_refused(file: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["data/aotinductor/model/kernel.so"] = b"\x7fELF"

    with pytest.raises(UnsafeCheckpointError, match=r"holds compiled code \(data/aotinductor/model/kernel\.so\)"):
        loaded_program(rewritten(file, tmp_path / "evil.pt2", change))


def first_node(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["graph"]["nodes"][0]  # type: ignore[no-any-return]  # JSON


@pytest.mark.parametrize(
    "target",
    ["torch.hub.load", "torch.load", "os.system", "torch.ops.aten.from_file.default", "torch.ops.mylib.op.default"],
)
def test_calls_that_are_not_plain_aten_are_refused(file: Path, tmp_path: Path, target: str) -> None:
    change = edit_model(lambda model: first_node(model).update(target=target))
    with pytest.raises(UnsafeCheckpointError, match=f"it calls '{target}', which is not an ATen operator"):
        loaded_program(rewritten(file, tmp_path / "evil.pt2", change))


ENUM_TREE = json.dumps(
    [1, {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "antigravity:A"}]', "children_spec": []}]
)


def _signature(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["module_call_graph"][0]["signature"]  # type: ignore[no-any-return]  # JSON


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: _signature(m).update(forward_arg_names=["x=print(1)"]), "forward_arg_names"),
        (lambda m: _signature(m).update(in_spec=ENUM_TREE), "in_spec"),
        (
            lambda m: _signature(m).update(out_spec='[1, {"type": "my.Type", "context": "1", "children_spec": []}]'),
            "out_spec",
        ),
        (lambda m: first_node(m).update(name="a; print(1)"), "is not an identifier"),
        (
            lambda m: m["graph_module"]["graph"]["tensor_values"]["conv2d"]["sizes"].__setitem__(
                0, {"as_expr": {"expr_str": "__import__('os').getpid()", "hint": None}}
            ),
            "is not plain arithmetic",
        ),
        (
            lambda m: m["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
                parameter_name='a", print(1), "b'
            ),
            "is not a tensor's name",
        ),
    ],
    ids=["argument names", "enum in the tree", "type in the tree", "node name", "shape expression", "parameter name"],
)
def test_text_that_would_become_code_is_refused(
    file: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(UnsafeCheckpointError, match=said):
        loaded_program(rewritten(file, tmp_path / "evil.pt2", edit_model(edit)))


def test_guards_are_never_evaluated(file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    guard = f"__import__('os').mkdir({str(mark)!r}) is None"
    change = edit_model(lambda model: model.update(guards_code=[guard]))
    module = loaded_program(rewritten(file, tmp_path / "evil.pt2", change)).module()
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 8)
    assert not mark.exists()


def test_non_finite_weights_of_a_program(
    net: nn.Module, tmp_path: Path, make_source: Callable[..., ModelSource], builtin_allow: AllowList
) -> None:
    broken = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    broken[0].weight.data[0] = float("nan")
    path = tmp_path / "nan.pt2"
    torch.export.save(torch.export.export(broken, (torch.zeros(1, 3, 8, 8),), strict=False), path)
    with pytest.raises(NonFiniteError, match=r"nan\.pt2: NaN or Inf in 1 tensors: 0\.weight"):
        load_model(make_source(program=str(path)), builtin_allow)


def test_a_half_precision_program_is_refused(
    tmp_path: Path, make_source: Callable[..., ModelSource], builtin_allow: AllowList
) -> None:
    path = tmp_path / "half.pt2"
    half = nn.Sequential(nn.Linear(4, 4)).half().eval()
    torch.export.save(torch.export.export(half, (torch.zeros(1, 4).half(),), strict=False), path)
    with pytest.raises(UnsupportedModelError, match=r"half\.pt2: 2 tensors are not float32 \(0\.weight, 0\.bias\)"):
        load_model(make_source(program=str(path)), builtin_allow)


def test_a_dynamic_batch_is_fine_and_runs_at_any_size(
    net: nn.Module, tmp_path: Path, make_source: Callable[..., ModelSource], builtin_allow: AllowList
) -> None:
    path = tmp_path / "batch.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    model = load_model(make_source(program=str(path)), builtin_allow)
    images = torch.randn(5, 3, 8, 8)
    assert model.input_shape == (1, 3, 8, 8)
    assert torch.allclose(model.module(images), net(images), atol=1e-6)


def test_a_long_expression_is_refused_without_trying_every_way_to_read_it() -> None:
    assert _EXPRESSION.fullmatch("Add(Mul(s0, 12), Max(Symbol('s1', positive=True), 34))")
    assert not _EXPRESSION.fullmatch("1" * 10_000 + "!")


class _Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(torch.float32)).to(torch.float32)


def test_assertions_of_the_exporting_device_are_dropped_and_the_outputs_stay(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 8, 8)
    program = torch.export.export(_Converts().eval(), (image,))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = loaded_program(tmp_path / "net.pt2")
    assert not [node for node in loaded.graph.nodes if "_assert_tensor_metadata" in str(node.target)]
    assert torch.equal(loaded.module()(image), program.module()(image))
    save_placeholder_program(loaded, tmp_path / "light.pt2")
    state = {name: tensor.detach() for name, tensor in loaded.state_dict.items()}
    rebuilt = rebuild_module(factory=None, program=tmp_path / "light.pt2", state=state, allow=AllowList.default())
    assert torch.equal(rebuilt(image), program.module()(image))
