from __future__ import annotations

import hashlib

import pytest
import torch
from dfmpc.compress.priors import PIXEL_PRIORS, distil, image_shape, mismatch, normalise, synthetic_images
from dfmpc.compress.priors import distilled as distilled_module
from dfmpc.compress.priors import noise as noise_module
from dfmpc.errors import DataError, NonFiniteError, UnsupportedModelError, UsageError
from dfmpc.evaluate.noise import noise_images
from dfmpc.evaluate.settings import SYNTHETIC_VERSION
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from torch import nn

PRIORS = sorted(PIXEL_PRIORS)
GOLDEN = {
    "fractal": "841ed80acd297cd236bd925f1c2b102087b87435e9d86914736b61a688023a23",
    "leaves": "d1a6f0000dcc2c40a306cb8ddc2c01c3012da68d90322c2f419295a500dab3a2",
    "noise": "c44921e33c25b6a850560f01a92e62ab12098b00fbd98f627d288a2560acc923",
}
"""sha256 of 4 images of 3 by 16 by 16 from seed 7."""


@pytest.fixture(scope="module", params=PRIORS)
def made(request):
    """A prior's name and 256 of its images."""
    return request.param, synthetic_images(request.param, 256, (3, 32, 32), 0)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_bytes_of_a_seed_are_fixed(prior):
    images = synthetic_images(prior, 4, (3, 16, 16), 7)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == GOLDEN[prior]


def test_the_noise_of_evaluations_is_still_that_of_its_version():
    """It shares its fields with the priors, and stored scores were measured on it."""
    images = noise_images(2, (3, 8, 8), 0, (0.0,) * 3, (1.0,) * 3)
    expected = torch.tensor([0.8749842, 0.7116978, 0.0613481])
    assert SYNTHETIC_VERSION == 3
    torch.testing.assert_close(images[0, 0, 0, :3], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_seed_decides_everything_and_the_global_generator_nothing(prior):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = synthetic_images(prior, 3, (3, 12, 12), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(synthetic_images(prior, 3, (3, 12, 12), 5), first)
    assert not torch.equal(synthetic_images(prior, 3, (3, 12, 12), 6), first)


def test_pixels_are_those_of_eight_bits(made):
    _, images = made
    assert images.shape == (256, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    torch.testing.assert_close(images * 255, (images * 255).round(), atol=1e-4, rtol=0)


def test_pixels_have_the_statistics_of_photographs(made):
    _, images = made
    channels = images.double().transpose(0, 1).reshape(3, -1)
    # images' means have sd 0.07 to 0.12: standard error of the mean of 256 below 0.008
    assert float(channels.mean()) == pytest.approx(0.47, abs=0.03)
    # clamping and blending take from noise and fractals, hard contrasts add to the leaves
    assert float(channels.std()) == pytest.approx(0.25, abs=0.04)
    colours = torch.corrcoef(channels)
    assert float(colours[0, 1]) == pytest.approx(0.93, abs=0.04)
    assert float(colours[1, 2]) == pytest.approx(0.93, abs=0.04)


def test_no_two_images_are_alike(made):
    _, images = made
    correlation = torch.corrcoef(images.mean(1).flatten(1))
    off = correlation - torch.eye(256)
    assert float(off.abs().max()) < 0.95


def slope(images):
    """Exponent of the amplitude spectrum between one cycle in 16 and one in 4 pixels."""
    side = images.shape[-1]
    power = torch.fft.rfft2(images.double() - images.double().mean()).abs().square().mean((0, 1))
    frequency = (torch.fft.fftfreq(side).reshape(-1, 1).square() + torch.fft.rfftfreq(side).square()).sqrt().double()
    inside = (frequency > 1 / 16) & (frequency < 1 / 4)
    x, y = frequency[inside].log(), power[inside].log() / 2
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# Edges give 1/f^1.5 (Lee, Mumford, Huang); soft edges and the blur steepen it, fractals' dust and noise are near it.
@pytest.mark.parametrize(
    ("prior", "wanted", "tolerance"), [("noise", -1.5, 0.1), ("leaves", -1.7, 0.2), ("fractal", -1.5, 0.3)]
)
def test_the_amplitude_spectrum_falls_as_that_of_photographs(prior, wanted, tolerance):
    assert slope(synthetic_images(prior, 32, (1, 64, 64), 0)) == pytest.approx(wanted, abs=tolerance)


def test_leaves_have_edges_that_noise_has_not():
    """Differences of neighbours are heavy-tailed where there are edges: kurtosis 3 is a Gaussian's."""
    kurtosis = {}
    for prior in ("noise", "leaves"):
        step = synthetic_images(prior, 64, (1, 32, 32), 0).double().diff(dim=3)
        kurtosis[prior] = float(step.pow(4).mean() / step.square().mean().square())
    assert kurtosis["noise"] == pytest.approx(3, abs=0.5)
    assert kurtosis["leaves"] > 10


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 1, 1), (3, 8, 8), (2, 33, 17), (4, 1, 9), (13, 6, 5), (3, 200, 130)], ids=str
)
def test_any_size_and_number_of_channels_works(prior, shape):
    images = synthetic_images(prior, 3, shape, 0)
    assert images.shape == (3, *shape)
    assert bool(images.isfinite().all())
    assert len(images.unique()) > 2


