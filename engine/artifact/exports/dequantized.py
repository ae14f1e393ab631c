"""Exports without codes: torch.export's program of the dequantized network, and its tensors by their original names."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ..tensors import write_tensors
from .report import Precision
from .source import Captured, Source, capture_source

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def write_program(path: Path, source: Source, dtype: Precision) -> Captured:
    """Write the dequantized network as a new .pt2 file that computes in ``dtype``; return the program.

    Raises UnsupportedModelError where torch.export cannot follow the network or a value does not fit ``dtype``.
    """
    cast_state(source.module.state_dict(), dtype)
    captured = capture_source(source, DTYPES[dtype])
    captured.program._example_inputs = None
    # torch's own writer aborts the process where the disk is full
    archive = BytesIO()
    torch.export.save(captured.program, archive)
    path.write_bytes(archive.getvalue())
    return captured


def write_state(path: Path, source: Source, dtype: Precision, *, pickled: bool) -> None:
    """Write the network's whole state dict, floating tensors as ``dtype``, as a new file.

    That is a safetensors file, or what torch.save writes where ``pickled``. Every name of the original network's
    ``state_dict()`` is there, tied names and counters too, so ``load_state_dict(strict=True)`` takes it.
    Raises UnsupportedModelError where a value does not fit ``dtype``.
    """
    state = cast_state(source.module.state_dict(), dtype)
    if not pickled:
        write_tensors(path, state, {"format": "pt"})
        return
    # through memory, so that the name within the archive does not depend on the path
    file = BytesIO()
    torch.save(state, file)
    path.write_bytes(file.getvalue())


def cast_state(state: dict[str, Tensor], dtype: Precision) -> dict[str, Tensor]:
    """Return ``state`` with its floating tensors as ``dtype``. Raises UnsupportedModelError where one overflows."""
    made = {}
    for name, tensor in state.items():
        made[name] = tensor.detach().to(DTYPES[dtype]) if tensor.is_floating_point() else tensor.detach()
        if not bool(made[name].isfinite().all()):
            raise UnsupportedModelError(
                f"{name}: {float(tensor.abs().max()):g} is beyond {dtype.value}; use --dtype bf16 or fp32"
            )
    return made
