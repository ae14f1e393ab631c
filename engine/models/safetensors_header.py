"""The header of a safetensors file, checked before anything is made of its bytes.

The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors, without holes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

HEADER_LIMIT = 100_000_000
"""Bytes, as the format's own readers have it."""
_LENGTH_BYTES = 8
_MOST_AXES = 64

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one number of each dtype that is read."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file."""

    name: str
    dtype: str
    """A name of ITEM_BYTES."""
    shape: tuple[int, ...]
    begin: int
    """Where it begins, in bytes from the file's beginning."""
    end: int


class HeaderError(ValueError):
    """What is wrong with a header, in a few words."""


def stored_tensors(data: memoryview) -> list[StoredTensor]:
    """Return the tensors of a safetensors file in the order of their bytes. Raises HeaderError.

    ``data`` is the whole file.
    """
    start = _LENGTH_BYTES + _header_length(data)
    header = _parsed(bytes(data[_LENGTH_BYTES:start]))
    _check_metadata(header.pop("__metadata__", None))
    tensors = [_tensor(name, entry, start, len(data)) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_no_holes(tensors, start, len(data))
    return tensors


def _header_length(data: memoryview) -> int:
    if len(data) < _LENGTH_BYTES:
        raise HeaderError(f"{len(data)} bytes, too few for a header")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > HEADER_LIMIT:
        raise HeaderError(f"its header claims {length} bytes, the format allows {HEADER_LIMIT}")
    if length > len(data) - _LENGTH_BYTES:
        raise HeaderError(f"its header claims {length} bytes, the file has {len(data)}")
    return length


def _parsed(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise HeaderError("its header is no JSON object")
    try:
        found: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no JSON: {error}") from error
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HeaderError(f"its header has {name!r} twice")
        found[name] = value
    return found


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its __metadata__ is no map of texts to texts")


def _tensor(name: str, entry: Any, start: int, size: int) -> StoredTensor:
    dtype, shape, offsets = _fields(name, entry)
    begin, end = offsets
    if begin > end or end > size - start:
        raise HeaderError(f"tensor {name} lies at {begin} to {end} of {size - start} bytes")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed != end - begin:
        raise HeaderError(f"tensor {name} has {end - begin} bytes; {dtype} {list(shape)} takes {needed}")
    return StoredTensor(name, dtype, shape, start + begin, start + end)


def _fields(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"tensor {name} has the dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise HeaderError(f"the shape of tensor {name} is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"data_offsets of tensor {name} are no two places")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_no_holes(tensors: list[StoredTensor], start: int, size: int) -> None:
    at, before = start, "the header"
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps" if tensor.begin < at else "leaves a hole behind"
            raise HeaderError(f"tensor {tensor.name} {what} {before}")
        at, before = tensor.end, tensor.name
    if at != size:
        raise HeaderError(f"{size - at} bytes behind its tensors belong to none")
