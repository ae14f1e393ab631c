"""Files of tensors in the safetensors format: the same tensors give the same bytes, hashed while they are written.

The library's own writer puts the metadata in an order that changes from process to process in some of its versions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError, UnsupportedModelError
from ..faults import reach
from .manifest import FileEntry

_CHUNK = 16 * 2**20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WIDTHS = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileEntry:
    """Write a new safetensors file and return its size and sha256; it is not yet brought to the disk.

    Wider elements come first, so that all are aligned; names are in order within a width. Raises OSError, and
    UnsupportedModelError for a dtype that the format lacks.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in _chunks(tensors, order, metadata):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            reach("mid-pack")
    return FileEntry(size=size, sha256=digest.hexdigest())


def _chunks(
    tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    header = _header(tensors, order, metadata)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in order:
        data = _bytes(tensors[name])
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(f"tensor {name}: {tensor.dtype} cannot be stored; convert it to float32")
        end = offset + tensor.numel() * tensor.element_size()
        fields[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


class TensorFile:
    """An open safetensors file; tensors are read one at a time, errors are ArtifactErrors that name the file."""

    def __init__(self, path: Path) -> None:
        """Open ``path``."""
        self.path = path
        with self._named():
            opened: Any = safe_open(path, framework="pt")
        self._file, self.names = opened, frozenset[str](opened.keys())

    def metadata(self) -> dict[str, str]:
        """Return the header's string map."""
        return dict(self._file.metadata() or {})

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        self._check(name)
        with self._named():
            tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype (in the format's words) and shape from the header."""
        self._check(name)
        with self._named():
            found = self._file.get_slice(name)
            return str(found.get_dtype()), tuple(found.get_shape())

    def size(self, name: str) -> int:
        """Return the bytes of a tensor, from the header."""
        dtype, shape = self.layout(name)
        return math.prod(shape) * _WIDTHS[dtype]

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ArtifactError(f"{self.path}: tensor {name} is missing; the file was altered, run the job again")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{self.path}: cannot be read: {error}; the file was altered, run the job again"
            ) from error
