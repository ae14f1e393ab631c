"""The images on which networks are compared where there are no labels."""

from __future__ import annotations

import hashlib

import pytest
import torch
from dfmpc.compress.priors import synthetic_images
from dfmpc.errors import DataError
from dfmpc.evaluate import synthetic
from dfmpc.evaluate.noise import PIXEL_MEAN, noise_images
from dfmpc.evaluate.settings import SYNTHETIC_VERSION
from dfmpc.evaluate.synthetic import CANVAS, fidelity_images, lit
from dfmpc.job.calibrators import PRIORS_VERSION
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = ((0.0,) * 3, (1.0,) * 3)
SHAPE = (3, 32, 32)


def likeness(some, others):
    """Largest correlation of each image with any of the others, each channel centred: light hardly changes it."""
    flat = [(images - images.mean((2, 3), keepdim=True)).flatten(1).double() for images in (some, others)]
    left, right = (images / images.norm(dim=1, keepdim=True) for images in flat)
    return (left @ right.T).amax(1)


def test_the_seed_decides_everything():
    first, again, other = (fidelity_images(8, SHAPE, seed, *PIXELS) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert float(likeness(first, other).max()) < 0.95
    state = torch.get_rng_state()
    fidelity_images(2, SHAPE, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_bytes_are_those_of_this_version():
    """Other bytes need another SYNTHETIC_VERSION, else kept scores and new ones would be of different images."""
    pixels = (fidelity_images(16, SHAPE, 0, *PIXELS) * 255).round().to(torch.uint8)
    found = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert (SYNTHETIC_VERSION, PRIORS_VERSION, found[:16]) == (3, 1, "f7b447c9316f7fac")


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_image_is_one_that_a_calibrator_sees(seed):
    """A recipe must not be judged on what it was calibrated on; both default to seed 0."""
    calibration = synthetic_images("leaves", 256, SHAPE, seed)
    assert float(likeness(fidelity_images(128, SHAPE, seed, *PIXELS), calibration).max()) < 0.9
    same = lit(calibration[:128], SHAPE[1:], 5)
    assert float(likeness(same, calibration).median()) > 0.95, "the measure would tell"


def test_every_image_has_its_own_light(monkeypatch):
    drawn = torch.rand((512, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    for name, value in (("CONTRASTS", (0.02, 0.08)), ("BRIGHTNESS_SD", 0.03), ("CAST_SD", 0.04)):
        monkeypatch.setattr(synthetic, name, value)  # so small that nothing is clamped
    images = lit(drawn, (8, 8), 1).double()
    means = images.mean((2, 3))
    assert float(means.mean()) == pytest.approx(PIXEL_MEAN, abs=0.01)
    assert float(means.mean(1).std()) == pytest.approx((0.03**2 + 0.04**2 / 3) ** 0.5, rel=0.1)
    contrasts = (images - means[:, :, None, None]).std((1, 2, 3), correction=0)
    assert 0.018 < float(contrasts.min()) < 0.022
    assert 0.076 < float(contrasts.max()) < 0.082
    assert float(contrasts.mean()) == pytest.approx(0.05, abs=0.003)


def test_pixels_are_whole_steps_of_a_photograph():
    images = lit(torch.rand((16, 3, 8, 8)), (8, 8), 1).double() * 255
    assert float((images - images.round()).abs().max()) < 1e-4
    assert (float(images.min()), float(images.max())) == (0.0, 255.0)


def test_a_flat_drawing_stays_flat():
    images = lit(torch.full((4, 3, 5, 5), 0.5), (5, 5), 0)
    assert bool(images.isfinite().all())
    assert float(images.std((2, 3)).max()) < 1e-6


@pytest.mark.parametrize(
    "shape",
    [(1, 28, 28), (3, 33, 17), (4, 1, 1), (16, 8, 8), (3, 300, 260)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_any_image_has_its_shape_and_is_standardised_by_channel(shape):
    images = fidelity_images(8, shape, 0)
    assert images.shape == (8, *shape)
    assert images.dtype == torch.float32
    means, spread = images.double().mean((0, 2, 3)), images.double().std((0, 2, 3), correction=0)
    assert float(means.abs().max()) < 1e-5
    assert float((spread - 1).abs().max()) < 1e-4


def test_large_images_are_drawn_smaller_and_enlarged():
    large = fidelity_images(2, (3, 2 * CANVAS, 2 * CANVAS), 0, *PIXELS)
    small = fidelity_images(2, (3, CANVAS, CANVAS), 0, *PIXELS)
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert float((halved - small).abs().mean()) < 0.02


@pytest.mark.parametrize(
    "shape", [(40,), (6, 50), (17, 8, 8), (2, 4, 6, 8)], ids=lambda shape: "x".join(map(str, shape))
)
def test_what_is_no_image_gets_noise_of_its_shape(shape):
    inputs = fidelity_images(8, shape, 0)
    assert inputs.shape == (8, *shape)
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert not torch.equal(inputs, noise_images(8, shape, 0)), "of a stream of its own"


def test_normalisation_acts_on_pixels_in_0_1():
    pixels = fidelity_images(8, SHAPE, 0, *PIXELS)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    expected = (pixels - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    torch.testing.assert_close(fidelity_images(8, SHAPE, 0, MEAN, STD), expected, atol=1e-6, rtol=1e-6)


def test_another_number_of_channels_than_the_mean_is_an_error():
    with pytest.raises(DataError, match="mean has 3 entries, std 3, the network's input 1 channels"):
        fidelity_images(1, (1, 8, 8), 0, MEAN, STD)


def test_a_trained_network_sees_most_of_its_classes(shared):
    """Noise without light of its own landed in one class seven times of ten; agreement on one class says nothing."""
    source = ModelSource(
        name="resnet20",
        factory="cifar_models:resnet20",
        checkpoint=str(shared / "models" / "resnet20.safetensors"),
        input=[1, 3, 32, 32],
    )
    network = load_model(source, AllowList.default([str(shared / "models")])).module
    with torch.inference_mode():
        classes = network(fidelity_images(128, SHAPE, 0, MEAN, STD)).argmax(1).bincount(minlength=10)
    assert int((classes > 0).sum()) >= 8
    assert int(classes.max()) < 64
