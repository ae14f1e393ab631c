"""Launch shapes measured on a card: kernels/configs/<gpu>.json, written by scripts/tune_kernels.py, never searched.

A card without a file gets the shapes of shapes.py. Results never depend on a shape (docs/design.md, "Exact sums").
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dfmpc.errors import UsageError

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Choice:
    """The tile of one kernel's segments of whole 16-byte loads, of ``longest`` elements or more than half as many."""

    kernel: str
    itemsize: int
    longest: int
    threads: int
    chunks: int
    loop: bool
    num_warps: int


def config_name(gpu: str) -> str:
    """Return the name of a card's file: ``NVIDIA H100 80GB HBM3`` has ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@cache
def choices_for(device: torch.device) -> tuple[Choice, ...]:
    """Return what was measured on a device's card; nothing for a card without a file and for the CPU.

    Raises:
        UsageError: the card's file cannot be read.
    """
    if device.type != "cuda":
        return ()
    return read_choices(FOLDER / config_name(torch.cuda.get_device_name(device)))


@cache
def read_choices(file: Path) -> tuple[Choice, ...]:
    """Return the choices of a file, the shortest segments first; nothing where there is no file.

    Raises:
        UsageError: the file is not what ``write_choices`` writes.
    """
    try:
        found = json.loads(file.read_text())
        choices = [_choice(item) for item in found["shapes"]]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: the launch shapes cannot be read: {type(error).__name__}: {error}; write them anew with "
            "scripts/tune_kernels.py, or delete the file to launch with the default shapes"
        ) from error
    return tuple(sorted(choices, key=lambda choice: choice.longest))


def _choice(item: dict[str, Any]) -> Choice:
    choice = Choice(**item)
    powers = (choice.threads, choice.num_warps)
    numbers = [value for value in asdict(choice).values() if type(value) is int]
    if len(numbers) != len(fields(Choice)) - 2 or min(numbers) < 1 or any(n & (n - 1) for n in powers):
        raise ValueError(f"{item} needs whole positive numbers, threads and num_warps powers of two")
    if choice.threads > 32 * choice.num_warps or choice.chunks > 63 or choice.threads * 16 // choice.itemsize < 8:
        raise ValueError(f"{item} has more threads a segment than a program, over 63 chunks, or chunks of under 8")
    return choice


def choice_for(choices: tuple[Choice, ...], kernel: str, itemsize: int, length: int) -> Choice | None:
    """Return what was measured for segments of ``length``: of those up to twice as long the shortest, or none."""
    alike = (choice for choice in choices if choice.kernel == kernel and choice.itemsize == itemsize)
    return next((choice for choice in alike if choice.longest // 2 < length <= choice.longest), None)


def write_choices(file: Path, gpu: str, made: str, choices: list[Choice]) -> None:
    """Write a card's file; ``made`` says by which command, with which versions and when."""
    shapes = [asdict(choice) for choice in choices]
    lines = ",\n  ".join(json.dumps(shape) for shape in shapes)
    head = f'"gpu": {json.dumps(gpu)},\n "made": {json.dumps(made)}'
    file.write_text(f'{{\n {head},\n "shapes": [\n  {lines}\n ]\n}}\n')
