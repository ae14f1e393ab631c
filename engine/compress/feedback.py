"""Error feedback on one layer: factorise its input's second moments, sweep, re-fit the scale, keep what is better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from dfmpc.kernels.feedback import feedback_round, grid_steps
from dfmpc.kernels.formats import Grid
from dfmpc.kernels.segments import code_format
from torch import Tensor

from .scale_search import Rounded, clip_search, nearest_levels, spread, ternary_optimum

MAX_FEEDBACK = 8192
"""Columns above which a layer is rounded to nearest: the factor would take more than 256 MiB and a minute."""
_WIDE = 2304
"""Columns up to which the factor is computed in float64."""
_ATTEMPTS = 4
"""The damping asked for, then three times ten times more."""


@dataclass(frozen=True)
class FeedbackOptions:
    """How a layer is rounded."""

    damp: float = 0.01
    """Added to the diagonal of H, relative to its mean."""
    order: Literal["falling", "natural"] = "falling"
    """Columns by falling diagonal of H, or as they stand."""
    clip_search: bool = True
    """Uniform grids: choose the clip by squared error, else take the full range."""
    sweeps: int | None = None
    """None: two with a re-fit of the scale after each for ternary, one without for uniform grids."""


@dataclass(frozen=True)
class Factor:
    """H as rounding needs it; serves every weight that reads the same input."""

    moments: Tensor
    """float32 [batch, length, length]: H itself."""
    order: Tensor
    """int64 [batch, length]: the columns in the order in which they are rounded."""
    upper: Tensor
    """float32 [batch, length, length], unit upper triangular V of the ordered H + damping = V D Vᵀ."""
    damp: float
    fallback: str


def factorise(moments: Tensor, options: FeedbackOptions = FeedbackOptions()) -> Factor:
    """Factorise H (float [length, length] or [batch, length, length], symmetric); float64 up to 2304 columns.

    A matrix that is not positive definite gets ten times the damping, three times over; after that, and where it holds
    NaN or Inf or is zero, its rows are rounded to nearest (V = I), which ``fallback`` tells.
    """
    moments = moments if moments.dim() == 3 else moments[None]
    length = moments.shape[-1]
    wide = moments.double() if length <= _WIDE else moments.float()
    diagonal = wide.diagonal(dim1=1, dim2=2)
    usable = torch.isfinite(wide.sum((1, 2))) & (diagonal.mean(1) > 0)
    order = torch.arange(length, device=moments.device).expand(len(moments), -1)
    if options.order == "falling":
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    lower, damp, failed = _cholesky(_permute(wide, order.flip(1)), usable, options.damp)
    lower /= lower.diagonal(dim1=1, dim2=2)[:, None, :].clone()
    return Factor(moments.float(), order, lower.float().flip(1, 2), damp, _reason(failed, len(moments)))


def _permute(moments: Tensor, order: Tensor) -> Tensor:
    """Return a copy with rows and columns in ``order``."""
    if len(moments) == 1:
        return moments[0].index_select(0, order[0]).index_select(1, order[0])[None]
    rows = moments.gather(1, order[:, :, None].expand_as(moments))
    return rows.gather(2, order[:, None, :].expand_as(moments))


def _cholesky(moments: Tensor, usable: Tensor, damp: float) -> tuple[Tensor, float, int]:
    """Return lower factors, the largest damping taken and how many matrices have none (theirs is the identity).

    ``moments`` is changed: damping is added in place.
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean, pending, taken = diagonal.mean(1), usable, 0.0
    for attempt in range(_ATTEMPTS if bool(usable.any()) else 0):
        more, taken = damp * 10**attempt - taken, damp * 10**attempt
        diagonal.add_((mean * more).masked_fill_(~pending, 0.0)[:, None])
        lower, info = torch.linalg.cholesky_ex(moments)
        # NaN anywhere in a row reaches its pivot
        pending = usable & ((info != 0) | ~torch.isfinite(lower.diagonal(dim1=1, dim2=2)).all(1))
        if not bool(pending.any()):
            break
    else:
        lower = torch.empty_like(moments)
    failed = pending | ~usable
    if bool(failed.any()):
        lower[failed] = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return lower, taken, int(failed.sum())


def _reason(failed: int, batch: int) -> str:
    if not failed:
        return ""
    of = f"{failed} of {batch} groups: " if batch > 1 else ""
    return f"{of}the input's second moments are zero, not finite or not positive definite"


def error_feedback(rows: Tensor, start: Rounded, factor: Factor, *, sweeps: int = 1, refit: bool = False) -> Rounded:
    """Improve ``start`` by sweeps of error feedback from the original ``rows`` (float32 [rows, length]).

    With ``refit`` every sweep is followed by scale ← scale·(q'Hw)/(q'Hq), a row (all its groups alike) or, layer-wise,
    a layer. Each row (each layer where a layer-wise scale is re-fitted) then keeps whichever of start and result has
    the smaller (w − q)'H(w − q), H undamped: feedback is greedy and may lose.
    """
    weight = rows.view(len(factor.order), -1, rows.shape[1])
    now = start
    for _ in range(sweeps):
        now = replace(now, levels=_sweep(weight, now, factor))
        if refit:
            now = _refit(weight, now, factor)
    kept = _keep_better(weight, start, now, factor, together=refit and start.format.layer_wise)
    return replace(kept, damp=factor.damp, fallback=factor.fallback)


