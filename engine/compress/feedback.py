"""Error feedback on one layer: sweep, re-fit the scale, descend, keep what is better than rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from dfmpc.kernels.feedback import feedback_round
from dfmpc.kernels.formats import CodeFormat, Grid
from dfmpc.kernels.grids import grid_steps
from dfmpc.kernels.segments import code_format
from torch import Tensor

from .factorise import Factor, factorise
from .scale_search import Rounded, clip_search, nearest_levels, spread, ternary_optimum

MAX_FEEDBACK = 8192
"""Columns above which a layer is rounded to nearest: its matrices take more than 1 GiB."""
TOGETHER = 2**23
"""Weights that are rounded at a time from several starts: more of a large layer would take many times its memory."""
COARSE = 4
"""Bits up to which the scale of least ‖w - q‖² is not good enough for H: there several are tried."""


@dataclass(frozen=True)
class FeedbackOptions:
    """How a layer is rounded; layer-wise scales have one start, the scale that was found."""

    damp: float = 0.01
    """Added to the diagonal of H, relative to its mean."""
    order: Literal["falling", "natural"] = "falling"
    """Columns by falling diagonal of H, or as they stand."""
    clip_search: bool = True
    """Uniform grids: choose the clip by squared error, else take the full range."""
    sweeps: int | None = None
    """None: two with a re-fit of the scale after each for ternary, one without for uniform grids."""
    starts: tuple[float, ...] = (1.1, 1.0, 0.9, 0.8, 0.7)
    """Ternary: factors of the optimum scale that rounding starts from; each row keeps the best end."""
    coarse_starts: tuple[float, ...] = (1.2, 1.1, 1.0, 0.9, 0.8)
    """Uniform grids up to ``COARSE`` bits: the same, of the scale that the clip search found."""
    descents: int | None = None
    """Passes of coordinate descent behind the sweeps, before the last re-fit; None: two for uniform grids up to
    ``COARSE`` bits, else one."""


FROM_A_MODEL = FeedbackOptions(starts=(1.0, 0.9, 0.8), coarse_starts=(1.0,), descents=1)
"""Where H is not measured but a model of the input's: a longer search takes more time than that tier may."""


@dataclass(frozen=True)
class _Layer:
    """A weight with its columns in the factor's order; levels are uint8 of its shape, scales those of ``Rounded``."""

    weight: Tensor
    """float32 [batch, rows, length]."""
    factor: Factor
    format: CodeFormat
    zero_point: Tensor | None
    group: Tensor | None
    """int64 [batch, length]: each column's scale; None for one a row."""

    @classmethod
    def of(cls, rows: Tensor, start: Rounded, factor: Factor) -> _Layer:
        group = factor.order // start.format.group_size if start.format.groups > 1 else None
        weight = _in_order(rows, factor.order)
        return cls(weight, factor, start.format, start.zero_point, group)

    def batched(self, factors: Tensor) -> Tensor:
        """[rows, groups] or [1, 1] as [batch, rows, groups]."""
        batch, rows, _ = self.weight.shape
        return factors.expand(batch * rows, self.format.groups).reshape(batch, rows, -1)

    def value(self, levels: Tensor, scale: Tensor) -> Tensor:
        """Float32: what the levels stand for."""
        steps = grid_steps(self.format.grid, self.format.bits, scale, self.zero_point)
        step, offset = self.batched(steps.step), self.batched(steps.offset)
        if self.group is not None:
            where = self.group[:, None, :].expand(levels.shape)
            step, offset = step.gather(2, where), offset.gather(2, where)
        return (levels - offset).mul_(step)

    def round(self, factor: Tensor, scale: Tensor, start: Tensor | None = None) -> Tensor:
        """One sweep or, from ``start``, one pass of coordinate descent."""
        point = None if self.zero_point is None else self.batched(self.zero_point)
        grid, bits, scales = self.format.grid, self.format.bits, self.batched(scale)
        return feedback_round(self.weight, factor, grid, bits, scales, point, group=self.group, start=start)

    def refit(self, levels: Tensor, scale: Tensor) -> Tensor:
        """Scale·(q'Hw)/(q'Hq), a row or layer-wise; the scale itself where that is no positive number."""
        value = self.value(levels, scale)
        behind = torch.bmm(value, self.factor.moments)
        along, norm = (
            (behind * other).sum(2, dtype=torch.float64).flatten()[:, None] for other in (self.weight, value)
        )
        if self.format.layer_wise:
            along, norm = along.sum(0, keepdim=True), norm.sum(0, keepdim=True)
        ratio = along / norm
        ratio = torch.where(torch.isfinite(ratio) & (along > 0) & (norm > 0), ratio, 1.0)
        return (scale * ratio).float()

    def gain(self, before: Tensor, after: Tensor) -> Tensor:
        """Float64 [rows, 1]: e'He of the values ``before`` minus that of ``after``, (q₀ − q₁)'H(q₀ + q₁ − 2w)."""
        change = torch.bmm(before - after, self.factor.moments)
        return (change * (before + after - 2 * self.weight)).sum(2, dtype=torch.float64).flatten()[:, None]


