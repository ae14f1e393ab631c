"""torch.export programs (.pt2): loaded without running code of theirs, and saved with placeholder weights."""

from __future__ import annotations

import copy
import warnings
from io import BytesIO
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from ..errors import CheckpointError, UsageError
from .memory_file import opened
from .program_check import READER_ERRORS, check_archive, damaged
from .reading import FileBytes

_ASSERTION = "aten._assert_tensor_metadata.default"
"""Says that a tensor lies on the device of the export, which would keep the program off every other one."""


def load_program(file: FileBytes) -> ExportedProgram:
    """Return the program of a .pt2 file on the CPU; its tensors have memory of their own.

    Raises CheckpointError where it is damaged, UnsafeCheckpointError where loading it would run code.
    """
    check_archive(file)
    try:
        # torch.export.load falls back to an older format, pickles included, when this fails.
        program = load_pt2(opened(file.data)).exported_programs["model"]
    except READER_ERRORS as error:
        raise CheckpointError(damaged(file.path, error)) from error
    # Source code that .module() would evaluate; the shapes of the placeholders are checked without it.
    program._guards_code = []
    for node in list(program.graph.nodes):
        # Holds paths of the machine that exported it, which an artifact should not repeat.
        node.meta.pop("stack_trace", None)
        if str(node.target) == _ASSERTION:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def module_of(program: ExportedProgram) -> nn.Module:
    """Return the program's network in eval mode; ``train()`` of it raises UsageError."""
    module: nn.Module = program.module()
    # torch's own methods of this module raise for eval() too, and so does eval() of whatever it is put into.
    vars(module).update(train=MethodType(_train, module), eval=MethodType(_eval, module))
    return module.eval()


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise UsageError(
            "train(): an exported program has eval mode only, its norms and dropouts are fixed; "
            "train the network that it was exported from"
        )
    return nn.Module.train(module, False)


def _eval(module: nn.Module) -> nn.Module:
    return module.train(False)


def save_placeholder_program(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` with placeholder weights: every tensor of its state dict becomes one zero, expanded.

    The same program gives the same bytes (for one version of torch). Example inputs are left out. ``rebuild_module``
    loads it and puts real tensors in. Raises OSError where the file cannot be written.
    """
    light = copy.copy(program)
    light._state_dict = _placeholders(program.state_dict)
    light._example_inputs = None
    # torch's own writer aborts the process where the disk is full
    archive = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(light, archive)
    path.write_bytes(archive.getvalue())


def _placeholders(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[tuple[object, ...], Tensor] = {}
    found = {}
    for name, tensor in state.items():
        # Tied tensors stay tied, so that one name of the two is enough to fill both.
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        found[name] = made.setdefault(key, _placeholder(tensor))
    return found


def _placeholder(tensor: Tensor) -> Tensor:
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros
