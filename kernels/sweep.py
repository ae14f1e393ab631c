"""What every width of code would do to a weight, from one read of it and without writing codes: for choosing bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import CodeFormat, Grid
from .launch import use_triton
from .scales import Scales, scales_of
from .segments import code_format, require_finite, row_chunks, row_parts
from .shapes import WALKED_SWEEP
from .sums import exponents, fineness, power_of_two, tree_sum
from .sweep_kernel import sweep_kernel
from .table import Batch, batches_of

WIDTHS = tuple(range(2, 9))
SHORT = 64
"""Elements below which a reference works on segments side by side."""
MOST_TAPS = 1 << 13
"""Squares of this many numbers up to 510 add up in int32."""
LONGEST = 1 << 26
"""A sixteenth of so many numbers up to 510 adds up in int32; rows from here on are the reference's."""
_MAGIC = 1.5 * 2.0**52
"""Added to a float64 below 2^51 it leaves the nearest integer, half to even, in the low bits of the sum."""


@dataclass(frozen=True)
class Sweep:
    """Row statistics of one weight quantized to every width; float64 on the CPU, columns in the order of ``widths``."""

    widths: tuple[int, ...]
    dot: Tensor
    """[rows, widths]: <Ŵ, W>."""
    quantized_norm: Tensor
    """[rows, widths]: ||Ŵ||²."""
    tap_sums_norm: Tensor
    """[rows, widths]: Σ_i (Σ_t ŵ_it)², the sum over input channels i of the squared sums over their taps."""
    original_norm: Tensor
    """[rows]: ||W||²."""

    @property
    def error(self) -> Tensor:
        """[rows, widths]: ||W - Ŵ||²."""
        return (self.original_norm[:, None] - 2 * self.dot + self.quantized_norm).clamp_min(0)

    @property
    def sqnr_db(self) -> Tensor:
        """[rows, widths]: 10 log10(||W||² / ||W - Ŵ||²), infinite where the error is no more than rounding."""
        signal, error = self.original_norm[:, None], self.error
        exact = error <= 1e-15 * signal
        return torch.where(exact, torch.inf, 10 * torch.log10(signal / torch.where(exact, 1.0, error)))


@dataclass(frozen=True)
class _Totals:
    """One pass over a weight: int64 totals, [rows, groups] or, for every width, [rows, groups, widths]."""

    absmax: Tensor
    """float32 [rows, groups]."""
    squares: Tensor
    dots: Tensor
    norms: Tensor
    taps: Tensor

    @classmethod
    def zeros(cls, absmax: Tensor, widths: int) -> _Totals:
        """Return totals of nothing."""
        squares = torch.zeros(absmax.shape, dtype=torch.int64, device=absmax.device)
        return cls(absmax, squares, *squares[..., None].repeat(3, 1, 1, widths).unbind())

    def put(self, rows: slice, groups: slice, found: tuple[Tensor, ...]) -> None:
        """Store flat totals of segments, in the order of the fields behind ``absmax``."""
        for target, values in zip((self.squares, self.dots, self.norms, self.taps), found, strict=True):
            block = target[rows, groups]
            block.copy_(values.view(block.shape))

    def cpu(self) -> _Totals:
        """Return the same on the CPU."""
        return _Totals(*(t.cpu() for t in (self.absmax, self.squares, self.dots, self.norms, self.taps)))


def _pattern(shift: int) -> int:
    """Return the bits of 1.5 * 2^(52 + shift): a term is what a pattern's low bits have more than these."""
    return (2 * (0x433 + shift) + 1) << 51


def _total(terms: Tensor, shift: int, dim: int) -> Tensor:
    """Return int64 sums along ``dim`` of float64 integers on the grid of 2^shift, each 1.5 * 2^(52 + shift) too large.

    Bits are added modulo 2^64, so that segments of any length are exact.
    """
    return terms.view(torch.int64).sum(dim).sub_(_wrapped(terms.shape[dim] * _pattern(shift)))


def _wrapped(n: int) -> int:
    """Return ``n`` modulo 2^64 as an int64."""
    return (n + (1 << 63)) % (1 << 64) - (1 << 63)


