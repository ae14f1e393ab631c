"""Forward passes through operations of several results: chunks, splits, and what comes beside an activation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.compress.make_calibrator import FEWEST_IMAGES, LARGE_IMAGES, SMALL_IMAGES, WIDEST_BYTES, make_images
from dfmpc.compress.synthetic import SyntheticMoments
from dfmpc.compress.walk import Walk
from dfmpc.compress.work import kept_figures
from dfmpc.errors import UnsupportedModelError
from dfmpc.job.calibrators import SyntheticCalibrator
from dfmpc.job.methods import DfmpcPlan
from dfmpc.models.graph import Node
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SHAPE = (1, 3, 8, 8)
IMAGES = SyntheticCalibrator(images=16)


def walked(model: LoadedModel, calibrator: SyntheticMoments) -> None:
    """Walk over the network with every layer as it is."""

    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    Walk(model.graph, (), lambda layer, _: kept_figures(model, layer, "cpu"), tensor, calibrator, None).run()


class Halves(nn.Module):
    """Chunks, a split whose middle is unused, and a pool's indices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one, self.two, self.last = nn.Conv2d(6, 5, 1), nn.Conv2d(4, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().chunk(2, 1)
        first, _, third = torch.split(self.one(left) + right[:, :5], [1, 2, 2], 1)
        pooled, _ = nn.functional.max_pool2d_with_indices(torch.cat([first, third, third[:, :1]], 1), 2)
        return self.last(self.two(pooled).relu().mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 4])
def test_parts_of_chunks_and_splits_are_told_apart(loaded: Loader, batch: int) -> None:
    model = loaded(Halves(), (batch, 3, 8, 8))
    images = make_images(model, IMAGES)
    outputs: dict[str, Tensor] = {}

    class Kept(SyntheticMoments):
        def _release(self, node: Node) -> None:
            if node.layer is not None:
                outputs[node.layer.name] = self.values[node.name]
            super()._release(node)

    calibrator = Kept(model, images, 0)
    walked(model, calibrator)
    with torch.no_grad():
        torch.testing.assert_close(outputs["last"], model.module(images), rtol=1e-4, atol=1e-5)
    assert calibrator.values == {}


class Unpools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = nn.functional.max_pool2d_with_indices(self.stem(x), 2)
        return self.last(nn.functional.max_unpool2d(pooled, places, 2))


def test_a_second_result_beside_an_activation_is_refused_with_the_remedy(loaded: Loader) -> None:
    model = loaded(Unpools(), SHAPE)
    with pytest.raises(UnsupportedModelError, match=r"result 1 of max_pool2d.*calibrator: analytic"):
        walked(model, SyntheticMoments(model, make_images(model, IMAGES), 0))


class Enlarges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.interpolate(self.stem(x), scale_factor=2.0, mode="bilinear"))


@pytest.mark.parametrize(("batch", "count"), [(1, 16), (3, 18), (8, 16)])
def test_images_come_in_whole_batches_of_the_export(loaded: Loader, batch: int, count: int) -> None:
    model = loaded(Enlarges(), (batch, *SHAPE[1:]))
    images = make_images(model, IMAGES)
    assert len(images) == count
    walked(model, SyntheticMoments(model, images, 0))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.high, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.high(self.bn1(self.low(self.bn0(self.stem(x)).relu())).relu())).relu()
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_convolutions_over_one_position_an_image_are_not_re_solved(loaded: Loader) -> None:
    plan = DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": IMAGES})
    found = compress_model(loaded(Gated(), SHAPE), plan).layers
    told = {item.layer.name for item in found if "at one position an image" in item.reason}
    assert told == {"squeeze", "excite"}


@pytest.mark.parametrize(
    ("side", "channels", "expected"),
    [
        (8, 4, SMALL_IMAGES),
        (65, 4, LARGE_IMAGES),
        (96, 1024, WIDEST_BYTES // (4 * 1024 * 96 * 96)),
        (96, 8192, FEWEST_IMAGES),
    ],
)
def test_images_are_fewer_where_a_map_of_all_would_be_too_large(
    loaded: Loader, side: int, channels: int, expected: int
) -> None:
    model = loaded(nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU()), (1, 3, side, side))
    assert len(make_images(model, SyntheticCalibrator(prior="noise"))) == expected
    assert len(make_images(model, SyntheticCalibrator(prior="noise", images=9))) == 9
