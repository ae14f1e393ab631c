from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dfmpc.errors import DataError
from dfmpc.evaluate import images as images_module
from dfmpc.evaluate.images import batches, read_images
from dfmpc.job.schema import Preprocess
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(height, width, seed=0, mode="RGB"):
    generator = torch.Generator().manual_seed(seed)
    channels = len(mode)
    data = torch.randint(0, 256, (height, width, channels), dtype=torch.uint8, generator=generator)
    return Image.frombytes(mode, (width, height), bytes(data.flatten().tolist()))


def encode(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def write(path, encoded, labels, rows_a_group=2):
    column = pa.array([{"bytes": item, "path": None} for item in encoded], IMAGE)
    pq.write_table(
        pa.table({"image": column, "label": pa.array(labels, pa.int64())}), path, row_group_size=rows_a_group
    )
    return path


def all_of(path, preprocess, batch_size=2, **kwargs):
    found = list(batches(read_images(path), preprocess, batch_size, **kwargs))
    return torch.cat([batch.images for batch in found]), torch.cat([batch.labels for batch in found])


def test_pixels_and_labels_come_in_order_without_change(tmp_path):
    originals = [picture(4, 6, seed) for seed in range(5)]
    path = write(tmp_path / "a.parquet", map(encode, originals), [4, 3, 2, 1, 0])
    images, labels = all_of(path, Preprocess())
    assert images.shape == (5, 3, 4, 6)
    assert images.dtype == torch.float32
    assert labels.tolist() == [4, 3, 2, 1, 0]
    for image, original in zip(images, originals, strict=True):
        assert (image * 255).round().permute(1, 2, 0).flatten().int().tolist() == list(original.tobytes())


def test_resize_crop_and_normalise_as_done_directly_with_pillow(tmp_path):
    original = picture(40, 60)
    path = write(tmp_path / "a.parquet", [encode(original)], [1])
    preprocess = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), resize=20, crop=16)
    images, _ = all_of(path, preprocess)
    fitted = original.resize((30, 20), Image.Resampling.BICUBIC).crop((7, 2, 23, 18))
    flat = torch.tensor(list(fitted.tobytes()), dtype=torch.float64).reshape(16, 16, 3) / 255
    expected = (flat - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.5])
    torch.testing.assert_close(images[0], expected.permute(2, 0, 1).float(), atol=1e-6, rtol=1e-5)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey, clear = Image.new("L", (3, 3), 51), Image.new("RGBA", (3, 3), (255, 0, 51, 255))
    images, _ = all_of(write(tmp_path / "a.parquet", [encode(grey), encode(clear)], [0, 1]), Preprocess())
    assert images[0].unique().tolist() == pytest.approx([0.2])
    assert images[1, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_limit_takes_the_first_rows(tmp_path, limit):
    path = write(tmp_path / "a.parquet", [encode(picture(2, 2, seed)) for seed in range(5)], range(5))
    assert read_images(path, limit).labels.tolist() == list(range(min(limit, 5)))


@pytest.mark.parametrize(
    ("hold_out", "limit", "expected"),
    [(2, None, [1, 3, 5]), (3, None, [1, 2, 4, 5]), (3, 3, [1, 2, 4]), (9, 2, [1, 2])],
)
def test_hold_out_leaves_out_every_nth_row_of_the_file(tmp_path, hold_out, limit, expected):
    path = tmp_path / "a.parquet"
    write(path, [encode(picture(2, 2, seed)) for seed in range(6)], range(6))
    assert read_images(path, limit, hold_out).labels.tolist() == expected
    # row groups of another size than the reader's batches
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4)
    assert read_images(path, limit, hold_out).labels.tolist() == expected


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [encode(picture(2, 2))], [1])
    assert read_images(path).labels.tolist() == [1]
    write(path, [encode(picture(2, 2)), encode(picture(2, 2))], [2, 3])
    assert read_images(path).labels.tolist() == [2, 3]


