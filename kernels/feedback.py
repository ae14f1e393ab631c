"""Rounding with error feedback: each column takes over what the columns before it lost (docs/methods.md, "Rounding").

GPTQ (arXiv 2210.17323) in the form that QuIP (arXiv 2307.13304, theorem 6) proves equal to it: with H = V D Vᵀ, V unit
upper triangular, q_k = round(w_k + Σ_{j<k} (w_j − q_j) V_jk). It takes one Cholesky factor and no inverse.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._triton import jit, tl
from .formats import Grid
from .grids import Steps, grid_steps, in_steps, losses
from .launch import LaunchShape, on_device, power_of_two_above, use_triton, warps_for

BLOCK = 128
"""Columns between two matmuls with all others."""
SUB = 16
"""Columns between two matmuls within a block, in the reference."""
TILE = 512
"""Elements a program holds of each of its three tiles; one warp, so that no column has to cross warps."""

Array = NDArray[np.float32]


def _check(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor | None) -> None:
    batch, rows, length = weight.shape
    if weight.dtype is not torch.float32 or factor.dtype is not torch.float32:
        raise ValueError(f"weight is {weight.dtype}, factor {factor.dtype}; expected float32")
    if factor.shape != (batch, length, length):
        raise ValueError(f"factor has shape {tuple(factor.shape)}; expected {(batch, length, length)}")
    if scale.dim() != 3 or scale.shape[:2] != (batch, rows) or (group is None and scale.shape[2] != 1):
        wanted = f"[{batch}, {rows}, groups], with one group where `group` is None"
        raise ValueError(f"scale has shape {tuple(scale.shape)}; expected {wanted}")


class _Sweep:
    """The state of one sweep; columns lead, [length, batch, rows], and are NumPy's: a call costs a third of torch's."""

    def __init__(self, y: Tensor, factor: Tensor, steps: Steps, group: Tensor | None, lost: Tensor | None) -> None:
        self.y, self.factor, self.again = y.permute(2, 0, 1).contiguous(), factor, lost is not None
        self.level = torch.empty_like(self.y)
        self.lost = torch.zeros_like(self.y) if lost is None else lost.permute(2, 0, 1).contiguous()
        # what the columns are before: themselves, or the values that they had
        self.before = self.y if lost is None else self.y - self.lost
        self.arrays: tuple[Array, Array] = self.before.numpy(), self.level.numpy()
        # [earlier column, later column, batch, 1]
        self.a_factor: Array = factor.permute(1, 2, 0)[..., None].numpy()
        # scalars would be converted at every call
        self.low, self.high = np.array(steps.low, np.float32), np.array(steps.high, np.float32)
        self.steps: tuple[Tensor, ...] = ()
        if group is not None:
            where = group.mT[:, :, None].expand(self.y.shape)
            factors = (steps.inverse, steps.offset, steps.step)
            self.steps = tuple(f.permute(2, 0, 1).gather(0, where) for f in factors)
        self.a_steps: tuple[Array, ...] = tuple(tensor.numpy() for tensor in self.steps)

    def block(self, first: int, last: int) -> None:
        """Round columns ``first`` to ``last``: one matmul for what all others have lost, then a few at a time."""
        now, others = self.y[first:last].transpose(0, 1), len(self.y) if self.again else first
        lost = self.lost[:others].transpose(0, 1)
        now = torch.baddbmm(now, self.factor[:, :others, first:last].mT, lost) if others else now.clone()
        for start in range(first, last, SUB):
            end = min(start + SUB, last)
            self._one_by_one(start, now[:, start - first : end - first].transpose(0, 1).numpy())
            if end < last:
                anew = (self.before[start:end] - self._value(start, end)).transpose(0, 1)
                now[:, end - first :].baddbmm_(self.factor[:, start:end, end:last].mT, anew)
        torch.sub(self.y[first:last], self._value(first, last), out=self.lost[first:last])

    def _value(self, first: int, last: int) -> Tensor:
        """What the levels of columns ``first`` to ``last`` stand for, in units of y."""
        if not self.steps:
            return self.level[first:last]
        return (self.level[first:last] - self.steps[1][first:last]).mul_(self.steps[2][first:last])

    def _one_by_one(self, first: int, a_now: Array) -> None:
        """Round the columns whose weights have become ``a_now`` [width, batch, rows], in place.

        No sub-function and few temporaries: this runs once a column of every layer.
        """
        last, low, high = first + len(a_now), self.low, self.high
        (before, level), factor = self.arrays, self.a_factor
        for k in range(first, last):
            x, u = a_now[k - first], level[k]
            if self.a_steps:
                inverse, offset, step = (array[k] for array in self.a_steps)
                x = x * inverse + offset
            np.rint(x, out=u)
            np.maximum(u, low, out=u)
            np.minimum(u, high, out=u)
            if k + 1 < last:
                lost = before[k] - ((u - offset) * step if self.a_steps else u)
                a_now[k + 1 - first :] += factor[k, k + 1 : last] * lost


def feedback_round_reference(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Round the columns of ``weight`` in their order, each corrected by ``factor`` for what those before it lost.

    On the CPU: ``weight`` is float32 [batch, rows, length]; ``factor`` float32 [batch, length, length], of which only
    what lies above the diagonal is read: V of H = V D Vᵀ; ``scale`` and, for the asymmetric grid, ``zero_point``
    float32 [batch, rows, groups]; ``group`` int64 [batch, length] names each column's scale (None: one a row). Returns
    the stored integers, uint8 [batch, rows, length]. A factor of zeros gives plain rounding, ties to even.

    With ``start``, such integers, this is a pass of coordinate descent on (w − q)'H(w − q) instead: each column is
    rounded anew, given what all others have lost. ``factor`` is then all of H_jk / H_kk, with a diagonal of zeros.

    Arithmetic is in float32; the order of its sums is the backend's. So a column whose corrected weight lies within
    rounding error of a tie (about 1e-5 of a step) may be settled otherwise on another device or with other threads, and
    then the columns behind it: levels are equal elsewhere, and the objective is as good everywhere.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check(weight, factor, scale, group)
    steps = grid_steps(grid, bits, scale, zero_point)
    y = in_steps(weight, steps, group)
    lost = None if start is None else losses(y, start, steps, group)
    sweep = _Sweep(y, factor, steps, group, lost)
    # a nearly dead row overflows float32; its codes are then as good as any, and callers compare with their start
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, weight.shape[2], BLOCK):
            sweep.block(first, min(first + BLOCK, weight.shape[2]))
    return sweep.level.to(torch.uint8).permute(1, 2, 0).contiguous()


@jit
def feedback_kernel(
    y_ptr: tl.tensor,
    now_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    step_ptr: tl.tensor,
    group_ptr: tl.tensor,
    lost_ptr: tl.tensor,
    level_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    groups: tl.tensor,
    first: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Columns first..first + BLOCK of some rows, one by one: u = rint(x), d = v − u, x_later += d V[k, later].

    ``now`` [batch, rows, width] are the weights x that the other blocks' losses leave; they stay in registers. v = y −
    lost is y itself in a first sweep, else the value before; d is what the column loses anew.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    i_batch = pid // tiles
    o_row = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_row = i_batch * rows + o_row
    o_block = tl.arange(0, BLOCK)
    width = tl.minimum(BLOCK, length - first)
    mask = m_row[:, None] & (o_block < width)[None, :]
    o_here = o_row[:, None] * length + first + o_block[None, :]
    b_now = tl.load(now_ptr + o_row[:, None] * width + o_block[None, :], mask=mask, other=0.0)
    b_d = tl.load(y_ptr + o_here, mask=mask, other=0.0) - tl.load(lost_ptr + o_here, mask=mask, other=0.0)
    b_level = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for k in range(width):
        m_k = (o_block == k)[None, :]
        b_x = tl.sum(tl.where(m_k, b_now, 0.0), axis=1)
        b_v = tl.sum(tl.where(m_k, b_d, 0.0), axis=1)
        if GROUPED:
            o_step = o_row * groups + tl.load(group_ptr + i_batch * length + first + k)
            b_offset = tl.load(offset_ptr + o_step, mask=m_row, other=0.0)
            b_x = b_x * tl.load(inverse_ptr + o_step, mask=m_row, other=0.0) + b_offset
        # adding 1.5 * 2^23 leaves no room for a fraction: half to even
        b_u = (tl.minimum(tl.maximum(b_x, low), high) + 12582912.0) - 12582912.0
        b_value = b_u
        if GROUPED:
            b_value = (b_u - b_offset) * tl.load(step_ptr + o_step, mask=m_row, other=0.0)
        b_new = b_v - b_value
        o_factor = (i_batch * length + first + k) * length + first + o_block
        b_factor = tl.load(factor_ptr + o_factor, mask=(o_block > k) & (o_block < width), other=0.0)
        b_now += b_new[:, None] * b_factor[None, :]
        b_d = tl.where(m_k, b_new[:, None], b_d)
        b_level = tl.where(m_k, b_u[:, None], b_level)
    b_d += tl.load(lost_ptr + o_here, mask=mask, other=0.0)
    tl.store(lost_ptr + o_here, b_d, mask=mask)
    tl.store(level_ptr + o_here, b_level.to(tl.uint8), mask=mask)


def feedback_shape(rows: int, length: int) -> LaunchShape:
    """Return the tile for ``rows`` rows of ``length``: up to 128 columns and a few rows in one warp."""
    block = min(BLOCK, power_of_two_above(length))
    return LaunchShape(rows=min(TILE // BLOCK, power_of_two_above(rows)), block=block, num_warps=1)


def feedback_round_triton(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Launch a kernel and, but for the last, a matmul a block; see ``feedback_round_reference``."""
    _check(weight, factor, scale, group)
    batch, rows, length = weight.shape
    steps = grid_steps(grid, bits, scale, zero_point)
    y, factor = in_steps(weight, steps, group).contiguous(), factor.contiguous()
    factors = [tensor.contiguous() for tensor in (steps.inverse, steps.offset, steps.step)]
    lost = torch.zeros_like(y) if start is None else losses(y, start, steps, group)
    level = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    if y.numel() == 0:
        return level
    shape = feedback_shape(rows, length)
    with on_device(weight):
        for first in range(0, length, shape.block):
            now, others = y[:, :, first : first + shape.block], first if start is None else length
            if others:
                now = torch.baddbmm(now, lost[:, :, :others], factor[:, :others, first : first + shape.block])
            feedback_kernel[(-(-rows // shape.rows) * batch,)](
                y,
                now.contiguous(),
                factor,
                *factors,
                y if group is None else group.contiguous(),
                lost,
                level,
                rows,
                length,
                scale.shape[2],
                first,
                float(steps.low),
                float(steps.high),
                GROUPED=group is not None,
                ROWS=shape.rows,
                BLOCK=shape.block,
                num_warps=warps_for(shape.num_warps),
                enable_fp_fusion=False,
            )
    return level


def feedback_round(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Round with error feedback, on the CPU where there is no kernel; see ``feedback_round_reference``."""
    if use_triton(weight):
        return feedback_round_triton(weight, factor, grid, bits, scale, zero_point, group=group, start=start)
    cpu = [None if part is None else part.cpu() for part in (zero_point, group, start)]
    zero_point, group, start = cpu
    found = feedback_round_reference(
        weight.cpu(), factor.cpu(), grid, bits, scale.cpu(), zero_point, group=group, start=start
    )
    return found.to(weight.device)
