"""A model's source becomes a ready network, its graph and its original tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import MismatchError, NonFiniteError, UnsupportedModelError
from ..job.sources import ModelSource
from .capture import canonical_names, capture_program, export_program
from .checkpoint import read_checkpoint
from .factory import AllowList
from .graph import Graph, Op
from .locate import input_files
from .program import load_program, module_of, save_placeholder_program
from .reading import FileBytes, read_files

__all__ = ["LoadedModel", "input_files", "load_model", "rebuild_module", "save_placeholder_program"]

_SHOWN = 8
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoadedModel:
    """A network on the CPU in eval mode, without gradients, its parameters in float32."""

    source: ModelSource
    module: nn.Module
    graph: Graph
    state: dict[str, Tensor]
    """The checkpoint's tensors in their stored dtypes under the network's names; of tied ones only the first name."""
    input_shape: tuple[int, ...]
    """Of one example, batch first."""
    checkpoint_bytes: int
    """Size of the input files."""
    exported: ExportedProgram
    """The network as torch.export's program, which ``graph`` was captured from and whose weights it shares."""
    program: ExportedProgram | None = None
    """The same program where it is the source itself: an artifact then holds it."""


@dataclass(frozen=True)
class _Code:
    """A factory and its arguments, as ``AllowList.build`` wants them."""

    factory: str | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def load_model(source: ModelSource, allow: AllowList, files: Sequence[FileBytes] | None = None) -> LoadedModel:
    """Load, check and capture one model from ``files``, which are those of ``input_files(source)`` (None: read now).

    Tensors of safetensors stay views of their file's memory; every other file's memory is needed no longer afterwards.
    Raises CheckpointError, UnsafeCheckpointError, FactoryError, MismatchError, NonFiniteError or
    UnsupportedModelError, each of which fails this model's tasks only.
    """
    files = read_files(input_files(source)) if files is None else files
    size = sum(file.size for file in files)
    if source.program is not None:
        return _load_program(source, files[0], size)
    shape = tuple(source.input or ())
    module = allow.build(source)
    state = _put(module, read_checkpoint(files), str(files[0].path))
    exported = export_program(module, shape)
    return LoadedModel(source, module, capture_program(exported), state, shape, size, exported)


def rebuild_module(
    *,
    factory: str | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    program: Path | None = None,
    state: Mapping[str, Tensor],
    allow: AllowList,
) -> nn.Module:
    """Return the network of an artifact with ``state`` in it: the factory's, or that of ``program`` (a .pt2).

    It is on the CPU in eval mode, without gradients, in float32. Raises what ``load_model`` raises.
    """
    if program is not None:
        module = _program_module(load_program(read_files([program])[0]))
    else:
        module = allow.build(_Code(factory, args, kwargs or {}))
    _put(module, state, str(program or factory))
    return module


def _load_program(source: ModelSource, file: FileBytes, size: int) -> LoadedModel:
    program = load_program(file)
    _check_single_precision(program, file.path)
    first = canonical_names(program.state_dict)
    state = {name: tensor.detach() for name, tensor in program.state_dict.items() if first[name] == name}
    _check_finite(state, str(file.path))
    graph = capture_program(program)
    shape = next(node.shape for node in graph.nodes if node.op is Op.INPUT)
    return LoadedModel(source, _program_module(program), graph, state, shape, size, program, program)


def _check_single_precision(program: ExportedProgram, file: Path) -> None:
    other = [
        name
        for name, tensor in program.state_dict.items()
        if tensor.is_floating_point() and tensor.dtype is not torch.float32
    ]
    if other:
        raise UnsupportedModelError(
            f"{file}: {len(other)} tensors are not float32 ({', '.join(other[:_SHOWN])}), so the program computes in "
            "another precision; export it from module.float()"
        )


def _program_module(program: ExportedProgram) -> nn.Module:
    return _frozen(module_of(program))


def _frozen(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _put(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Put ``state`` into ``module`` (eval, float32, no gradients); return it in the module's order, tied ones once."""
    own = module.state_dict()
    first = canonical_names(own)
    state = _with_tied(state, first)
    _check_fit(own, state, origin)
    _check_finite(state, origin)
    if isinstance(module, torch.fx.GraphModule):
        # Placeholder weights are one number expanded, so they are replaced, not written to.
        module.load_state_dict(state, strict=False, assign=True)
    else:
        module.float()
        module.load_state_dict(state, strict=False)
        module.eval()
    _frozen(module)
    return {name: state[name] for name in own if name in state and first[name] == name}


def _with_tied(state: Mapping[str, Tensor], first: Mapping[str, str]) -> dict[str, Tensor]:
    """Give every name of a tied tensor the tensor of its first name (or of whichever is there)."""
    filled = dict(state)
    for name, canonical in first.items():
        if canonical != name and canonical not in filled and name in filled:
            filled[canonical] = filled[name]
    for name, canonical in first.items():
        if canonical != name and canonical in filled:
            filled[name] = filled[canonical]
    return filled


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str) -> None:
    # Old checkpoints do not have the counter, and a network in eval mode never reads it.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shaped = [
        f"{name} ({list(state[name].shape)}, expected {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    typed = [
        f"{name} ({str(state[name].dtype).removeprefix('torch.')}, expected a floating type of 16 bits or more)"
        for name, tensor in own.items()
        if name in state and tensor.is_floating_point() and state[name].dtype not in _FLOATS
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shaped, "of another type": typed}
    parts = [f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names]
    if parts:
        raise MismatchError(
            f"{origin}: the tensors do not fit the network: {'; '.join(parts)}; check the factory's arguments "
            "and that the checkpoint is of this architecture"
        )


def _check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    broken = [
        name for name, tensor in state.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise NonFiniteError(
            f"{origin}: NaN or Inf in {len(broken)} tensors: {_listed(broken)}; the checkpoint is damaged or diverged"
        )


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
