"""Networks, checkpoints and plans that go wrong: one clear error or a documented fallback each (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.artifact.verify import find_artifacts
from dfmpc.compress.compress import compress_model
from dfmpc.errors import NonFiniteError, UnsupportedModelError
from dfmpc.evaluate.forward import logits
from dfmpc.job.loader import load_job
from dfmpc.job.sources import ModelSource
from dfmpc.models.capture import capture
from dfmpc.models.factory import AllowList
from dfmpc.models.load import LoadedModel, load_model
from dfmpc.run.begin import RunOptions, run_job
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


# -- statistics and weights


def frozen(model: LoadedModel) -> None:
    for name, tensor in model.state.items():
        if name.endswith("running_var"):
            model.state[name] = torch.ones_like(tensor)
        elif name.endswith("running_mean"):
            model.state[name] = torch.zeros_like(tensor)


def zero_variance(model: LoadedModel) -> None:
    model.state["bn1.running_var"] = model.state["bn1.running_var"] * (torch.arange(12) % 2)


def dead_gamma(model: LoadedModel) -> None:
    for name in ("bn0.weight", "bn1.weight"):
        model.state[name] = model.state[name] * (torch.arange(len(model.state[name])) > 3)
    model.state["bn1.bias"] = model.state["bn1.bias"] * (torch.arange(12) > 1)


def all_gamma_dead(model: LoadedModel) -> None:
    for name in ("bn0.weight", "bn1.weight", "bn2.weight"):
        model.state[name] = torch.zeros_like(model.state[name])


def dead_rows(model: LoadedModel) -> None:
    weight = model.state["low.weight"].clone()
    weight[:5] = 0
    model.state["low.weight"], model.state["high.weight"] = weight, torch.zeros_like(model.state["high.weight"])


@pytest.mark.parametrize("recipe", ["published", "auto"])
@pytest.mark.parametrize("spoil", [frozen, zero_variance, dead_gamma, all_gamma_dead, dead_rows])
def test_bad_statistics_leave_finite_tensors(
    probe: Any, plain: LoadedModel, spoil: Callable[[LoadedModel], None], recipe: str, calibrator: str
) -> None:
    spoil(plain)
    probe.unharmed(plain, compress_model(plain, probe.plan(calibrator, recipe=recipe)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["low.weight", "fc.weight", "bn1.running_mean", "bn2.running_var", "bn0.bias"])
@pytest.mark.parametrize("calibrator", ["spectral", "synthetic"])
def test_what_is_no_number_is_named_before_anything_is_factorised(
    probe: Any, plain: LoadedModel, calibrator: str, name: str, value: float
) -> None:
    broken = plain.state[name].clone()
    broken.view(-1)[2] = value
    plain.state[name] = broken
    with pytest.raises(NonFiniteError, match=rf"Plain: {name} holds NaN or Inf; repair or retrain"):
        compress_model(plain, probe.plan(calibrator))


# -- inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.conv(first) + self.conv(second)


def test_two_inputs_are_refused_by_number_and_name(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 8, 8)
    file = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(TwoInputs().eval(), (image, image)), file)
    with pytest.raises(UnsupportedModelError, match=r"2 tensor inputs \(first, second\): exactly one is supported"):
        load_model(ModelSource(name="two", program=str(file)), AllowList.default())
    with pytest.raises(UnsupportedModelError, match=r"torch\.export cannot capture TwoInputs"):
        capture(TwoInputs().eval(), (1, 3, 8, 8))


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm0 = nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8)
        self.low, self.norm1 = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)
        self.high = nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.low(torch.relu(self.norm0(self.first(x))))))
        return self.high(x).mean(2)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.low, self.high = nn.Conv2d(40, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.relu(self.low(torch.relu(self.first(x))))).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "shape", "said"),
    [
        (Features, (1, 6), r"float32 \[1, 6\]"),
        (Signal, (2, 2, 32), r"float32 \[2, 2, 32\]"),
        (Maps, (1, 40, 4, 4), r"float32 \[1, 40, 4, 4\]"),
    ],
    ids=["features", "signal", "feature_maps"],
)
def test_what_is_no_image_is_refused_by_the_images_and_served_without_them(
    probe: Any, loaded: Loader, network: type[nn.Module], shape: tuple[int, ...], said: str
) -> None:
    model = loaded(network(), shape)
    with pytest.raises(UnsupportedModelError, match=rf"{network.__name__}: its input is {said}.*calibrator: analytic"):
        compress_model(model, probe.plan("synthetic"))
    for calibrator in ("none", "norm", "channel", "spectral"):
        probe.unharmed(model, compress_model(model, probe.plan(calibrator)))


class Language(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embedding(ids))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def language_program(file: Path) -> str:
    torch.manual_seed(0)
    network = Language().eval().requires_grad_(False)
    torch.export.save(torch.export.export(network, (torch.zeros(1, 6, dtype=torch.int64),)), file)
    return str(file)


def test_token_ids_are_refused_by_images_and_by_evaluation_and_compress_in_closed_form(
    probe: Any, tmp_path: Path
) -> None:
    program = language_program(tmp_path / "ids.pt2")
    model = load_model(ModelSource(name="ids", program=program), AllowList.default())
    with pytest.raises(UnsupportedModelError, match=r"ids: its input is int64 \[1, 6\].*calibrator: analytic"):
        compress_model(model, probe.plan("synthetic"))
    for calibrator in ("none", "norm", "channel", "spectral"):
        found = compress_model(model, probe.plan(calibrator))
        assert probe.by_name(found)["up"].role == "low"
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found.changed().values())
    with pytest.raises(UnsupportedModelError, match=r"the original takes int64 \[1, 6\].*behind its embedding"):
        logits(model.module, [torch.zeros(2, 6)], name="the original")


@pytest.mark.slow
def test_a_run_names_what_is_wrong_and_does_the_rest(bench: Any) -> None:
    language_program(bench.folder / "ids.pt2")
    models = [bench.model("plain"), {"name": "ids", "program": "ids.pt2"}]
    plans = [
        {"name": "auto", "method": "dfmpc", "calibrator": {"name": "synthetic", "images": 8}},
        {"name": "published", "method": "dfmpc", "recipe": "published"},
        {"name": "small", "method": "dfmpc", "budget": {"bits_per_weight": 2.0}},
        {"name": "large", "method": "dfmpc", "budget": {"bytes": "1MB"}},
    ]
    rules = [{"match": "3", "keep": True}]
    summary = run_job(load_job(bench.job(models, plans, layers=rules)), RunOptions(progress=False, devices="cpu"))
    assert summary.exit_code == 3
    failed = {row.task: (row.error_class, str(row.error)) for row in summary.rows if row.status == "failed"}
    assert {row.task for row in summary.rows} - set(failed) == {"plain/auto", "plain/published"}
    assert {error_class for error_class, _ in failed.values()} == {"UnsupportedModelError"}
    assert "int64 [1, 6]" in failed["ids/auto"][1]
    assert "calibrator: analytic" in failed["ids/auto"][1]
    assert "the artifact itself is complete" in failed["ids/published"][1]
    for model in ("plain", "ids"):
        assert "out of reach" in failed[f"{model}/small"][1]
        assert "above half precision" in failed[f"{model}/large"][1]
    kept = {"/".join(folder.parts[-3:-1]) for folder in find_artifacts(bench.store)}
    assert kept == {"plain/auto", "plain/published", "ids/published"}