def values_of(rounded: Rounded) -> Tensor:
    """Return float32 [rows, length]: what the codes stand for."""
    form, rows = rounded.format, len(rounded.levels)
    steps = grid_steps(form.grid, form.bits, rounded.scale, rounded.zero_point)
    return (rounded.levels - spread(steps.offset, form, rows)).mul_(spread(steps.step, form, rows))


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    """[batch * rows, length] as [batch, rows, length] with its columns in ``order``."""
    batched = rows.reshape(len(order), -1, rows.shape[1])
    return batched.gather(2, order[:, None, :].expand(batched.shape))


def error_feedback(
    rows: Tensor, start: Rounded, factor: Factor, *, sweeps: int = 1, descents: int = 1, refit: bool = False
) -> Rounded:
    """Improve ``start`` by error feedback from the original ``rows`` (float32 [rows, length]), then by descent.

    With ``refit`` every sweep but the last, and the end, is followed by scale ← scale·(q'Hw)/(q'Hq), a row (all its
    groups alike) or, layer-wise, a layer. Each row (each layer where a layer-wise scale is re-fitted) then keeps
    whichever of start and end has the smaller (w − q)'H(w − q), H undamped: feedback is greedy and may lose.
    """
    layer = _Layer.of(rows, start, factor)
    scale, plain = start.scale, _in_order(start.levels, factor.order)
    levels = plain
    for sweep in range(sweeps):
        levels = layer.round(factor.upper, scale)
        if refit and sweep + 1 < sweeps:
            scale = layer.refit(levels, scale)
    coupling = factor.coupling() if descents else factor.upper
    for _ in range(descents):
        levels = layer.round(coupling, scale, levels)
    if refit:
        scale = layer.refit(levels, scale)
    gain = layer.gain(layer.value(plain, start.scale), layer.value(levels, scale))
    better = ((gain.sum() if refit and start.format.layer_wise else gain) > 0).expand(len(rows), 1)
    levels = torch.where(better, _in_place(levels, factor.order), start.levels)
    scale = torch.where(better[: len(scale)], scale, start.scale)
    return replace(start, levels=levels, scale=scale, damp=factor.damp, fallback=factor.fallback)


def _in_place(levels: Tensor, order: Tensor) -> Tensor:
    """The inverse of ``_in_order``."""
    there = torch.empty_like(levels).scatter_(2, order[:, None, :].expand(levels.shape), levels)
    return there.view(-1, levels.shape[2])


