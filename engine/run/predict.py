"""What the artifacts of tasks will take on a disk, foretold from job and file headers, and what is free there."""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from ..job.methods import BitPlan, DfmpcPlan, RtnPlan
from ..job.task import Task
from .sizes import source_bytes, source_files

_HEADER_LIMIT = 100 * 2**20
_MANIFEST_BYTES = 2048
"""What a layer takes at most in the manifest and the header."""
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def predicted_artifact_bytes(task: Task) -> int:
    """Return an upper estimate of an artifact's size in bytes, from the task's widest bits or its budget.

    For safetensors it comes from the header: floating tensors with two or more axes become codes and a float32 scale a
    row (or a group), the others stay. Any other file is taken for float32 weights throughout.
    """
    budget = task.plan.budget if isinstance(task.plan, DfmpcPlan) else None
    if budget is not None and budget.bits_per_weight is None:
        return budget.bytes or int(source_bytes(task.model) / (budget.ratio or 1))
    bits = _widest_bits(task)
    headers = [_header(file) for file in source_files(task.model) if file.suffix == ".safetensors"]
    if headers and all(header is not None for header in headers):
        return sum(_tensor_bytes(entry, bits) for header in headers if header for entry in header)
    return -(-source_bytes(task.model) * bits // 32)


def _widest_bits(task: Task) -> int:
    if isinstance(task.plan, DfmpcPlan) and task.plan.budget is not None:
        # The budget is kept on average, scales and layer rules included, and no layer gets more than 8 bits.
        return min(8, math.ceil(task.plan.budget.bits_per_weight or 8))
    return max([_own_bits(task.plan), *(rule.bits for rule in task.layers if rule.bits is not None)])


def _own_bits(plan: BitPlan) -> int:
    if isinstance(plan, RtnPlan):
        return plan.bits
    if isinstance(plan, DfmpcPlan):
        return max(plan.low, plan.high)
    return max(plan.width("low"), plan.width("high"))


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    size: int


def _tensor_bytes(tensor: _Tensor, bits: int) -> int:
    if tensor.dtype not in _FLOAT_BYTES or len(tensor.shape) < 2:
        return tensor.size
    weights = tensor.size // _FLOAT_BYTES[tensor.dtype]
    rows = max(tensor.shape[:2])
    return -(-weights * bits // 8) + rows * (4 + 1) + _MANIFEST_BYTES


def _header(file: Path) -> list[_Tensor] | None:
    """Return the tensors that a safetensors file names; None where it cannot be read."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(min(length, _HEADER_LIMIT)))
        return [
            _Tensor(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return None


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk on which ``folder`` lies or would lie."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