def test_thirteen_channels_correlate_like_three():
    images = synthetic_images("noise", 64, (13, 16, 16), 0).double().transpose(0, 1).reshape(13, -1)
    colours = torch.corrcoef(images)[~torch.eye(13, dtype=torch.bool)]
    assert float(colours.min()) > 0.9
    assert float(colours.max()) < 0.96


@pytest.mark.parametrize("shape", [(500, 1, 8, 8), (500, 1, 9, 7), (4000, 1, 1, 1), (2000, 1, 1, 6)], ids=str)
def test_fields_have_variance_one(shape):
    fields = noise_module.unit_fields(1.5, shape, torch.Generator().manual_seed(0))
    # an image holds few independent values: the standard error of 500 images' variance is near 0.03
    assert float(fields.square().mean()) == pytest.approx(1, abs=0.1)


def test_no_images_are_no_images():
    assert synthetic_images("leaves", 0, (3, 8, 8), 0).shape == (0, 3, 8, 8)


def test_another_prior_or_shape_is_refused():
    with pytest.raises(UsageError, match="prior 'clouds': expected one of noise, leaves, fractal"):
        synthetic_images("clouds", 1, (3, 8, 8), 0)
    for shape in ((8,), (3, 0, 8), (1, 3, 8, 8)):
        with pytest.raises(UsageError, match=r"expected \[channels, height, width\]"):
            synthetic_images("noise", 1, shape, 0)


def test_normalisation_is_the_models_own_or_standardises_each_channel():
    pixels = synthetic_images("leaves", 16, (3, 8, 8), 0)
    own = normalise(pixels, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    torch.testing.assert_close(own[:, 2], (pixels[:, 2] - 0.3) / 0.5)
    standard = normalise(pixels)
    assert standard.dtype == torch.float32
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(3))
    assert torch.equal(normalise(torch.full((2, 1, 3, 3), 0.25)), torch.zeros(2, 1, 3, 3))


def test_normalisation_of_another_number_of_channels_is_an_error():
    with pytest.raises(DataError, match="mean has 3 entries, std 3, the network's input 1 channels"):
        normalise(torch.zeros(1, 1, 4, 4), (0.5,) * 3, (0.2,) * 3)


def saved(tmp_path, module, example):
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(module.eval(), (example,), strict=False), file)
    return load_model(ModelSource(name="net", program=str(file)), AllowList.default([]))


