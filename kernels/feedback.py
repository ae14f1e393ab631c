"""Rounding with error feedback: each column takes over what the columns before it lost (docs/methods.md, "Rounding").

GPTQ (arXiv 2210.17323) in the form that QuIP (arXiv 2307.13304, theorem 6) proves equal to it: with H = V D Vᵀ, V unit
upper triangular, q_k = round(w_k + Σ_{j<k} (w_j − q_j) V_jk). It takes one Cholesky factor and no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .formats import Grid

BLOCK = 128
"""Columns between two matmuls on a device."""
SUB = 16
"""Columns between two matmuls in the reference."""


@dataclass(frozen=True)
class Steps:
    """A uniform grid: value = (u − offset)·step for integers u in low..high; both float32, shaped as the scale."""

    step: Tensor
    offset: Tensor
    low: int
    high: int


def grid_steps(grid: Grid, bits: int, scale: Tensor, zero_point: Tensor | None) -> Steps:
    """Return the steps of ``grid`` for float32 scales of any shape; a ternary grid is uniform too, with u in 0..2."""
    if grid is Grid.TERNARY:
        return Steps(scale, torch.ones_like(scale), 0, 2)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if grid is Grid.DOREFA:
        step = (scale.double() * 2 / levels).float()
        return Steps(step, torch.full_like(scale, levels / 2), 0, levels)
    if grid is Grid.SYMMETRIC:
        return Steps(scale, torch.full_like(scale, middle), 1, levels)
    if zero_point is None:
        raise ValueError("the asymmetric grid needs a zero_point")
    return Steps(scale, zero_point, 0, levels)


@dataclass(frozen=True)
class _Columns:
    """The weight as columns, [batch, length, rows]; with one scale a row in units of its step, so that u = rint(y)."""

    y: Tensor
    low: int
    high: int
    step: Tensor | None = None
    """float32 [batch, length, rows] where groups of columns have steps of their own; then y is the weight itself."""
    offset: Tensor | None = None
    """float32, the step's shape."""


def _columns(weight: Tensor, steps: Steps, group: Tensor | None) -> _Columns:
    if group is None:
        y = torch.where(steps.step > 0, weight / steps.step, 0.0).add_(steps.offset)
        return _Columns(y.mT.contiguous(), steps.low, steps.high)
    where = group[:, :, None].expand(-1, -1, weight.shape[1])
    step, offset = (torch.gather(tensor.mT, 1, where) for tensor in (steps.step, steps.offset))
    return _Columns(weight.mT.contiguous(), steps.low, steps.high, step, offset)


def _check(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor | None) -> None:
    batch, rows, length = weight.shape
    if weight.dtype is not torch.float32 or factor.dtype is not torch.float32:
        raise ValueError(f"weight is {weight.dtype}, factor {factor.dtype}; expected float32")
    if factor.shape != (batch, length, length):
        raise ValueError(f"factor has shape {tuple(factor.shape)}; expected {(batch, length, length)}")
    if scale.shape[:2] != (batch, rows) or (group is None and scale.shape[2] != 1):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; expected {(batch, rows)} and the groups of `group`")


class _Sweep:
    """The state of one sweep in NumPy: a call costs a third of torch's on columns of a few hundred rows."""

    def __init__(self, columns: _Columns, factor: Tensor) -> None:
        self.columns, self.factor = columns, factor
        self.lost, self.level = torch.empty_like(columns.y), torch.empty_like(columns.y)
        self.a_y, self.a_lost, self.a_level = columns.y.numpy(), self.lost.numpy(), self.level.numpy()
        self.a_factor = factor.numpy()
        self.a_steps = None
        if columns.step is not None and columns.offset is not None:
            self.a_steps = columns.step.numpy(), columns.offset.numpy()

    def block(self, first: int, last: int) -> None:
        """Round columns ``first`` to ``last``: one matmul for what all columns before lost, then one by one."""
        now = self.columns.y[:, first:last]
        if first:
            now = torch.baddbmm(now, self.factor[:, :first, first:last].mT, self.lost[:, :first])
        a_now = now.numpy() if first else now.numpy().copy()
        for k in range(first, last):
            x = a_now[:, k - first]
            self.round(k, x)
            if k + 1 < last:
                later = self.a_factor[:, k, k + 1 : last, None] * self.a_lost[:, k, None]
                a_now[:, k + 1 - first :] += later

    def round(self, k: int, x: np.ndarray) -> None:
        """Round column ``k``, whose weight has become ``x`` [batch, rows], and keep what that loses of its own."""
        level, y, lost = self.a_level[:, k], self.a_y[:, k], self.a_lost[:, k]
        if self.a_steps is not None:
            step, offset = self.a_steps[0][:, k], self.a_steps[1][:, k]
            x = np.divide(x, step, out=np.zeros_like(x), where=step > 0) + offset
        np.rint(x, out=level)
        np.maximum(level, self.columns.low, out=level)
        np.minimum(level, self.columns.high, out=level)
        if self.a_steps is None:
            np.subtract(y, level, out=lost)
        else:
            np.subtract(y, (level - offset) * step, out=lost)


def feedback_round_reference(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group: Tensor | None = None,
) -> Tensor:
    """Round the columns of ``weight`` in their order, each corrected by ``factor`` for what those before it lost.

    ``weight`` is float32 [batch, rows, length]; ``factor`` float32 [batch, length, length], of which only what lies
    above the diagonal is read: V of H = V D Vᵀ; ``scale`` and, for the asymmetric grid, ``zero_point`` float32
    [batch, rows, groups]; ``group`` int64 [batch, length] names each column's scale (None: one a row). Returns the
    stored integers, uint8 [batch, rows, length]. A factor of zeros gives plain rounding, ties to even.

    Sums are in float32, in an order of this function's own: another device or thread count may settle a column whose
    corrected weight lies within rounding error of a tie differently, and then the columns behind it.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check(weight, factor, scale, group)
    sweep = _Sweep(_columns(weight, grid_steps(grid, bits, scale, zero_point), group), factor.contiguous())
    length = weight.shape[2]
    for first in range(0, length, SUB):
        sweep.block(first, min(first + SUB, length))
    return sweep.level.to(torch.uint8).mT.contiguous()


feedback_round = feedback_round_reference