def test_images_are_decoded_once_for_many_passes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [encode(picture(4, 4, seed)) for seed in range(4)], range(4))
    images, opened = read_images(path), []
    first = torch.cat([batch.images for batch in batches(images, Preprocess(), 3)])
    monkeypatch.setattr(images_module.Image, "open", lambda *_: opened.append(1))
    again = torch.cat(
        [batch.images for batch in batches(read_images(path), Preprocess(mean=(0.5,) * 3, std=(1.0,) * 3), 2)]
    )
    assert not opened
    torch.testing.assert_close(again, first - 0.5)


def test_too_many_to_keep_gives_the_same_batches(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [encode(picture(4, 4, seed)) for seed in range(5)], range(5))
    kept, _ = all_of(path, Preprocess(crop=3))
    images_module._read_images.cache_clear()
    monkeypatch.setattr(images_module, "CACHED_BYTES", 0)
    assert read_images(path).cached(Preprocess(crop=3)) is None
    assert torch.equal(all_of(path, Preprocess(crop=3))[0], kept)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"label": [1]}, "no column 'image', its columns are label"),
        ({"image": pa.array([{"bytes": b"", "path": ""}], IMAGE)}, "no column 'label', its columns are image"),
        ({"image": ["a.png"], "label": [1]}, "column 'image' is string: expected struct"),
        ({"image": pa.array([{"path": "a"}]), "label": [1]}, "column 'image' is struct<path: string>: expected"),
        ({"image": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": ["cat"]}, "column 'label' is string"),
        ({"image": pa.array([], IMAGE), "label": pa.array([], pa.int64())}, "no rows"),
        ({"image": pa.array([{"bytes": None, "path": ""}], IMAGE), "label": [1]}, "row 0: image.bytes is null"),
        (
            {"image": pa.array([{"bytes": b"", "path": ""}] * 2, IMAGE), "label": pa.array([1, None])},
            "row 1: label is null",
        ),
    ],
)
def test_a_file_that_does_not_fit_names_itself_and_what_is_wrong(tmp_path, table, message):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(DataError) as caught:
        read_images(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_absent_and_a_torn_file_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"absent\.parquet: cannot be read \(No such file"):
        read_images(tmp_path / "absent.parquet")
    torn = write(tmp_path / "torn.parquet", [encode(picture(4, 4))], [0])
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"torn\.parquet: not a readable Parquet file"):
        read_images(torn)


@pytest.mark.parametrize("broken", [b"", b"not an image", encode(picture(30, 30))[:200]], ids=["empty", "text", "torn"])
def test_a_broken_image_names_its_row(tmp_path, broken):
    path = write(tmp_path / "a.parquet", [encode(picture(30, 30)), broken], [0, 1])
    with pytest.raises(DataError, match=r"a\.parquet row 1: broken image"):
        all_of(path, Preprocess())


def test_sizes_that_differ_need_resize_and_crop(tmp_path):
    path = write(tmp_path / "a.parquet", [encode(picture(8, 9)), encode(picture(9, 8))], [0, 1])
    with pytest.raises(DataError, match="row 1: image of 9x8 pixels where row 0 has 8x9: set resize and crop"):
        all_of(path, Preprocess())
    assert all_of(path, Preprocess(crop=8))[0].shape == (2, 3, 8, 8)


def test_a_crop_larger_than_the_image_names_the_remedy(tmp_path):
    path = write(tmp_path / "a.parquet", [encode(picture(8, 9))], [0])
    with pytest.raises(DataError, match="image of 8x9 pixels, crop is 12: set resize to 12"):
        all_of(path, Preprocess(crop=12))


def test_another_size_than_the_networks_names_the_remedy(tmp_path):
    path = write(tmp_path / "a.parquet", [encode(picture(8, 9))], [0])
    with pytest.raises(DataError, match="images are 3x8x9, the network takes 3x4x4: set crop: 4"):
        all_of(path, Preprocess(), input_size=(3, 4, 4))
    with pytest.raises(DataError, match=r"the network takes 1x8x9: drop evaluate\.data"):
        all_of(path, Preprocess(), input_size=(1, 8, 9))
