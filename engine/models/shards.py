"""A sharded checkpoint: the index.json that says which shard holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .reading import FileBytes

if TYPE_CHECKING:
    from torch import Tensor


def index_shards(index: Path) -> list[Path]:
    """Return the shard files that ``index`` names, each once, in its order.

    Raises CheckpointError where it is no index or a shard's name is not a plain file name.
    """
    try:
        content = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}); check its permissions") from error
    shards = list(dict.fromkeys(_weight_map(index, content).values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name beside the index; refused")
    return [index.parent / shard for shard in shards]


def check_against_index(index: FileBytes, tensors: Mapping[str, Tensor], owner: Mapping[str, str]) -> dict[str, Tensor]:
    """Return ``tensors`` in the index's order.

    ``owner`` is the shard that held each. Raises CheckpointError naming tensors that are missing, in another shard
    than the index says, or not in the index.
    """
    weight_map = _weight_map(index.path, bytes(index.data))
    wrong = [
        f"{name} (in {owner.get(name, 'no shard')}, not {shard})"
        for name, shard in weight_map.items()
        if owner.get(name) != shard
    ]
    wrong += [f"{name} (in {shard}, not in the index)" for name, shard in owner.items() if name not in weight_map]
    if wrong:
        raise CheckpointError(
            f"{index.path}: {len(wrong)} tensors are not where the index says: {', '.join(wrong[:8])}; "
            "copy the whole checkpoint again"
        )
    return {name: tensors[name] for name in weight_map}


def _weight_map(index: Path, content: bytes) -> dict[str, str]:
    try:
        loaded = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON ({error}); copy it again") from error
    found = loaded.get("weight_map") if isinstance(loaded, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise CheckpointError(
            f"{index}: has no weight_map of tensor names to shard names; expected a safetensors index"
        )
    return found
