"""SQuant: roundings flipped so that errors cancel within kernels and channels."""

from __future__ import annotations

import torch
from dfmpc.kernels.formats import CodeFormat, Quantized
from dfmpc.kernels.grids import grid_steps
from dfmpc.kernels.segments import row_chunks
from dfmpc.kernels.uniform import uniform
from torch import Tensor

from ...job.neighbours import SquantPlan
from ..encode import encode
from ..scale_search import spread
from .segments import inverse

UNIT = 2.0**30
"""Errors are counted in 2^-30 of a step: integers, so that no order of adding changes a flip."""


def squant(rows: Tensor, format: CodeFormat, plan: SquantPlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Flip roundings by a diagonal Hessian approximation (Guo et al., "SQuant", arXiv 2202.07471, algorithms 1-4).

    With p = round(t) − t, t = w/s, three losses are lowered in turn. E: p of every weight, by rounding. K: the sum e of
    p over every kernel (``taps`` neighbours of a row); the round(|e|) weights with the largest |p| of e's sign are
    rounded the other way, which leaves |e| ≤ ½. C: the sum E of e over every output channel; in each kernel the
    weight with the largest |p| of e's sign is a candidate, and of the candidates of E's sign the round(|E|) with the
    largest |p| are flipped, which leaves |E| ≤ ½, |e| < 1 and every |p| < 1. Scales are those of round to nearest;
    behind group scales an error counts in its own weight's steps.
    """
    nearest = uniform(rows, format.bits, format.grid, group_size=format.group_size, layer_wise=format.layer_wise)
    if rows.numel() == 0:
        return nearest
    levels = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for chunk in row_chunks(*rows.shape):
        where = slice(None) if format.layer_wise else chunk
        point = None if nearest.zero_point is None else nearest.zero_point[where]
        target = in_steps(rows[chunk].double(), nearest.scale[where], point, format)
        levels[chunk] = flip_roundings(target, taps)
    return encode(rows, levels, format, nearest.scale, nearest.zero_point)


def in_steps(w: Tensor, scale: Tensor, zero_point: Tensor | None, format: CodeFormat) -> Tensor:
    """Return where float64 ``w`` [rows, length] lies on the grid of stored integers; ends included, never beyond."""
    steps = grid_steps(format.grid, format.bits, scale, zero_point)
    step, offset = (spread(factor, format, len(w)).double() for factor in (steps.step, steps.offset))
    return (w * inverse(step)).add_(offset).clamp_(steps.low, steps.high)


def flip_roundings(target: Tensor, taps: int) -> Tensor:
    """Return integers next to float64 ``target`` [rows, kernels * taps], float64 of the same shape."""
    exact = target.view(len(target), -1, taps)
    level = exact.round()
    error = ((level - exact) * UNIT).round_()
    step = _flips(error, error.sum(2))
    level, error = level + step, error + step * UNIT
    step = _candidates(error)
    priority = step.abs() * error.abs()
    total = error.sum((1, 2))
    side = -torch.sign(total)[:, None, None]
    chosen = (priority * (step == side)).amax(2)
    flipped = largest(chosen, (total.abs() / UNIT).round())
    return (level + step * flipped[:, :, None]).view(target.shape)


def _flips(error: Tensor, total: Tensor) -> Tensor:
    """Return -1, 0 or 1 for every weight: the round(|total|) largest errors of the total's sign are undone."""
    sign = torch.sign(total)[..., None]
    return -sign * largest(error * sign, (total.abs() / UNIT).round())


def _candidates(error: Tensor) -> Tensor:
    """Return the step that undoes the largest error of its kernel's sign, 0 for every other weight."""
    sign = torch.sign(error.sum(2, keepdim=True))
    aligned = error * sign
    found = torch.zeros_like(error).scatter_(2, aligned.argmax(2, keepdim=True), 1.0)
    return -sign * found * (aligned > 0)


def largest(values: Tensor, count: Tensor) -> Tensor:
    """Return where ``values`` [..., n] is positive and among its ``count`` [...] largest; earlier ones win ties."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < count[..., None]) & (values > 0)
