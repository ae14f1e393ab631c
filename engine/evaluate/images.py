"""Labelled images from a Parquet file, and how they become a network's input."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..job.schema import Preprocess
from .data_file import stat_data

CACHED_BYTES = 256 * 2**20
"""Decoded pixels are kept up to this size, because many tasks look at the same images."""
_READ_ROWS = 256


class Batch(NamedTuple):
    """Normalised images, float32 [n, 3, H, W], and their labels, int64 [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Encoded images with labels, and the pixels decoded last."""

    path: Path
    encoded: tuple[bytes, ...]
    labels: Tensor
    """int64 [N]."""
    _decoded: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.encoded)

    def decode(self, start: int, stop: int, preprocess: Preprocess) -> Tensor:
        """Return images ``start`` to ``stop`` resized and cropped, uint8 [n, 3, H, W].

        Raises DataError naming the row of an image that is broken, too small for the crop or of another size.
        """
        first = self._pixels(start, preprocess)
        pixels = first.new_empty((stop - start, *first.shape))
        pixels[0] = first
        for row in range(start + 1, stop):
            image = self._pixels(row, preprocess)
            if image.shape != first.shape:
                raise DataError(
                    f"{self.path} row {row}: image of {_size(image)} pixels where row {start} has {_size(first)}: "
                    "set resize and crop to make them one size"
                )
            pixels[row - start] = image
        return pixels

    def cached(self, preprocess: Preprocess) -> Tensor | None:
        """Return all images as ``decode`` would, kept for the next call, or None where they are too many to keep."""
        size = (preprocess.resize, preprocess.crop)
        if size not in self._decoded:
            if self._pixels(0, preprocess).numel() * len(self) > CACHED_BYTES:
                return None
            self._decoded.clear()
            self._decoded[size] = self.decode(0, len(self), preprocess)
        return self._decoded[size]

    def _pixels(self, row: int, preprocess: Preprocess) -> Tensor:
        try:
            with Image.open(io.BytesIO(self.encoded[row])) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path} row {row}: broken image ({error}): replace or drop the row") from error
        fitted = _centre_crop(_resize(rgb, preprocess.resize), preprocess.crop, f"{self.path} row {row}")
        # A bytearray, since torch warns of memory that it must not write to.
        flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return flat.reshape(fitted.height, fitted.width, 3).permute(2, 0, 1)


def read_images(path: Path, limit: int | None = None, hold_out: int | None = None) -> ImageSet:
    """Read the first ``limit`` rows of a Parquet file with columns ``image`` struct{bytes, path} and ``label`` integer.

    ``hold_out`` = N leaves out rows 0, N, 2N, … of the file, such as a development set; ``limit`` counts the rest. The
    last file read stays in memory, for the next task. Raises DataError naming the file and what is wrong with it.
    """
    state = stat_data(path)
    return _read_images(path, limit, hold_out, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _read_images(path: Path, limit: int | None, hold_out: int | None, _mtime: int, _size: int) -> ImageSet:
    encoded: list[bytes] = []
    labels: list[int] = []
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            first = 0
            for rows in file.iter_batches(_READ_ROWS, columns=["image", "label"]):
                offered = rows if hold_out is None else _without_every(rows, hold_out, first)
                first += len(rows)
                wanted = offered.slice(0, None if limit is None else limit - len(labels))
                encoded += wanted.column("image").field("bytes").to_pylist()
                labels += wanted.column("label").to_pylist()
                if limit is not None and len(labels) >= limit:
                    break
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}): check evaluate.data") from error
    _check_rows(path, encoded, labels)
    return ImageSet(path, tuple(encoded), torch.tensor(labels, dtype=torch.int64))


def _without_every(rows: pa.RecordBatch, step: int, first: int) -> pa.RecordBatch:
    """Leave out the rows whose number in the file, counted from ``first``, is a multiple of ``step``."""
    return rows.take(pa.array([index for index in range(len(rows)) if (first + index) % step]))


def batches(
    images: ImageSet, preprocess: Preprocess, batch_size: int, input_size: tuple[int, ...] | None = None
) -> Iterator[Batch]:
    """Yield all images in order, ``batch_size`` at a time: pixels in 0-1, then (x - mean) / std.

    ``input_size`` = (C, H, W) is what the network takes; images of another size raise DataError with the remedy.
    """
    kept = images.cached(preprocess)
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        pixels = images.decode(start, stop, preprocess) if kept is None else kept[start:stop]
        if input_size is not None and tuple(pixels.shape[1:]) != tuple(input_size):
            raise DataError(_size_problem(images.path, tuple(pixels.shape[1:]), input_size))
        yield Batch(_normalise(pixels, preprocess), images.labels[start:stop])


def _normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    images = pixels.float().div_(255)
    if preprocess.mean is not None:
        images.sub_(torch.tensor(preprocess.mean).reshape(3, 1, 1))
    if preprocess.std is not None:
        images.div_(torch.tensor(preprocess.std).reshape(3, 1, 1))
    return images


def _resize(image: Image.Image, side: int | None) -> Image.Image:
    short = min(image.size)
    if side is None or short == side:
        return image
    width, height = (max(side, size * side // short) for size in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _centre_crop(image: Image.Image, side: int | None, where: str) -> Image.Image:
    if side is None:
        return image
    if min(image.size) < side:
        raise DataError(f"{where}: image of {image.height}x{image.width} pixels, crop is {side}: set resize to {side}")
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"


def _size_problem(path: Path, size: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    seen, needed = "x".join(map(str, size)), "x".join(map(str, wanted))
    remedy = f"set crop: {wanted[-1]} (and resize)" if len(wanted) == 3 and wanted[0] == 3 else "drop evaluate.data"
    return f"{path}: images are {seen}, the network takes {needed}: {remedy}"


def _check_columns(path: Path, schema: Any) -> None:
    columns = f"its columns are {', '.join(schema.names) or 'none'}"
    for name in ("image", "label"):
        if name not in schema.names:
            raise DataError(
                f"{path}: no column {name!r}, {columns}: give image struct{{bytes, path}} and label integer"
            )
    image, label = schema.field("image").type, schema.field("label").type
    fields = {item.name: item.type for item in image} if pa.types.is_struct(image) else {}
    if "bytes" not in fields or not (pa.types.is_binary(fields["bytes"]) or pa.types.is_large_binary(fields["bytes"])):
        raise DataError(f"{path}: column 'image' is {image}: expected struct{{bytes: binary, path: string}}")
    if not pa.types.is_integer(label):
        raise DataError(f"{path}: column 'label' is {label}: expected an integer")


def _check_rows(path: Path, encoded: list[Any], labels: list[Any]) -> None:
    if not labels:
        raise DataError(f"{path}: no rows: give a file with images")
    for name, values in (("image.bytes", encoded), ("label", labels)):
        if None in values:
            raise DataError(f"{path} row {values.index(None)}: {name} is null: drop the row")
