"""A code grid as a step and an offset a row, or a group of its columns: what rounding on given scales needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Grid


@dataclass(frozen=True)
class Steps:
    """A uniform grid: value = (u − offset)·step for integers u in low..high; both float32, shaped as the scale."""

    step: Tensor
    offset: Tensor
    low: int
    high: int

    @property
    def inverse(self) -> Tensor:
        """1/step; 0 where the step is, so that such rows have one value."""
        largest = torch.finfo(torch.float32).max
        return torch.where(self.step > 0, 1.0 / self.step, 0.0).clamp_(max=largest)


def grid_steps(grid: Grid, bits: int, scale: Tensor, zero_point: Tensor | None) -> Steps:
    """Return the steps of ``grid`` for float32 scales of any shape; a ternary grid is uniform too, with u in 0..2.

    Raises:
        ValueError: the asymmetric grid without a zero point.
    """
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


def in_steps(weight: Tensor, steps: Steps, group: Tensor | None) -> Tensor:
    """Return y of the weight w [batch, rows, columns]: w itself where ``group`` ([batch, columns]) names scales.

    With one scale a row it is w/step + offset, so that u = rint(y) and losses count in steps.
    """
    return weight if group is not None else weight * steps.inverse + steps.offset


def losses(y: Tensor, levels: Tensor, steps: Steps, group: Tensor | None) -> Tensor:
    """Return y (of :func:`in_steps`) minus what ``levels`` stand for, in units of y."""
    if group is None:
        return y - levels
    where = group[:, None, :].expand(levels.shape)
    return y - (levels - steps.offset.gather(2, where)) * steps.step.gather(2, where)
