"""Checkpoints: the tensors of files that are in memory, without running any code the files may hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsafeCheckpointError
from .memory_file import opened
from .pickles import refusal
from .reading import FileBytes
from .safetensors_header import HeaderError, StoredTensor, stored_tensors
from .shards import check_against_index

_PICKLES = (".pt", ".pth", ".th", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_READER_ERRORS = (RuntimeError, AssertionError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError)
"""What torch.load raises for a file that is damaged."""
_DAMAGED = "truncated or corrupt; copy or download it again"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_checkpoint(files: Sequence[FileBytes]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the CPU in their stored dtypes, names and order.

    ``files`` are one, or an index.json and its shards. The tensors of safetensors are views of the files' memory and
    keep it alive; the others have memory of their own. Pickles load with ``weights_only=True``; ``state_dict``,
    ``model_state_dict`` and ``model`` are looked into, and a ``module.`` prefix that every name has is dropped. Raises
    CheckpointError and UnsafeCheckpointError.
    """
    if len(files) == 1:
        return _read_one(files[0])
    index, *shards = files
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        for name, tensor in _read_one(shard).items():
            if name in owner:
                raise CheckpointError(
                    f"{index.path}: tensor {name} is in both {owner[name]} and {shard.path.name}; keep one"
                )
            owner[name], tensors[name] = shard.path.name, tensor
    return check_against_index(index, tensors, owner)


def _read_one(file: FileBytes) -> dict[str, Tensor]:
    if file.path.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.path.suffix in _PICKLES:
        return _state_dict(_read_pickle(file), file)
    raise CheckpointError(
        f"{file.path}: unknown suffix {file.path.suffix!r}; expected .safetensors, {', '.join(_PICKLES)}"
    )


def _read_safetensors(file: FileBytes) -> dict[str, Tensor]:
    try:
        return {stored.name: _tensor(file.data, stored) for stored in stored_tensors(file.data)}
    except HeaderError as error:
        raise CheckpointError(f"{file.path}: {_DAMAGED} ({error})") from error


def _tensor(data: memoryview, stored: StoredTensor) -> Tensor:
    """Return a view of ``data``, or a copy where the bytes do not lie as the dtype must."""
    dtype = _DTYPES[stored.dtype]
    if stored.begin == stored.end:
        return torch.empty(stored.shape, dtype=dtype)
    if stored.begin % dtype.itemsize:
        return torch.frombuffer(bytearray(data[stored.begin : stored.end]), dtype=dtype).reshape(stored.shape)
    count = (stored.end - stored.begin) // dtype.itemsize
    return torch.frombuffer(data, dtype=dtype, count=count, offset=stored.begin).reshape(stored.shape)


def _read_pickle(file: FileBytes) -> object:
    try:
        return torch.load(opened(file.data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise CheckpointError(f"{file.path}: {_DAMAGED} ({_first_line(error)})") from error
        raise UnsafeCheckpointError(
            f"{file.path}: loading it would run code: {refusal(error)}; convert it to safetensors where you trust it"
        ) from error
    except _READER_ERRORS as error:
        raise CheckpointError(f"{file.path}: {_DAMAGED} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _state_dict(loaded: object, file: FileBytes) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{file.path}: holds a {type(loaded).__name__}; expected a state dict (names to tensors)")
    others = [f"{name} ({type(value).__name__})" for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{file.path}: {len(others)} entries are not tensors: {', '.join(others[:8])}; "
            "save module.state_dict() alone"
        )
    return _without_prefix({str(name): tensor.detach() for name, tensor in loaded.items()})


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}
