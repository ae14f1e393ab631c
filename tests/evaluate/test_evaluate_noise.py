from __future__ import annotations

import pytest
import torch
from dfmpc.errors import DataError
from dfmpc.evaluate import noise
from dfmpc.evaluate.noise import noise_images
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pixels():
    return noise_images(64, (3, 32, 32), 0, (0.0,) * 3, (1.0,) * 3)


def test_pixels_have_the_promised_statistics(pixels):
    assert pixels.shape == (64, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    # standard error of the mean of 64 images whose means have sd 0.19: 0.024
    assert float(pixels.mean()) == pytest.approx(noise.PIXEL_MEAN, abs=0.08)
    assert float(pixels.mean((1, 2, 3)).std()) == pytest.approx(0.19, abs=0.05)


def test_contrast_differs_between_images_within_its_bounds(monkeypatch):
    monkeypatch.setattr(noise, "CAST_SD", 0.0)
    monkeypatch.setattr(noise, "BRIGHTNESS_SD", 0.0)
    spread = noise_images(64, (3, 32, 32), 0, (0.0,) * 3, (1.0,) * 3).std((1, 2, 3))
    assert noise.CONTRASTS[0] * 0.99 < float(spread.min()) < 0.13
    # clamping takes from the largest
    assert 0.28 < float(spread.max()) < noise.CONTRASTS[1]


def test_colours_correlate(monkeypatch):
    monkeypatch.setattr(noise, "CONTRASTS", (0.02, 0.02))  # nothing is clamped
    monkeypatch.setattr(noise, "CAST_SD", 0.0)
    images = noise_images(64, (3, 32, 32), 0, (0.0,) * 3, (1.0,) * 3).double()
    centred = images - images.mean((2, 3), keepdim=True)
    colours = torch.corrcoef(centred.transpose(0, 1).reshape(3, -1))
    assert float(colours[0, 1]) == pytest.approx(noise.COLOUR_CORRELATION, abs=0.05)
    assert float(colours[1, 2]) == pytest.approx(noise.COLOUR_CORRELATION, abs=0.05)


@pytest.mark.parametrize("wanted", [1.0, 1.7, 2.5])
def test_amplitude_falls_as_one_over_f_to_the_slope(monkeypatch, wanted):
    monkeypatch.setattr(noise, "SLOPES", (wanted, wanted))
    monkeypatch.setattr(noise, "CONTRASTS", (0.01, 0.01))  # nothing is clamped
    size = 128
    images = noise_images(16, (3, size, size), 1)
    power = torch.fft.rfft2(images.double()).abs().square().mean(dim=(0, 1))
    along = torch.fft.fftfreq(size).reshape(-1, 1).square() + torch.fft.rfftfreq(size).square()
    frequency = along.double().sqrt()
    inside = (frequency > 0.02) & (frequency < 0.25)
    x, y = frequency[inside].log(), power[inside].log() / 2
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-wanted, abs=0.08)


def test_a_trained_network_sees_more_than_one_class(shared):
    """Agreement on images of one class would be 0 or 1 and nothing between."""
    folder = str(shared / "models")
    source = ModelSource(
        name="resnet20",
        factory="cifar_models:resnet20",
        checkpoint=str(shared / "models" / "resnet20.safetensors"),
        input=[1, 3, 32, 32],
    )
    network = load_model(source, AllowList.default([folder])).module
    classes = network(noise_images(64, (3, 32, 32), 0, MEAN, STD)).argmax(1)
    assert len(classes.unique()) >= 4


def test_the_seed_decides_everything():
    first, again, other = (noise_images(4, (3, 16, 16), seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_normalisation_is_applied_to_the_clamped_pixels(pixels):
    normalised = noise_images(64, (3, 32, 32), 0, MEAN, STD)
    expected = (pixels - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    torch.testing.assert_close(normalised, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 17), (6, 50), (40,), (2, 4, 6, 8)], ids=str)
def test_without_normalisation_any_input_is_standardised(shape):
    images = noise_images(8, shape, 0)
    assert images.shape == (8, *shape)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-4)


def test_another_number_of_channels_than_the_mean_is_an_error():
    with pytest.raises(DataError, match="3 entries, the network's input 1 channels"):
        noise_images(1, (1, 8, 8), 0, MEAN, STD)