def _segment_totals(
    segments: Tensor, exponent: Tensor, inverses: Tensor, grid: Grid, bits: int, widths: Sequence[int], taps: int
) -> tuple[Tensor, ...]:
    """Return the totals of float32 [segments, length], which are below 2^exponent, in the order of ``_Totals``.

    ``inverses`` is float64 [widths, segments]: what turns a weight times 2^(bits - exponent) into steps.
    """
    dim = 1 if segments.shape[1] >= SHORT else 0  # short rows are added up side by side
    wide = segments.double() if dim else segments.T.contiguous().double()
    wide.mul_(power_of_two(bits - exponent).unsqueeze(dim))
    level, term = torch.empty_like(wide), torch.empty_like(wide)
    magic = torch.full((), _MAGIC, dtype=torch.float64, device=wide.device)
    # products with integers below 2^9 are exact, whether or not they are contracted
    squares = _total(torch.addcmul(magic * 2.0**bits, wide, wide, out=term), bits, dim)
    found = []
    for width, inverse in zip(widths, inverses.unsqueeze(1 + dim), strict=True):
        unit = _round_to_levels(torch.mul(wide, inverse, out=level), grid, width)
        dots = _total(torch.addcmul(magic * 2.0 ** (width - 1), level, wide, out=term), width - 1, dim)
        norms = torch.square(level, out=term).sum(dim).mul_(unit)
        by_channel = norms if taps == 1 else _channel_sums(level, taps, dim).square_().sum(dim).mul_(unit)
        found.append(torch.stack([dots, norms.to(torch.int64), by_channel.to(torch.int64)]))
    return squares, *torch.stack(found, 2)


def _channel_sums(level: Tensor, taps: int, dim: int) -> Tensor:
    """Return the sums over every ``taps`` neighbours along ``dim``."""
    if dim == 0:
        return level.view(-1, taps, level.shape[1]).sum(1)
    return (level.view(-1, taps) @ level.new_ones(taps)).view(len(level), -1)


def _round_to_levels(level: Tensor, grid: Grid, width: int) -> int:
    """Round weights in steps in place to levels; return what their squares count.

    DoReFa's are half-odd numbers u - L/2, of which four squares are one (2u - L)²; symmetric ones are integers.
    """
    if grid is Grid.DOREFA:
        middle = (2**width - 1) / 2
        level.add_(middle).round_().sub_(middle)
        return 4
    limit = 2 ** (width - 1) - 1
    level.round_().clamp_(-limit, limit)
    return 1


def _checked(weight: Tensor, grid: Grid, group_size: int, taps: int, widths: Sequence[int]) -> CodeFormat:
    """Return the format of the widest codes."""
    if grid not in (Grid.DOREFA, Grid.SYMMETRIC):
        raise ValueError(f"grid is {grid.value}; a sweep knows dorefa and symmetric")
    if not widths or not all(2 <= width <= 8 for width in widths):
        raise ValueError(f"widths are {list(widths)}; use one or more of 2 to 8")
    format = code_format(weight, grid, max(widths), group_size, layer_wise=False)
    if not 1 <= taps <= MOST_TAPS or format.length % taps:
        raise ValueError(f"taps is {taps} for rows of {format.length}; it must divide them and be at most {MOST_TAPS}")
    if format.groups > 1 and format.group_size % taps:
        raise ValueError(f"group_size is {format.group_size} for {taps} taps; use a multiple, or one group a row")
    return format


def sweep_reference(
    weight: Tensor, *, grid: Grid, group_size: int, taps: int = 1, widths: Sequence[int] = WIDTHS
) -> Sweep:
    """Return what ``uniform`` would measure of ``weight`` at each of ``widths``, on the dorefa or symmetric grid.

    ``weight`` is float32, float16 or bfloat16 [rows, length], a row ``length // taps`` input channels of ``taps``
    neighbours. Dot products and norms are those of ``uniform`` to the last bit.

    Raises:
        ValueError: the weight's shape or type, the grid, the widths, the group size or the taps cannot be used.
        NonFiniteError: the weight holds NaN or Inf.
    """
    format = _checked(weight, grid, group_size, taps, widths)
    (rows, length), bits = weight.shape, fineness(format.group_size)
    absmax = _largest(weight, format)
    require_finite(absmax)
    exponent = exponents(absmax)
    inverses = torch.stack([_scales(absmax, format, width).inverse * power_of_two(exponent - bits) for width in widths])
    totals = _Totals.zeros(absmax, len(widths))
    for chunk in row_chunks(rows, length) if length else ():
        for part in row_parts(length, format.group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length).float()
            there = exponent[chunk, part.groups].flatten(), inverses[:, chunk, part.groups].flatten(1)
            totals.put(chunk, part.groups, _segment_totals(segments, *there, grid, bits, widths, taps))
    return _finish(totals, format, widths)


def _largest(weight: Tensor, format: CodeFormat) -> Tensor:
    """Return each segment's largest magnitude, float32 [rows, groups]."""
    (rows, length), found = weight.shape, torch.zeros((weight.shape[0], format.groups), device=weight.device)
    for chunk in row_chunks(rows, length) if length else ():
        for part in row_parts(length, format.group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length)
            target = found[chunk, part.groups]
            target.copy_(torch.maximum(-segments.amin(1), segments.amax(1)).abs().view(target.shape))
    return found