class Tokens(nn.Module):
    """A text model: ids in, logits out."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.embed(ids).mean(1))


def test_the_shape_of_images_comes_from_the_network(tmp_path):
    assert image_shape(saved(tmp_path, tiny(), torch.zeros(2, 3, 12, 10))) == (3, 12, 10)


@pytest.mark.parametrize(
    ("module", "example", "found"),
    [
        (Tokens(), torch.zeros(1, 6, dtype=torch.long), r"int64 \[1, 6\]"),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU()), torch.zeros(1, 2, 9), r"float32 \[1, 2, 9\]"),
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU()), torch.zeros(1, 1, 5, 5, 5), r"float32 \[1, 1, 5, 5, 5\]"),
        (nn.Sequential(nn.Conv2d(64, 4, 3), nn.ReLU()), torch.zeros(1, 64, 5, 5), r"float32 \[1, 64, 5, 5\]"),
    ],
    ids=["tokens", "sequence", "volume", "features"],
)
def test_what_is_no_image_is_refused_with_shape_and_remedy(tmp_path, module, example, found):
    with pytest.raises(UnsupportedModelError, match=f"net: its input is {found}.*use calibrator: analytic"):
        image_shape(saved(tmp_path, module, example))


def tiny(seed=0):
    """Two BatchNorms, one without affine, that were trained on darker and flatter images than noise is."""
    torch.manual_seed(seed)
    norms = nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, affine=False, momentum=None)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norms[0], nn.ReLU(), norms[1], nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        network.train()(synthetic_images("leaves", 16, (3, 12, 12), seed) - 0.7)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def start():
    return normalise(synthetic_images("noise", 8, (3, 12, 12), 0))


def test_mismatch_is_what_its_formula_says():
    norm = nn.BatchNorm2d(2).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    images = torch.tensor([[[[2.0, 4.0]], [[-1.0, 1.0]]]])
    # channel 0: mean 3, variance 1: (3 - 1)^2 / 4 + (1/4 - 1)^2 = 1.5625; channel 1: exactly its statistics
    assert mismatch(norm, images) == pytest.approx(1.5625 / 2)


def test_distilling_lowers_the_mismatch_and_keeps_the_range(start):
    network = tiny()
    images = distil(network, start, steps=30, seed=1)
    assert mismatch(network, images) < 0.3 * mismatch(network, start)
    assert images.shape == start.shape
    assert not images.requires_grad
    assert bool((images.amax((0, 2, 3)) <= start.amax((0, 2, 3))).all())
    assert torch.equal(images, distil(network, start, steps=30, seed=1))


def test_portions_change_the_memory_and_not_the_result(start, monkeypatch):
    whole = distil(tiny(), start, steps=3)
    monkeypatch.setattr(distilled_module, "_PIXELS", 2 * 144)
    torch.testing.assert_close(distil(tiny(), start, steps=3), whole, atol=2e-3, rtol=0)
    assert mismatch(tiny(), start) == pytest.approx(mismatch(tiny(), start, batch=8), rel=1e-4)


@pytest.mark.parametrize("decomposed", [False, True], ids=["training-ir", "core-aten"])
def test_an_exported_program_distils_like_its_module(start, decomposed):
    program = torch.export.export(tiny(), (torch.zeros(4, 3, 12, 12),), strict=False)
    if decomposed:
        program = program.run_decompositions()
    assert mismatch(program.module(), start, batch=4) == pytest.approx(mismatch(tiny(), start), rel=1e-4)
    images = distil(program.module(), start, steps=2, batch=4)
    torch.testing.assert_close(images, distil(tiny(), start, steps=2), atol=2e-3, rtol=0)


def test_a_static_batch_that_does_not_divide_shares_images(start):
    program = torch.export.export(tiny(), (torch.zeros(3, 3, 12, 12),), strict=False)
    assert distil(program.module(), start, steps=1, batch=3).shape == start.shape
    with pytest.raises(UsageError, match="2 images to distil: the network takes 3 at a time"):
        distil(program.module(), start[:2], steps=1, batch=3)


def test_a_network_without_batch_norm_has_nothing_to_distil(start):
    with pytest.raises(UnsupportedModelError, match=r"Conv2d has no BatchNorm.*use the prior 'leaves'"):
        distil(nn.Conv2d(3, 4, 3), start)


def test_a_dead_channel_does_not_drown_the_others(start):
    network = tiny()
    network[3].running_var[0] = 0
    assert mismatch(network, start) < 2 * mismatch(tiny(), start)
    assert mismatch(network, distil(network, start, steps=5)) < mismatch(network, start)


def test_a_norm_of_dead_channels_asks_for_nothing(start):
    network = tiny()
    network[1].running_var.zero_()
    network[3].running_var.zero_()
    assert mismatch(network, start) == 0
    assert bool(distil(network, start, steps=2).isfinite().all())


def test_statistics_that_are_not_finite_are_an_error(start):
    network = tiny()
    network[1].running_mean[0] = float("nan")
    with pytest.raises(NonFiniteError, match="use the prior 'leaves'"):
        distil(network, start, steps=1)


def test_a_trained_network_finds_leaves_nearer_to_photographs_than_noise(shared):
    source = ModelSource(
        name="resnet20",
        factory="cifar_models:resnet20",
        checkpoint=str(shared / "models" / "resnet20.safetensors"),
        input=[1, 3, 32, 32],
    )
    network = load_model(source, AllowList.default([str(shared / "models")])).module
    own = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = {prior: mismatch(network, normalise(synthetic_images(prior, 64, (3, 32, 32), 0), *own)) for prior in PRIORS}
    # 0.085 against 0.32
    assert found["leaves"] < 0.5 * found["noise"]
