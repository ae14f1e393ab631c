"""torch.export programs (.pt2): loaded without running code of theirs, and saved with placeholder weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram


def load_program(path: Path) -> ExportedProgram:
    """Load."""
    return torch.export.load(path)


def save_placeholder_program(program: ExportedProgram, path: Path) -> None:
    """Write."""
    raise NotImplementedError
