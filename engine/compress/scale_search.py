"""The scales that rounding starts from: the exact ternary optimum and the clip search, from the weight alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dfmpc.kernels.formats import CodeFormat, Grid
from dfmpc.kernels.grids import grid_steps
from dfmpc.kernels.segments import code_format, row_chunks, row_parts
from torch import Tensor

CLIPS = 25
"""Clips that a search from 0.4 tries; one from 0.7 tries 13, in the same steps of 0.025."""


@dataclass(frozen=True)
class Rounded:
    """Codes that a method chose itself, ready for ``encode.encode``."""

    format: CodeFormat
    levels: Tensor
    """uint8 [rows, length]: the stored integers, columns in their own order."""
    scale: Tensor
    """float32 [rows, groups], or [1, 1] where the format is layer-wise."""
    zero_point: Tensor | None = None
    """float32, the scale's shape; only for the asymmetric grid."""
    damp: float = 0.0
    """The largest damping that error feedback took, relative to mean(diag H); 0 where none was done."""
    fallback: str = ""
    """Why some or all rows were rounded to nearest instead; empty where none were."""


@dataclass(frozen=True)
class GridScale:
    """Float32 factors of a grid, [rows, groups] or [1, 1]; the zero point only for the asymmetric grid."""

    scale: Tensor
    zero_point: Tensor | None = None


Segmented = Callable[[Tensor], Tensor]


def _by_segment(rows: Tensor, format: CodeFormat, found: Segmented) -> Tensor:
    """Apply ``found`` ([segments, length] → [n, segments]) to all segments: float32 [n, rows, groups] or [n, 1, 1]."""
    if format.layer_wise:
        return found(rows.reshape(1, -1))[:, :, None]
    parts = []
    for part in row_parts(format.length, format.group_size):
        pieces = [
            found(rows[chunk, part.columns].reshape(-1, part.length)) for chunk in row_chunks(len(rows), format.length)
        ]
        whole = torch.cat(pieces, 1)
        parts.append(whole.view(len(whole), len(rows), -1))
    return torch.cat(parts, 2)


def spread(factor: Tensor, format: CodeFormat, rows: int) -> Tensor:
    """Return ``factor`` ([rows, groups] or [1, 1]) an element, as a view [rows, length] where it can be one."""
    if format.groups > 1:
        factor = factor.repeat_interleave(format.group_size, 1)[:, : format.length]
    return factor.expand(rows, format.length)


def nearest_levels(rows: Tensor, format: CodeFormat, found: GridScale) -> Tensor:
    """Round ``rows`` (float32 [rows, length]) to the nearest level, ties to even; uint8 of the same shape."""
    steps = grid_steps(format.grid, format.bits, found.scale, found.zero_point)
    step, offset = spread(steps.step, format, len(rows)), spread(steps.offset, format, len(rows))
    level = torch.where(step > 0, rows / step, 0.0).add_(offset).round_()
    return level.clamp_(steps.low, steps.high).to(torch.uint8)


def _ternary_scale(segments: Tensor) -> Tensor:
    """Float32 [1, segments]: the mean of the k largest magnitudes, k maximising (Σ_{top k}|w|)²/k."""
    total = segments.abs().sort(1, descending=True).values.cumsum(1, dtype=torch.float64)
    count = torch.arange(1, segments.shape[1] + 1, device=segments.device)
    best = (total.square() / count).argmax(1)
    return (total.gather(1, best[:, None])[:, 0] / (best + 1)).float()[None]


def ternary_optimum(rows: Tensor, *, group_size: int | None = None, layer_wise: bool = False) -> Rounded:
    """Return the ternary codes of least squared error (methods.md, "TWN exact"; threshold a/2, scale a).

    ``rows`` is float32 [rows, length]; a scale is shared by a row, by ``group_size`` elements of it or, where
    ``layer_wise``, by the whole tensor.
    """
    format = code_format(rows, Grid.TERNARY, 2, group_size or max(1, rows.shape[1]), layer_wise)
    scale = _by_segment(rows, format, _ternary_scale)[0]
    return Rounded(format, nearest_levels(rows, format, GridScale(scale)), scale)


def _clip_errors(segments: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, bits: int) -> Tensor:
    """Float32 [segments]: the squared error of rounding to the grid with these factors, [segments]."""
    steps = grid_steps(grid, bits, scale, zero_point)
    step, offset = steps.step[:, None], steps.offset[:, None]
    level = torch.where(step > 0, segments / step, 0.0).add_(offset).round_().clamp_(steps.low, steps.high)
    return level.sub_(offset).mul_(step).sub_(segments).square_().sum(1)


def _factors(segments: Tensor, clip: float, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [segments] of a range shrunk to ``clip`` of itself."""
    minimum, maximum = segments.amin(1).double() * clip, segments.amax(1).double() * clip
    if grid is Grid.ASYMMETRIC:
        constant = minimum == maximum
        scale = ((maximum - minimum) / (2**bits - 1)).float().masked_fill_(constant, 1.0)
        # a constant segment is exact: scale 1, zero point -value
        zero_point = -torch.where(constant, minimum / clip, minimum / scale.double())
        return scale, zero_point.float()
    absmax = torch.maximum(-minimum, maximum)
    scale = absmax if grid is Grid.DOREFA else absmax / (2 ** (bits - 1) - 1)
    return scale.float(), torch.zeros_like(scale, dtype=torch.float32)


def _search(segments: Tensor, clips: list[float], grid: Grid, bits: int) -> Tensor:
    """Float32 [2, segments]: scale and zero point of the clip with the least error, the widest among equals."""
    scale, zero_point = _factors(segments, clips[0], grid, bits)
    least = _clip_errors(segments, scale, zero_point, grid, bits)
    for clip in clips[1:]:
        other = _factors(segments, clip, grid, bits)
        error = _clip_errors(segments, *other, grid, bits)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero_point = torch.where(better, other[0], scale), torch.where(better, other[1], zero_point)
    return torch.stack([scale, zero_point])


def clip_search(
    rows: Tensor,
    bits: int,
    grid: Grid,
    *,
    group_size: int | None = None,
    layer_wise: bool = False,
    lowest: float | None = None,
) -> GridScale:
    """Return the scales whose range, shrunk to ``lowest``–1.0 of itself in steps of 0.025, has least squared error.

    ``rows`` is float32 [rows, length]. ``lowest`` defaults to 0.4 up to 4 bits and 0.7 above; 1 takes the full range.
    """
    format = code_format(rows, grid, bits, group_size or max(1, rows.shape[1]), layer_wise)
    lowest = (0.4 if bits <= 4 else 0.7) if lowest is None else lowest
    clips = [1.0 - 0.025 * i for i in range(CLIPS) if 1.0 - 0.025 * i >= lowest - 1e-9]
    scale, zero_point = _by_segment(rows, format, lambda part: _search(part, clips, grid, bits))
    return GridScale(scale, zero_point if grid is Grid.ASYMMETRIC else None)
