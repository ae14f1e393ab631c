from __future__ import annotations

import pytest
import torch
from dfmpc.errors import DataError
from dfmpc.evaluate.noise import noise_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pixels():
    return noise_images(64, (3, 32, 32), 0, (0.0,) * 3, (1.0,) * 3)


def test_pixels_have_the_promised_statistics(pixels):
    assert pixels.shape == (64, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    # clamping takes a little of 0.25
    assert float(pixels.mean()) == pytest.approx(0.47, abs=0.01)
    assert float(pixels.std()) == pytest.approx(0.24, abs=0.01)


def test_colours_correlate(pixels):
    colours = torch.corrcoef(pixels.transpose(0, 1).reshape(3, -1))
    assert float(colours[0, 1]) == pytest.approx(0.93, abs=0.02)
    assert float(colours[1, 2]) == pytest.approx(0.93, abs=0.02)


def test_amplitude_falls_as_one_over_f():
    size = 128
    images = noise_images(16, (3, size, size), 1)
    power = torch.fft.rfft2(images.double()).abs().square().mean(dim=(0, 1))
    along = torch.fft.fftfreq(size).reshape(-1, 1).square() + torch.fft.rfftfreq(size).square()
    frequency = along.double().sqrt()
    # below the frequencies that clamping fills, above those of the constant
    inside = (frequency > 0.02) & (frequency < 0.25)
    x, y = frequency[inside].log(), power[inside].log() / 2
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-1.0, abs=0.08)


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
