"""Whether a layer's stored parts have their shapes, and every code lies in its grid."""

from __future__ import annotations

import torch
from dfmpc.kernels import Grid, unpack
from torch import Tensor

from ..errors import ArtifactError
from .manifest import LayerEntry
from .tensors import TensorFile

_ELEMENTS = 2**24
"""Codes decoded at a time."""


def layer_findings(file: TensorFile, entry: LayerEntry) -> list[str]:
    """Return what is wrong with the parts of one layer; every finding names the tensor and the value."""
    findings = shape_findings(file, entry)
    if findings:
        return findings
    try:
        tensors = {name: file.tensor(name) for name in entry.parts}
    except ArtifactError as error:
        return [str(error)]
    findings += _code_findings(tensors[f"{entry.weight}.codes"], entry)
    for name in entry.parts[1:]:
        findings += _factor_findings(name, tensors[name])
    return findings


def expected_layouts(entry: LayerEntry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each part, as its manifest entry has it."""
    scale = (1, 1) if entry.layer_wise else (entry.rows, entry.format.groups)
    layouts = {
        "codes": ("U8", (entry.rows, entry.format.row_bytes)),
        "scale": ("F32", scale),
        "zero_point": ("F32", scale),
        "input_scale": ("F32", (entry.layer.in_channels,)),
    }
    return {name: layouts[name.removeprefix(f"{entry.weight}.")] for name in entry.parts}


def shape_findings(file: TensorFile, entry: LayerEntry) -> list[str]:
    """Return where dtypes and shapes of the stored parts are not what the manifest entry says."""
    layer, findings = entry.layer, []
    if (entry.rows, entry.length) != (layer.out_channels, layer.length):
        findings.append(f"{entry.weight}: {entry.rows} rows of {entry.length} do not make the shape {entry.shape}")
    if (entry.grid is Grid.ASYMMETRIC) != entry.zero_point:
        findings.append(f"{entry.weight}: grid {entry.grid} with zero_point {entry.zero_point}")
    if entry.grid is Grid.TERNARY and entry.bits != 2:
        findings.append(f"{entry.weight}: ternary codes of {entry.bits} bits")
    for name, expected in expected_layouts(entry).items():
        if (found := file.layout(name)) != expected:
            findings.append(f"{name}: {found[0]} {list(found[1])}, expected {expected[0]} {list(expected[1])}")
    return findings


def _code_findings(codes: Tensor, entry: LayerEntry) -> list[str]:
    lowest, highest = allowed_codes(entry)
    if not codes.numel():
        return []
    findings = _padding_findings(codes, entry)
    step = max(1, _ELEMENTS // entry.length)
    for start in range(0, entry.rows, step):
        found = unpack(codes[start : start + step], entry.bits, entry.length)
        bad = torch.nonzero((found < lowest) | (found > highest))
        if len(bad):
            row, column = (int(index) for index in bad[0])
            value = int(found[row, column])
            findings.append(
                f"{entry.weight}.codes: code {value} in row {start + row}, column {column} ({len(bad)} such in these "
                f"rows); {entry.grid} codes of {entry.bits} bits are {lowest} to {highest}"
            )
            break
    return findings


def allowed_codes(entry: LayerEntry) -> tuple[int, int]:
    """Return the least and the greatest code of the layer's grid."""
    if entry.grid is Grid.TERNARY:
        return 0, 2
    return (1 if entry.grid is Grid.SYMMETRIC else 0), 2**entry.bits - 1


def _padding_findings(codes: Tensor, entry: LayerEntry) -> list[str]:
    used = entry.length * entry.bits % 8
    last = codes[:, -1] >> used if used else torch.zeros(0)
    rows = torch.nonzero(last)
    if not len(rows):
        return []
    row = int(rows[0])
    return [
        f"{entry.weight}.codes: last byte of row {row} is {int(codes[row, -1])}, its upper {8 - used} bits must be 0"
    ]


def _factor_findings(name: str, factors: Tensor) -> list[str]:
    """Check that factors are finite and, but for zero points, not negative."""
    bad = ~torch.isfinite(factors)
    if not name.endswith(".zero_point"):
        bad |= factors < 0
    where = torch.nonzero(bad)
    if not len(where):
        return []
    index = [int(part) for part in where[0]]
    return [f"{name}: value {float(factors[tuple(index)])} at {index}; expected finite numbers that are not negative"]
