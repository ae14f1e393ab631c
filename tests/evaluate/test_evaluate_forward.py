from __future__ import annotations

import pytest
import torch
from dfmpc.errors import NonFiniteError, UnsupportedModelError
from dfmpc.evaluate.forward import logits, static_batch
from torch import nn


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def exported(network, batch, dynamic=False):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = (torch.zeros(batch, 3, 8, 8),)
    return torch.export.export(network, example, dynamic_shapes=shapes, strict=False).module()


def test_batches_are_joined_in_order_without_gradients(network, images):
    found = logits(network, [images[:2], images[2:]])
    torch.testing.assert_close(found, network(images).detach(), atol=1e-6, rtol=1e-6)
    assert found.shape == (5, 7)
    assert not found.requires_grad


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_program_with_a_static_batch_gets_exactly_that_batch(network, images, batch):
    program = exported(network, batch)
    assert static_batch(program) == static_batch(nn.Sequential(program, nn.Identity())) == batch
    torch.testing.assert_close(logits(program, [images]), network(images).detach(), atol=1e-6, rtol=1e-6)


def test_a_program_with_a_dynamic_batch_and_a_plain_module_take_any(network, images):
    program = exported(network, 2, dynamic=True)
    assert static_batch(program) is None
    assert static_batch(network) is None
    torch.testing.assert_close(logits(program, [images]), network(images).detach(), atol=1e-6, rtol=1e-6)


def test_the_caller_may_name_the_batch(images):
    seen = []

    class Picky(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)

    found = logits(Picky(), [images], batch_size=3)
    assert seen == [3, 3]
    assert torch.equal(found, images.flatten(1))


def test_every_position_of_a_dense_output_is_a_row(images):
    dense = logits(nn.Conv2d(3, 2, 8), [images])
    wide = logits(nn.Conv2d(3, 2, 1), [images])
    assert dense.shape == (5, 2)
    assert wide.shape == (5 * 64, 2)


def test_nan_is_an_error_that_counts_the_rows(images):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x.flatten(1)[:, :2] > 10, x.flatten(1)[:, :2], torch.nan)

    with pytest.raises(NonFiniteError, match="the compressed network gives NaN or Inf in 5 of 5 rows"):
        logits(Broken(), [images], name="the compressed network")


def test_an_output_that_is_no_tensor_is_an_error(images):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UnsupportedModelError, match="the network returned tuple"):
        logits(Two(), [images])
