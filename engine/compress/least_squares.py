"""The least-squares re-solve of a layer for the inputs that the quantized network gives it (methods.md, section 5).

The paper's coefficients c are its diagonal case: one factor an input channel instead of a full matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.graph import Layer
from .calibrate import InputMoments

DAMPING = 0.1
"""Of the mean of diag(H), where there are positions enough …"""
ENOUGH = 4
"""… that is this many for every weight of a row; with fewer, damping grows as what is known of H shrinks."""


def damping(length: int, positions: int | None) -> float:
    """Return δ for rows of ``length`` whose moments were taken over ``positions``."""
    return DAMPING if positions is None else DAMPING * max(1.0, ENOUGH * length / max(1, positions))


def resolve(rows: Tensor, layer: Layer, moments: InputMoments, delta: float | None = None) -> Tensor | None:
    """Return W + R (H + δ mean(diag H) I)⁻¹ with R = Cov(t, h) - W H, float32 [out, length].

    It minimises E‖t - W h‖² + δ mean(diag H) ‖W - W₀‖² over centred t and h. None where ``moments`` do not know t or
    the matrix cannot be factorised, and then ``rows`` (float32 [out, length]) should stay as they are. ``delta``: δ in
    place of ``damping``'s.
    """
    if moments.cross is None:
        return None
    delta = damping(moments.second.shape[-1], moments.positions) if delta is None else delta
    H = moments.second.double() if moments.second.shape[-1] <= 1024 else moments.second
    weight = rows.to(H).view(layer.groups, -1, H.shape[-1])
    residual = moments.cross.to(H) - weight @ H
    diagonal = H.diagonal(dim1=1, dim2=2)
    damped = H + torch.diag_embed(torch.full_like(diagonal, 1.0) * delta * diagonal.mean(1, keepdim=True))
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        return None
    step = torch.cholesky_solve(residual.transpose(1, 2), factor).transpose(1, 2)
    found = (weight + step).reshape(rows.shape).float()
    return found if bool(torch.isfinite(found).all()) else None
