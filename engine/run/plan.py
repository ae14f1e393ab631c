"""What a job would run, without starting or writing anything."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact.manifest import is_complete
from ..errors import ModelError
from ..job.expand import Task, expand
from ..job.loader import LoadedJob
from ..job.methods import BitPlan, DfmpcPlan, RtnPlan
from ..models.factory import AllowList
from .schedule.devices import device_slots
from .shared import ModelKeys
from .sizes import predicted_host_bytes, source_bytes, source_files
from .store import Store

_HEADER_LIMIT = 100 * 2**20
_MANIFEST_BYTES = 2048
"""What a layer takes at most in the manifest and the header."""
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class PlanRow:
    """One task."""

    task: str
    checkpoint_bytes: int
    predicted_bytes: int
    """Of the artifact: an upper estimate, see ``predicted_artifact_bytes``."""
    predicted_memory_bytes: int
    """Of a worker, see ``predicted_host_bytes``."""
    finished: bool
    """The artifact is in the store and will be reused."""


@dataclass(frozen=True)
class PlanTotals:
    """Sums over the tasks; a model's checkpoint counts once."""

    tasks: int
    finished: int
    checkpoint_bytes: int
    predicted_bytes: int
    """Of the artifacts that are not there yet."""
    largest_memory_bytes: int
    free_bytes: int
    """On the output's disk."""


@dataclass(frozen=True)
class Plan:
    """What a job would do; ``problems`` are what would make tasks fail, as far as that can be seen now."""

    rows: list[PlanRow]
    totals: PlanTotals
    problems: list[str]


def make_plan(loaded: LoadedJob, allow_code: Sequence[str] = ()) -> Plan:
    """Return what running ``loaded`` would do. Reads every input once, for its digest; no code of a model runs.

    Raises UsageError where ``resources.devices`` names a device that is not there.
    """
    device = device_slots(loaded.job.resources.devices)[0]
    groups: dict[str, list[Task]] = {}
    for task in expand(loaded):
        groups.setdefault(task.model.name, []).append(task)
    allow, threads = AllowList.default(allow_code), loaded.job.resources.threads
    problems: list[str] = []
    rows = [
        row
        for tasks in groups.values()
        for row in _group_rows(loaded, tasks, ModelKeys(tasks[0].model, allow, device, threads), problems)
    ]
    totals = PlanTotals(
        tasks=len(rows),
        finished=sum(row.finished for row in rows),
        checkpoint_bytes=sum(source_bytes(tasks[0].model) for tasks in groups.values()),
        predicted_bytes=sum(row.predicted_bytes for row in rows if not row.finished),
        largest_memory_bytes=max(row.predicted_memory_bytes for row in rows),
        free_bytes=free_bytes(loaded.store),
    )
    return Plan(rows, totals, problems + _limits(loaded, rows, totals))


def _group_rows(loaded: LoadedJob, tasks: Sequence[Task], shared: ModelKeys, problems: list[str]) -> Iterator[PlanRow]:
    """Yield the rows of one model's tasks; what would fail them goes to ``problems``."""
    source = tasks[0].model
    store, size = Store(loaded.store), source_bytes(source)
    try:
        keys = {task.id: shared.key(task).key for task in tasks}
    except ModelError as error:
        problems.append(f"{source.name}: {error}")
        keys = {}
    for task in tasks:
        key = keys.get(task.id)
        yield PlanRow(
            task=task.id,
            checkpoint_bytes=size,
            predicted_bytes=predicted_artifact_bytes(task),
            predicted_memory_bytes=predicted_host_bytes(size, [task.plan]),
            finished=key is not None and is_complete(store.artifact_folder(source.name, task.plan.name, key)),
        )


def _limits(loaded: LoadedJob, rows: Sequence[PlanRow], totals: PlanTotals) -> list[str]:
    found = []
    if totals.predicted_bytes > totals.free_bytes:
        found.append(
            f"{loaded.store}: {totals.free_bytes} bytes are free, the artifacts may take {totals.predicted_bytes}"
        )
    limit = loaded.job.resources.host_memory
    return found + [
        f"{row.task}: predicted to need {row.predicted_memory_bytes} bytes of memory, host_memory is {limit:.0f}"
        for row in rows
        if limit is not None and row.predicted_memory_bytes > limit
    ]


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
