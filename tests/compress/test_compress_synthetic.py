"""The synthetic calibrator: what two forward passes show, held to passes of the modules themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dfmpc.compress import synthetic
from dfmpc.compress.calibrate import InputMoments
from dfmpc.compress.compress import compress_model
from dfmpc.compress.make_calibrator import make_images
from dfmpc.compress.result import Compressed
from dfmpc.compress.synthetic import RESIDUAL_SHARE, SyntheticMoments, residual_of
from dfmpc.compress.walk import Walk
from dfmpc.compress.work import kept_figures
from dfmpc.job.calibrators import SyntheticCalibrator
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.graph import Node
from dfmpc.models.load import LoadedModel, load_model
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SHAPE = (1, 3, 8, 8)
IMAGES = SyntheticCalibrator(images=16)


class Residual(nn.Module):
    """A block with an identity shortcut, one with a projection, and a classifier behind a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12, affine=False)
        self.short, self.bn5 = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
        x = torch.relu(y + self.bn5(self.short(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).view(x.shape[0], -1))


def plan(**fields: object) -> DfmpcPlan:
    calibrator = {"name": "synthetic", "images": 16}
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": calibrator, **fields})


def walked(model: LoadedModel, calibrator: SyntheticMoments) -> None:
    """Walk over the network with every layer as it is."""

    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    Walk(model.graph, (), lambda layer, _: kept_figures(model, layer, "cpu"), tensor, calibrator, None).run()


def node_of(model: LoadedModel, layer: str) -> Node:
    return next(node for node in model.graph.nodes if node.layer is not None and node.layer.name == layer)


class Recorder(SyntheticMoments):
    """Keeps the original network's norm outputs, which the calibrator frees."""

    seen: dict[str, Tensor]

    def _release(self, node: Node) -> None:
        if node.norm is not None:
            self.seen = {**getattr(self, "seen", {}), node.norm.name: self.values[node.name]}
        super()._release(node)


def test_behind_every_norm_the_original_has_mean_beta_and_deviation_gamma(loaded: Loader) -> None:
    model = loaded(Residual(), SHAPE)
    calibrator = Recorder(model, make_images(model, IMAGES), 0)
    walked(model, calibrator)
    assert len(calibrator.seen) == 6
    for name, output in calibrator.seen.items():
        beta = model.state.get(f"{name}.bias", torch.zeros(output.shape[1]))
        gamma = model.state.get(f"{name}.weight", torch.ones(output.shape[1]))
        torch.testing.assert_close(output.mean((0, 2, 3)), beta, rtol=1e-4, atol=1e-4)
        # eps (1e-5) is all that keeps the deviation below |γ|
        torch.testing.assert_close(output.std((0, 2, 3), correction=0), gamma.abs(), rtol=2e-3, atol=1e-4)


def forwarded(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Forward ``images`` with batch statistics; return what each BatchNorm and the classifier get, and its output."""
    seen: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.BatchNorm2d | nn.Linear):
            part.train(isinstance(part, nn.BatchNorm2d))
            part.register_forward_hook(
                lambda _, given, out, name=name: seen.update({name: given[0], f"{name}/out": out})
            )
    with torch.no_grad():
        module(images)
    return seen


@pytest.mark.parametrize(
    "recipe",
    [{"recipe": "published", "compensate": "none"}, {"recipe": "auto"}],
    ids=["published_without_c", "auto"],
)
def test_statistics_follow_from_passes_of_the_modules(loaded: Loader, recipe: dict[str, object]) -> None:
    """σ² r² with r² = var_Q / var_F, μ + (mean_Q − mean_F) σ / sd_F; a bias gives back the shift of its mean output."""
    model = loaded(Residual(), SHAPE)
    found = compress_model(model, plan(**recipe))
    network = copy.deepcopy(model.module)
    network.load_state_dict({item.layer.weight: item.weight() for item in found.layers}, strict=False)
    images = make_images(model, IMAGES)
    before, after = forwarded(copy.deepcopy(model.module), images), forwarded(network, images)
    norms = [name for name in before if name.startswith("bn") and "/" not in name]
    assert len(norms) == 6
    for name in norms:
        stored = {part: model.state[f"{name}.running_{part}"].double() for part in ("mean", "var")}
        (mean, var), (mean_q, var_q) = (
            (part[name].double().mean((0, 2, 3)), part[name].double().var((0, 2, 3), correction=0))
            for part in (before, after)
        )
        shift = (mean_q - mean) * (stored["var"] + 1e-5).sqrt() / var.sqrt()
        torch.testing.assert_close(
            found.tensors[f"{name}.running_mean"].double(), stored["mean"] + shift, rtol=2e-3, atol=2e-3
        )
        torch.testing.assert_close(
            found.tensors[f"{name}.running_var"].double(), stored["var"] * var_q / var, rtol=2e-3, atol=1e-4
        )
    if recipe["recipe"] == "auto":
        moved = (after["fc/out"] - before["fc/out"]).mean(0)
        torch.testing.assert_close(found.tensors["fc.bias"], model.state["fc.bias"] - moved, rtol=2e-3, atol=2e-3)
    else:
        assert "fc.bias" not in found.tensors


@pytest.mark.parametrize(
    ("layer", "norm", "other"),
    [("conv2", "bn2", "relu"), ("conv1", None, None), ("conv4", None, None), ("short", None, None), ("fc", None, None)],
    ids=["identity_shortcut", "inside_a_branch", "beside_a_projection", "projection", "classifier"],
)
def test_only_the_end_of_a_branch_beside_an_identity_has_a_residual(
    loaded: Loader, layer: str, norm: str | None, other: str | None
) -> None:
    model = loaded(Residual(), SHAPE)
    found = residual_of(model.graph, node_of(model, layer))
    assert (found and (found[0].name, found[1])) == (norm and (norm, other))


def test_a_branch_is_asked_for_half_the_error_of_its_shortcut(loaded: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """T = z_F + 0.5 sd(z_F) / γ (s_F − s_Q), and 0 where |γ| is tiny."""
    model = loaded(Residual(), SHAPE)
    model.state["bn2.weight"] = model.state["bn2.weight"].clone()
    model.state["bn2.weight"][3] = 1e-6
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    original = synthetic.sampled_moments

    def spy(inputs: Tensor, target: Tensor, layer: object, *rest: object) -> InputMoments:
        targets[layer.name] = (inputs, target)
        return original(inputs, target, layer, *rest)

    monkeypatch.setattr(synthetic, "sampled_moments", spy)
    found = compress_model(model, plan())
    network = copy.deepcopy(model.module)
    network.load_state_dict({item.layer.weight: item.weight() for item in found.layers}, strict=False)
    shared = copy.deepcopy(model.module)
    for module in (network, shared):
        module.bn2.weight.data[3] = 1e-6
    images = make_images(model, IMAGES)
    before, after = forwarded(shared, images), forwarded(network, images)
    z, shortcut = before["bn2"], torch.relu(before["bn0/out"]) - torch.relu(after["bn0/out"])
    gain = z.std((0, 2, 3), correction=0) / model.state["bn2.weight"]
    gain[3] = 0
    wanted = z + RESIDUAL_SHARE * gain.view(1, -1, 1, 1) * shortcut
    torch.testing.assert_close(targets["conv2"][1], wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets["conv2"][1][:, 3], z[:, 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets["conv1"][1], before["bn1"], rtol=1e-4, atol=1e-4)
    # the layer's own input is what the quantized network gives it
    torch.testing.assert_close(targets["conv2"][0], torch.relu(after["bn1/out"]), rtol=1e-3, atol=1e-3)


def test_every_activation_is_freed_after_its_last_reader(loaded: Loader) -> None:
    model = loaded(Residual(), SHAPE)
    most = []

    class Counted(SyntheticMoments):
        def _release(self, node: Node) -> None:
            super()._release(node)
            most.append(len(self.values))

    calibrator = Counted(model, make_images(model, IMAGES), 0)
    walked(model, calibrator)
    assert calibrator.values == {}
    assert calibrator.quantized_values == {}
    assert max(most) <= 3


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn0(self.stem(x.mul_(2).add_(0.5))))


def test_both_networks_have_images_of_their_own_to_write_into(loaded: Loader) -> None:
    model = loaded(WritesIntoItsInput(), SHAPE)
    images = make_images(model, IMAGES)
    before = images.clone()
    calibrator = Recorder(model, images, 0)
    walked(model, calibrator)
    assert torch.equal(images, before)
    with torch.no_grad():
        expected = model.module.stem(images * 2 + 0.5)
    torch.testing.assert_close(
        calibrator.seen["bn0"].amax((0, 2, 3)),
        nn.functional.batch_norm(
            expected, None, None, model.state["bn0.weight"], model.state["bn0.bias"], training=True
        ).amax((0, 2, 3)),
    )


def content(found: Compressed) -> dict[str, Tensor]:
    return {**{f"{item.layer.name}/codes": item.quantized.codes for item in found.layers}, **found.changed()}


@pytest.mark.parametrize("prior", ["leaves", "noise"])
def test_a_seed_gives_its_bytes(loaded: Loader, prior: str) -> None:
    model = loaded(Residual(), SHAPE)
    first, again, other = (
        content(
            compress_model(model, plan(calibrator={"name": "synthetic", "images": 8, "prior": prior, "seed": seed}))
        )
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1/codes"], other["conv1/codes"])
    assert not torch.equal(first["bn0.running_var"], other["bn0.running_var"])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_with_its_batch_written_into_it_gives_what_the_factory_gives(
    loaded: Loader, batch: int, tmp_path: Path
) -> None:
    model = loaded(Residual(), SHAPE)
    file = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model.module, (torch.zeros(batch, *SHAPE[1:]),)), file)
    program = load_model(ModelSource(name="net", program=str(file)), AllowList.default())
    assert program.input_shape[0] == batch
    first, second = (content(compress_model(one, plan())) for one in (model, program))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