def _sweep(weight: Tensor, now: Rounded, factor: Factor) -> Tensor:
    batch, rows, length = weight.shape
    form, groups = now.format, now.format.groups
    where = factor.order[:, None, :].expand_as(weight)
    scale, zero_point = (
        None if tensor is None else tensor.expand(batch * rows, groups).reshape(batch, rows, groups)
        for tensor in (now.scale, now.zero_point)
    )
    assert scale is not None
    group = factor.order // form.group_size if groups > 1 else None
    found = feedback_round(weight.gather(2, where), factor.upper, form.grid, form.bits, scale, zero_point, group=group)
    return torch.empty_like(found).scatter_(2, where, found).view(batch * rows, length)


def values_of(rounded: Rounded) -> Tensor:
    """Return float32 [rows, length]: what the codes stand for."""
    form, rows = rounded.format, len(rounded.levels)
    steps = grid_steps(form.grid, form.bits, rounded.scale, rounded.zero_point)
    return (rounded.levels.float() - spread(steps.offset, form, rows)).mul_(spread(steps.step, form, rows))


def _refit(weight: Tensor, now: Rounded, factor: Factor) -> Rounded:
    """Scale ← scale·(q'Hw)/(q'Hq); left alone where that is not a positive number."""
    value = values_of(now).view(weight.shape)
    behind = torch.bmm(value, factor.moments)
    along, norm = ((behind * other).sum(2, dtype=torch.float64).flatten()[:, None] for other in (weight, value))
    if now.format.layer_wise:
        along, norm = along.sum(0, keepdim=True), norm.sum(0, keepdim=True)
    ratio = along / norm
    ratio = torch.where(torch.isfinite(ratio) & (along > 0) & (norm > 0), ratio, 1.0)
    return replace(now, scale=(now.scale * ratio).float())


def _keep_better(weight: Tensor, start: Rounded, end: Rounded, factor: Factor, *, together: bool) -> Rounded:
    """Choose by a row, or all rows ``together``: e'He of the end minus the start's is (q₁ − q₀)'H(q₁ + q₀ − 2w)."""
    first, last = values_of(start).view(weight.shape), values_of(end).view(weight.shape)
    change = torch.bmm(last - first, factor.moments)
    gain = (change * (first + last - 2 * weight)).sum(2, dtype=torch.float64).flatten()[:, None]
    better = ((gain.sum() if together else gain) < 0).expand(len(gain), 1)
    scale = end.scale
    if scale is not start.scale:
        scale = torch.where(better[: len(scale)], end.scale, start.scale)
    return replace(end, levels=torch.where(better, end.levels, start.levels), scale=scale)


def _too_wide(start: Rounded) -> Rounded:
    length = start.format.length
    return replace(start, fallback=f"rows of {length} are longer than error feedback takes ({MAX_FEEDBACK})")


def ternary_feedback(
    rows: Tensor,
    moments: Tensor | Factor,
    options: FeedbackOptions = FeedbackOptions(),
    *,
    group_size: int | None = None,
    layer_wise: bool = False,
) -> Rounded:
    """Round ``rows`` (float32 [rows, length]) to ternary codes with error feedback (methods.md, section 5, step 3).

    ``moments`` is H, float [length, length] or, for a grouped convolution, [groups, length, length] (the rows of a
    group are neighbours), or its factor. Starts from :func:`ternary_optimum`.
    """
    start = ternary_optimum(rows, group_size=group_size, layer_wise=layer_wise)
    if start.format.length > MAX_FEEDBACK:
        return _too_wide(start)
    factor = moments if isinstance(moments, Factor) else factorise(moments, options)
    sweeps = 2 if options.sweeps is None else options.sweeps
    return error_feedback(rows, start, factor, sweeps=sweeps, refit=True)


def uniform_feedback(
    rows: Tensor,
    moments: Tensor | Factor,
    bits: int,
    options: FeedbackOptions = FeedbackOptions(),
    *,
    grid: Grid = Grid.DOREFA,
    group_size: int | None = None,
    layer_wise: bool = False,
) -> Rounded:
    """Round ``rows`` (float32 [rows, length]) to 2^bits levels with error feedback; ``moments`` as for ternary.

    The clip is chosen by squared error, 0.7–1.0 of the range (0.4–1.0 up to 4 bits). More than one sweep re-fits the
    scale after each, but for the asymmetric grid.
    """
    format = code_format(rows, grid, bits, group_size or rows.shape[1], layer_wise)
    lowest = None if options.clip_search else 1.0
    found = clip_search(rows, bits, grid, group_size=group_size, layer_wise=layer_wise, lowest=lowest)
    start = Rounded(format, nearest_levels(rows, format, found), found.scale, found.zero_point)
    if format.length > MAX_FEEDBACK:
        return _too_wide(start)
    factor = moments if isinstance(moments, Factor) else factorise(moments, options)
    sweeps = 1 if options.sweeps is None else options.sweeps
    return error_feedback(rows, start, factor, sweeps=sweeps, refit=sweeps > 1 and grid is not Grid.ASYMMETRIC)
