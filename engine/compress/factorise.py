"""A layer's second moments as rounding needs them: columns in order, damped, factorised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WIDE = 2304
"""Columns up to which the factor is computed in float64."""
_ATTEMPTS = 4
"""The damping asked for, then three times ten times more."""


@dataclass(frozen=True)
class Factor:
    """H with its columns in the order in which they are rounded; serves every weight that reads the same input."""

    order: Tensor
    """int64 [batch, length]: what stands where."""
    moments: Tensor
    """float32 [batch, length, length]: the ordered H; zero where it has no factor."""
    upper: Tensor
    """float32 [batch, length, length], unit upper triangular V of ordered H + ridge = V D Vᵀ."""
    ridge: Tensor
    """float32 [batch]: what was added to the diagonal; Inf where there is no factor and V is the identity."""
    damp: float
    """The largest ridge relative to mean(diag H); 0 where there is no factor at all."""
    fallback: str
    """Why some matrices have no factor; empty where all have one."""

    def coupling(self) -> Tensor:
        """Return H_jk / (H_kk + ridge) at (j, k), 0 on the diagonal: how k makes up for what j loses."""
        pivots = self.moments.diagonal(dim1=1, dim2=2) + self.ridge[:, None]
        found = self.moments / pivots[:, None, :]
        found.diagonal(dim1=1, dim2=2).zero_()
        return found


def factorise(moments: Tensor, damp: float, order: Literal["falling", "natural"]) -> Factor:
    """Factorise H (float [length, length] or [batch, length, length], symmetric); float64 up to 2304 columns.

    The columns go by falling diagonal or as they stand. ``damp`` times mean(diag H) is added to the diagonal; where H
    still is not positive definite, ten times as much, three times over. After that, and where H holds NaN or Inf or
    is zero, V is the identity (rounding to nearest), which ``fallback`` tells.
    """
    moments = moments if moments.dim() == 3 else moments[None]
    length = moments.shape[-1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    usable = torch.isfinite(moments.sum((1, 2))) & (diagonal.mean(1) > 0)
    where = torch.arange(length, device=moments.device).expand(len(moments), -1)
    if order == "falling":
        where = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    ordered = _permute(moments if length <= WIDE else moments.float(), where)
    flipped = ordered.flip(1, 2)
    lower, ridge, taken = _cholesky(flipped.double() if length <= WIDE else flipped, usable, damp)
    lower /= lower.diagonal(dim1=1, dim2=2)[:, None, :].clone()
    failed = torch.isinf(ridge)
    if bool(failed.any()):
        ordered[failed] = 0.0
    damp = 0.0 if bool(failed.all()) else taken
    return Factor(
        where, ordered.float(), lower.float().flip(1, 2), ridge, damp, _reason(int(failed.sum()), len(failed))
    )


def _permute(moments: Tensor, order: Tensor) -> Tensor:
    """Return a copy with rows and columns in ``order``."""
    if len(moments) == 1:
        return moments[0].index_select(0, order[0]).index_select(1, order[0])[None]
    rows = moments.gather(1, order[:, :, None].expand_as(moments))
    return rows.gather(2, order[:, None, :].expand_as(moments))


def _cholesky(moments: Tensor, usable: Tensor, damp: float) -> tuple[Tensor, Tensor, float]:
    """Return lower factors, what was added to each diagonal and the largest damping; ``moments`` is changed.

    A matrix without a factor gets the identity and a ridge of Inf.
    """
    _make_identity(moments, ~usable)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean, pending = diagonal.mean(1), usable
    ridge, taken = torch.zeros_like(mean), 0.0
    for attempt in range(_ATTEMPTS):
        taken = damp * 10**attempt
        more = torch.where(pending, mean * taken - ridge, 0.0)
        diagonal.add_(more[:, None])
        ridge += more
        lower, info = torch.linalg.cholesky_ex(moments)
        # NaN anywhere in a row reaches its pivot
        pending = usable & ((info != 0) | ~torch.isfinite(lower.diagonal(dim1=1, dim2=2)).all(1))
        if not bool(pending.any()):
            break
    failed = pending | ~usable
    _make_identity(lower, failed)
    return lower, ridge.masked_fill(failed, torch.inf).float(), taken


def _make_identity(matrices: Tensor, where: Tensor) -> None:
    if bool(where.any()):
        matrices[where] = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _reason(failed: int, batch: int) -> str:
    if not failed:
        return ""
    of = f"{failed} of {batch} groups: " if batch > 1 else ""
    return f"{of}the input's second moments are zero, not finite or not positive definite: rounded to nearest"