def _finish(totals: _Totals, format: CodeFormat, widths: Sequence[int]) -> Sweep:
    """Turn totals into row statistics: the unit of a total is its grid times the scale of an integer."""
    totals = totals.cpu()
    require_finite(totals.absmax)
    bits, exponent = fineness(format.group_size), exponents(totals.absmax)
    dot, norm, taps = [], [], []
    for k, width in enumerate(widths):
        step, shift = _step(totals.absmax, format, width)
        square = step * step
        dot.append(tree_sum(totals.dots[:, :, k].double() * (step * power_of_two(exponent + shift - bits)), 1))
        norm.append(tree_sum(totals.norms[:, :, k].double() * square, 1))
        taps.append(tree_sum(totals.taps[:, :, k].double() * square, 1))
    original = tree_sum(totals.squares.double() * power_of_two(2 * exponent - bits), 1)
    return Sweep(tuple(widths), torch.stack(dot, 1), torch.stack(norm, 1), torch.stack(taps, 1), original)


def _scales(absmax: Tensor, format: CodeFormat, width: int) -> Scales:
    """Return the scales of codes of ``width`` bits, each of the shape of ``absmax``."""
    there = CodeFormat(format.grid, width, format.length, format.group_size)
    return scales_of(absmax[None].expand(3, *absmax.shape), there)


def _step(absmax: Tensor, format: CodeFormat, width: int) -> tuple[Tensor, int]:
    """Return the float64 value of one level and log2 of the largest level."""
    scale = _scales(absmax, format, width).scale.double()
    return (scale / (2**width - 1), width) if format.grid is Grid.DOREFA else (scale, width - 1)


def sweep_triton(
    weight: Tensor, *, grid: Grid, group_size: int, taps: int = 1, widths: Sequence[int] = WIDTHS
) -> Sweep:
    """Launch the kernel on one tensor; see ``sweep_reference``."""
    format = _checked(weight, grid, group_size, taps, widths)
    if weight.numel() == 0:
        return sweep_reference(weight, grid=grid, group_size=group_size, taps=taps, widths=widths)
    return sweep_batch(Batch.of(weight, format), [taps], widths)[0]


def sweep_batch(batch: Batch, taps: Sequence[int], widths: Sequence[int]) -> list[Sweep]:
    """Launch the kernel once over all tensors of ``batch``, each with its number of taps; see ``sweep_reference``."""
    absmax = batch.flat(torch.float32)
    totals = torch.empty((batch.segments, 3, 8), dtype=torch.int64, device=batch.device)
    taps_there = torch.tensor(taps, dtype=torch.int32).to(batch.device)
    grid = batch.entries[0].format.grid.value
    given, outputs = tuple(widths), (taps_there, absmax, totals)
    batch.launch(sweep_kernel, *outputs, walked=WALKED_SWEEP, GRID=grid, WIDTHS=given, FINENESS=batch.fineness)
    absmax, totals, sweeps = absmax.cpu(), totals.cpu(), []
    for entry in batch.entries:
        shape, many = (entry.weight.shape[0], entry.format.groups), len(widths)
        dots, norms, by_channel = totals[entry.segments].view(*shape, 3, 8).unbind(2)
        wide = (dots[..., 1 : many + 1], norms[..., :many], by_channel[..., :many])
        sweeps.append(_finish(_Totals(entry.segmented(absmax), dots[..., 0], *wide), entry.format, widths))
    return sweeps


def grouped_sweep(
    weights: Sequence[Tensor], taps: Sequence[int], *, grid: Grid, group_size: int, widths: Sequence[int] = WIDTHS
) -> list[Sweep]:
    """Sweep many weights, each with its number of taps, in few launches; see ``sweep_reference``."""
    formats = [_checked(weight, grid, group_size, tap, widths) for weight, tap in zip(weights, taps, strict=True)]
    found: dict[int, Sweep] = {}
    for batch, places in batches_of(weights, formats):
        found |= zip(places, sweep_batch(batch, [taps[place] for place in places], widths), strict=True)
    return [
        found.get(place) or sweep_reference(weight, grid=grid, group_size=group_size, taps=tap, widths=widths)
        for place, (weight, tap) in enumerate(zip(weights, taps, strict=True))  # those without elements: nowhere
    ]


def sweep(weight: Tensor, *, grid: Grid, group_size: int, taps: int = 1, widths: Sequence[int] = WIDTHS) -> Sweep:
    """Measure every width at once; see ``sweep_reference``."""
    run = sweep_triton if use_triton(weight) and weight.shape[-1] < LONGEST else sweep_reference
    return run(weight, grid=grid, group_size=group_size, taps=taps, widths=widths)
