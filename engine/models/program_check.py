"""What a .pt2 archive may hold: checked before torch.export reads it, because its reader runs code in many places.

torch's reader falls back from ``weights_only=True`` to a plain unpickling, imports modules that a pytree context names,
evaluates shape expressions, and writes names into generated Python. So: no pickle that needs more than
``weights_only=True``, no native code, only ATen operators, and names that are names.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader

from ..errors import CheckpointError, UnsafeCheckpointError, UnsupportedModelError
from .memory_file import opened
from .pickles import refusal
from .reading import FileBytes

READER_ERRORS = (RuntimeError, ValueError, AssertionError, KeyError, IndexError, TypeError, AttributeError, OSError)
"""What the reader raises for an archive that is damaged or made up."""

_MODEL = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_NATIVE = ("data/aotinductor/", "data/executorch/")

_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims)\.\w+\.\w+"
    r"|_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(?:int|float|max|min|not|sqrt|ite|sum)"
    r"|math\.(?:ceil|floor|trunc)"
    r"|torch\.ops\.higher_order\.wrap_with_(?:set_grad_enabled|autocast)"
)
_READS_FILES = re.compile(r"torch\.ops\.aten\.(?:from_file|save|load)\.")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|")
_QUALIFIED = re.compile(r"[\w.\-]+")
_EXPRESSION = re.compile(
    r"(?:Symbol\('\w+'(?:, (?:positive|nonnegative|integer|real)=(?:True|False))*\)"
    r"|(?:Integer|Rational|Add|Mul|Pow|Mod|Max|Min|FloorDiv|PythonMod|CeilDiv|CleanDiv|Identity)(?=\()"
    r"|[su]\d++|\d++|[\s+\-*/(),])*+"
)
"""Possessive, or a long row of digits before a wrong character would take exponential time."""

_REMEDY = "export the plain network again with torch.export.save"

_NAME_KEYS = {"name", "as_name"}
_QUALIFIED_KEYS = {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn"}
_TREE_KEYS = {"in_spec", "out_spec"}


def check_archive(file: FileBytes) -> None:
    """Raise unless torch's reader can load ``file`` without running code of the file's own.

    Raises CheckpointError (no such archive, truncated), UnsafeCheckpointError and UnsupportedModelError.
    """
    path = file.path
    try:
        _refuse_torch_save(file)
        reader = PT2ArchiveReader(opened(file.data))
        names = reader.get_file_names()
        _check_members(path, names)
        for name in _pickles(reader, names, path):
            _check_pickle(path, name, reader.read_bytes(name))
        _check_json(path, json.loads(reader.read_bytes(_MODEL)))
    except READER_ERRORS as error:
        raise CheckpointError(damaged(path, error)) from error


def _refuse_torch_save(file: FileBytes) -> None:
    """Recognise the zip of a pickle that torch.save writes; torch's own words for it are about its archives."""
    try:
        with zipfile.ZipFile(opened(file.data)) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return  # the reader says what is wrong with it
    if "data.pkl" in names and "archive_format" not in names:
        raise CheckpointError(
            f"{file.path}: made by torch.save, not torch.export.save: a state dict goes under checkpoint, with a "
            "factory; a program is written by torch.export.save(torch.export.export(network, (example,)), path)"
        )


def damaged(path: Path, error: Exception) -> str:
    """Return the text for an archive that cannot be read."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{path}: truncated, corrupt, or no program of torch.export.save of torch 2.8 or newer ({said}); "
        "export or copy it again"
    )


def _check_members(path: Path, names: list[str]) -> None:
    models = [name for name in names if name.startswith("models/")]
    if models != [_MODEL]:
        raise CheckpointError(f"{path}: holds the programs {models or 'none'}; expected one, {_MODEL}")
    native = [name for name in names if name.startswith(_NATIVE)]
    if native:
        raise UnsafeCheckpointError(f"{path}: holds compiled code ({native[0]}), which is never loaded; {_REMEDY}")


def _pickles(reader: PT2ArchiveReader, names: list[str], path: Path) -> list[str]:
    """Return the members that torch's reader would unpickle; custom objects among them are refused at once."""
    for folder in (_WEIGHTS, _CONSTANTS):
        config_name = f"{folder}model_{folder.split('/')[1]}_config.json"
        config = json.loads(reader.read_bytes(config_name)) if config_name in names else {"config": {}}
        for name, payload in config["config"].items():
            plain = not payload["use_pickle"] and payload["path_name"].startswith(("weight_", "tensor_"))
            if not plain or not _QUALIFIED.fullmatch(name):
                raise UnsafeCheckpointError(
                    f"{path}: {name!r} is stored as a pickled object ({payload['path_name']}), which could run code; "
                    f"{_REMEDY}"
                )
    legacy = [f"{_WEIGHTS}model.pt", f"{_CONSTANTS}model.pt", "data/sample_inputs/model.pt"]
    return [name for name in legacy if name in names]


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path}: {name} needs more than weights_only=True, so loading it would run code ({refusal(error)}); "
            f"{_REMEDY}"
        ) from error


def _check_json(path: Path, value: Any) -> None:
    """Walk the serialized program and refuse what torch's reader would evaluate, import or write into code."""
    if isinstance(value, list):
        for item in value:
            _check_json(path, item)
    elif isinstance(value, dict):
        if value.get("constant_input") is not None:
            raise UnsupportedModelError(f"{path}: an input is not a tensor; export a network of one tensor input")
        for key, item in value.items():
            problem = _problem(key, item)
            if problem:
                raise UnsafeCheckpointError(f"{path}: {problem}; it is not loaded. {_REMEDY[0].upper()}{_REMEDY[1:]}")
            _check_json(path, item)


def _problem(key: str, item: Any) -> str:
    """Return what is wrong with one entry of the program's JSON, or an empty text."""
    if key in ("target", "as_operator") and item is not None:
        return "" if _allowed_operator(item) else f"it calls {item!r}, which is not an ATen operator that only computes"
    if isinstance(item, str):
        if key in _NAME_KEYS and not _IDENTIFIER.fullmatch(item):
            return f"{key} {item!r} is not an identifier"
        if key in _QUALIFIED_KEYS and item and not _QUALIFIED.fullmatch(item):
            return f"{key} {item!r} is not a tensor's name"
        if key == "expr_str" and not _EXPRESSION.fullmatch(item):
            return f"the shape expression {item!r} is not plain arithmetic"
        if key in _TREE_KEYS and item and not _plain_tree(json.loads(item)):
            return f"{key} {item!r} is not made of tuples, lists and dicts"
    if key == "forward_arg_names" and not all(_IDENTIFIER.fullmatch(str(name)) for name in item or []):
        return f"forward_arg_names {item!r} are not identifiers"
    return ""


def _allowed_operator(target: object) -> bool:
    return isinstance(target, str) and bool(_OPERATOR.fullmatch(target)) and not _READS_FILES.match(target)


def _plain_tree(spec: Any) -> bool:
    """Whether a serialized pytree (``[1, {type, context, children_spec}]``) has built-in containers only."""
    if isinstance(spec, list):
        return len(spec) == 2 and spec[0] == 1 and _plain_tree(spec[1])
    if spec["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
        return False
    context = json.loads(spec["context"]) if spec["context"] is not None else None
    names = context if isinstance(context, list) else []
    plain = context is None or isinstance(context, list)
    return (
        plain
        and all(isinstance(name, str) and _IDENTIFIER.fullmatch(name) for name in names)
        and all(_plain_tree(child) for child in spec["children_spec"])
    )