def _improved(
    rows: Tensor,
    start: Rounded,
    moments: Tensor | Factor,
    options: FeedbackOptions,
    starts: tuple[float, ...],
    *,
    sweeps: int,
    descents: int,
    refit: bool,
) -> Rounded:
    """``error_feedback`` from each of ``starts`` times the scale, where the layer is not too long for it."""
    length = start.format.length
    if length > MAX_FEEDBACK:
        return replace(start, fallback=f"rows of {length} are longer than error feedback takes ({MAX_FEEDBACK})")
    factor = _factor(rows, moments, options)
    if start.format.layer_wise or starts == (1.0,):
        return error_feedback(rows, start, factor, sweeps=sweeps, descents=descents, refit=refit)
    best, together = start, max(1, TOGETHER // max(1, rows.numel()))
    for first in range(0, len(starts), together):
        some = starts[first : first + together]
        many, tried = _repeated(rows, len(some), len(factor.order)), _tried(start, some, len(factor.order))
        ends = error_feedback(many, tried, factor, sweeps=sweeps, descents=descents, refit=refit)
        best = _best(rows, best, ends, factor)
    return best


def _factor(rows: Tensor, moments: Tensor | Factor, options: FeedbackOptions) -> Factor:
    """Factorise ``moments`` where they are not yet; ValueError where they do not fit ``rows``."""
    factor = moments if isinstance(moments, Factor) else factorise(moments, options.damp, options.order)
    if factor.order.shape[1] != rows.shape[1] or len(rows) % len(factor.order):
        shape = tuple(factor.moments.shape)
        raise ValueError(f"second moments of shape {shape} do not fit rows of shape {tuple(rows.shape)}")
    return factor


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
    sweeps = 2 if options.sweeps is None else options.sweeps
    descents = 1 if options.descents is None else options.descents
    return _improved(rows, start, moments, options, options.starts, sweeps=sweeps, descents=descents, refit=True)


def _repeated(rows: Tensor, times: int, batch: int) -> Tensor:
    """Repeat the rows of every group: [batch * rows, n] becomes [batch * times * rows, n]."""
    return rows.view(batch, 1, -1, rows.shape[1]).expand(-1, times, -1, -1).reshape(times * len(rows), -1)


def _tried(start: Rounded, factors: tuple[float, ...], batch: int) -> Rounded:
    """Return ``start`` once for every factor of its scale."""
    scale = _repeated(start.scale, len(factors), batch).view(batch, len(factors), -1, start.scale.shape[1])
    scaled = (scale * torch.tensor(factors, device=scale.device).view(-1, 1, 1)).view(-1, start.scale.shape[1])
    point = None if start.zero_point is None else _repeated(start.zero_point, len(factors), batch)
    return replace(start, levels=_repeated(start.levels, len(factors), batch), scale=scaled, zero_point=point)


def _best(rows: Tensor, start: Rounded, tried: Rounded, factor: Factor) -> Rounded:
    """Return of every row the try with the smallest (w − q)'H(w − q), or ``start`` where none is better."""
    batch, times = len(factor.order), len(tried.levels) // max(1, len(rows))
    plain = _in_order(start.levels, factor.order)
    layer = _Layer.of(rows, start, factor)
    best, gain = start, torch.zeros((len(rows), 1), dtype=torch.float64, device=rows.device)
    for index in range(times):
        levels, scale = (
            part.view(batch, times, -1, part.shape[1])[:, index].reshape(len(rows), -1)
            for part in (tried.levels, tried.scale)
        )
        here = layer.gain(layer.value(plain, start.scale), layer.value(_in_order(levels, factor.order), scale))
        better = here > gain
        gain = torch.where(better, here, gain)
        best = replace(
            best, levels=torch.where(better, levels, best.levels), scale=torch.where(better, scale, best.scale)
        )
    return replace(best, damp=tried.damp, fallback=tried.fallback)


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

    The clip is chosen by squared error, 0.7–1.0 of the range (0.4–1.0 up to 4 bits). Up to ``COARSE`` bits several
    scales about that one are tried. More than one sweep re-fits the scale after each, but for the asymmetric grid.
    """
    format = code_format(rows, grid, bits, group_size or rows.shape[1], layer_wise)
    lowest = None if options.clip_search else 1.0
    found = clip_search(rows, bits, grid, group_size=group_size, layer_wise=layer_wise, lowest=lowest)
    start = Rounded(format, nearest_levels(rows, format, found), found.scale, found.zero_point)
    sweeps = 1 if options.sweeps is None else options.sweeps
    refit = sweeps > 1 and grid is not Grid.ASYMMETRIC
    coarse = bits <= COARSE and options.clip_search
    starts = options.coarse_starts if coarse else (1.0,)
    descents = options.descents if options.descents is not None else 2 if coarse else 1
    return _improved(rows, start, moments, options, starts, sweeps=sweeps, descents=descents, refit=refit)
