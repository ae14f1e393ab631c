"""A layer's output moments from its input's, straight from the weight (docs/methods.md, "Calibrators")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dfmpc.errors import NonFiniteError
from torch import Tensor

from ._triton import jit, tl
from .channels import channels_at, row_pointers
from .device import exponent_of, two_to_the
from .formats import Grid
from .launch import use_triton
from .segments import check_weight, code_format, require_finite, row_chunks
from .shapes import WALKED_MOMENTS
from .sums import exponents, fineness, power_of_two
from .table import Batch, batches_of
from .tiles import item_of, largest_bits, load_tile, segments_of, without_pattern

LARGEST = 2.0**500
"""Moments of a float32 network stay far below; above, their scaled forms would leave float64."""
_MAGIC = 1.5 * 2.0**52
_PATTERN = 0x4338 << 48
"""The bits of 1.5 * 2^52: what is added to it and below 2^51 is rounded half to even into its low bits."""


@dataclass(frozen=True)
class LayerInput:
    """A weight and what is known of its input."""

    weight: Tensor
    """Float32, float16 or bfloat16 [rows, length]: rows of ``length // taps`` input channels of ``taps`` neighbours."""
    taps: int
    mean: Tensor
    """Float64 [in]: of every input channel. A grouped convolution has several times its rows' channels."""
    variance: Tensor
    """Float64 [in]."""
    rho: float
    """Correlation between neighbouring positions, 0 to 1."""


@dataclass(frozen=True)
class OutputMoments:
    """Float64 [rows] on the CPU."""

    mean: Tensor
    """Σ_i S_ri μ_i, S the sums of w over the taps; without the layer's bias."""
    variance: Tensor
    """Σ_i ((1 - ρ) Q_ri + ρ S_ri²) v_i, Q the sums of w² over the taps."""


@dataclass(frozen=True)
class _Scaled:
    """The input of one layer on the grid of its sums."""

    channels: int
    """Input channels of a row."""
    reach: int
    """log2 of a power of two that is at least ``taps``."""
    bits: int
    """Fraction bits of the sums."""
    vectors: Tensor
    """Float64 [2, groups, channels]: mean and variance times 2^(bits - exponent), by the convolution's groups."""
    exponents: Tensor
    """Int64 [2, groups]: magnitudes of the vectors are below 2^exponent."""

    @classmethod
    def of(cls, layer: LayerInput) -> _Scaled:
        """Check ``layer`` and scale its vectors.

        Raises:
            ValueError: the weight, the taps, ρ or the vectors' type or length cannot be used.
            NonFiniteError: a vector holds NaN, Inf or what no network has.
        """
        _check(layer)
        channels = layer.weight.shape[1] // layer.taps
        groups = max(1, layer.mean.numel() // max(1, channels))
        vectors = torch.stack([layer.mean, layer.variance]).view(2, groups, channels)
        largest = vectors.abs().amax(2) if channels else vectors.new_zeros(2, groups)
        for name, values in zip(("mean", "variance"), largest, strict=True):
            if not bool((values < LARGEST).all()):
                raise NonFiniteError(f"the input's {name} holds {float(values.max())}; use finite numbers below 2^500")
        exponents = torch.frexp(largest).exponent.long().clamp(min=-500)
        bits = fineness(max(1, channels))
        vectors = vectors * power_of_two(bits - exponents)[:, :, None]
        return cls(channels, (layer.taps - 1).bit_length(), bits, vectors, exponents)

    def finish(self, absmax: Tensor, totals: Tensor) -> OutputMoments:
        """Turn int64 totals [2, rows] into moments; ``absmax`` is float32 [rows, 1]; both are on the CPU."""
        require_finite(absmax)
        reach = exponents(absmax)[:, 0] + self.reach
        units = power_of_two(torch.stack([reach, 2 * reach]) - self.bits)
        rows = len(reach) // self.exponents.shape[1]
        mean, variance = totals.double() * units * power_of_two(self.exponents.cpu()).repeat_interleave(rows, 1)
        return OutputMoments(mean, variance)


def _check(layer: LayerInput) -> None:
    check_weight(layer.weight, layer.weight.shape[-1])
    rows, length = layer.weight.shape
    if layer.taps < 1 or length % layer.taps:
        raise ValueError(f"taps is {layer.taps} for rows of {length}; it must divide them")
    if not 0 <= layer.rho <= 1:
        raise ValueError(f"rho is {layer.rho}; use 0 to 1")
    channels, inputs = length // layer.taps, layer.mean.numel()
    groups = inputs // channels if channels else 1
    for name, vector in (("mean", layer.mean), ("variance", layer.variance)):
        if vector.dtype is not torch.float64 or vector.shape != (inputs,):
            raise ValueError(f"{name} is {vector.dtype} with shape {tuple(vector.shape)}; expected float64 ({inputs},)")
    if inputs != groups * channels or not groups or rows % groups:
        raise ValueError(
            f"mean has {inputs} channels for {rows} rows of {channels}; use {channels}, or that many for each of the "
            "convolution's groups, which divide the rows"
        )


def moments_reference(weight: Tensor, taps: int, mean: Tensor, variance: Tensor, rho: float) -> OutputMoments:
    """Return mean and variance of every output channel for an input of the given moments; see ``LayerInput``.

    Sums over the taps run from left to right in float64; terms of the sums over channels are rounded to 2^-40 of what
    the largest weight, the taps and the largest moment allow, so that no order changes the result.

    Raises:
        ValueError: the weight, the taps, ρ or the vectors' type or length cannot be used.
        NonFiniteError: the weight or a vector holds NaN or Inf.
    """
    layer = LayerInput(weight, taps, mean, variance, rho)
    scaled, (rows, length) = _Scaled.of(layer), weight.shape
    absmax = torch.zeros((rows, 1), device=weight.device)
    totals = torch.zeros((2, rows), dtype=torch.int64, device=weight.device)
    vectors = scaled.vectors.to(weight.device)
    group = torch.arange(rows, device=weight.device) // max(1, rows // vectors.shape[1])
    for chunk in row_chunks(rows, length) if length else ():
        w = weight[chunk].double()
        absmax[chunk, 0] = w.abs().amax(1).float()
        w.mul_(power_of_two(-exponents(absmax[chunk]) - scaled.reach))
        totals[:, chunk] = _row_totals(w.view(len(w), -1, taps), vectors[:, group[chunk]], rho)
    return scaled.finish(absmax.cpu(), totals.cpu())


def _row_totals(w: Tensor, vectors: Tensor, rho: float) -> Tensor:
    """Return int64 [2, rows] for float64 weights [rows, channels, taps] and vectors [2, rows, channels]."""
    sums, powers = torch.zeros_like(w[:, :, 0]), torch.zeros_like(w[:, :, 0])
    for tap in w.permute(2, 0, 1).contiguous():
        sums += tap
        powers += tap.square()
    powers.mul_(1 - rho).add_(sums.square().mul_(rho))
    terms = torch.stack([sums, powers]).mul_(vectors).add_(_MAGIC)
    return terms.view(torch.int64).sub_(_PATTERN).sum(2)


@jit
def moments_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    layer_ptr: tl.tensor,
    rho_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    variance_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    mean_total_ptr: tl.tensor,
    variance_total_ptr: tl.tensor,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """Sum_i rint(S_i m_i) and sum_i rint(((1 - rho) Q_i + rho S_i²) v_i), S and Q of weights of at most 1 / taps."""
    item_ptr, i_tile, kind = item_of(table_ptr, programs_ptr)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _moments_tile(
                item_ptr,
                i_tile,
                layer_ptr,
                rho_ptr,
                mean_ptr,
                variance_ptr,
                absmax_ptr,
                mean_total_ptr,
                variance_total_ptr,
                DTYPE,
                max(1, 32 * WARPS // (KINDS[k] // 4096)),
                KINDS[k] // 4096,
                KINDS[k] // 4 % 16,
                KINDS[k] // 64 % 64,
                KINDS[k] // 2 % 2 == 1,
            )


@jit
def _moments_tile(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    layer_ptr: tl.tensor,
    rho_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    variance_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    mean_total_ptr: tl.tensor,
    variance_total_ptr: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Read the rows for the largest magnitude; then again, from the nearest cache, a channel a thread."""
    here, m_row, count, o_output, _o_byte = segments_of(item_ptr, i_tile, DTYPE, ROWS, T, V, ALIGNED)
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    for first in range(0, count, NC * T * V):
        b_bits = tl.maximum(b_bits, largest_bits(load_tile(here, m_row, count, first, T, V, NC, ALIGNED), ROWS, T, NC))
    b_absmax = tl.max(b_bits, axis=1).to(tl.float32, bitcast=True)

    i_layer = tl.load(item_ptr + 8)
    taps, reach = tl.load(layer_ptr + 4 * i_layer), tl.load(layer_ptr + 4 * i_layer + 1)
    first_input, group_rows = tl.load(layer_ptr + 4 * i_layer + 2), tl.load(layer_ptr + 4 * i_layer + 3)
    rho, rest = tl.load(rho_ptr + 2 * i_layer), tl.load(rho_ptr + 2 * i_layer + 1)
    channels = count // taps
    b_unit = two_to_the(-exponent_of(b_absmax) - reach.to(tl.int32))[:, None]
    o_input = first_input + (i_tile * ROWS + tl.arange(0, ROWS)) // group_rows * channels
    rows_ptr = row_pointers(item_ptr, i_tile, DTYPE, ROWS)
    b_mean = tl.zeros((ROWS, T), dtype=tl.int64)
    b_variance = tl.zeros((ROWS, T), dtype=tl.int64)
    for first in range(0, channels, T):
        channel_ptr, mask = channels_at(rows_ptr, m_row, first, channels, taps, T)
        b_sum = tl.zeros((ROWS, T), dtype=tl.float64)
        b_power = tl.zeros((ROWS, T), dtype=tl.float64)
        for t in range(0, taps):
            b_w = tl.load(channel_ptr + t, mask=mask, other=0.0).to(tl.float32).to(tl.float64) * b_unit
            b_sum += b_w
            b_power += b_w * b_w
        o_here = o_input[:, None] + (first + tl.arange(0, T))[None, :]
        b_power = rest * b_power + rho * (b_sum * b_sum)
        b_mean += _pattern(b_sum * tl.load(mean_ptr + o_here, mask=mask, other=0.0))
        b_variance += _pattern(b_power * tl.load(variance_ptr + o_here, mask=mask, other=0.0))
    terms = (channels + T - 1) // T * T
    tl.store(absmax_ptr + o_output, b_absmax, mask=m_row)
    tl.store(mean_total_ptr + o_output, without_pattern(tl.sum(b_mean, axis=1), terms), mask=m_row)
    tl.store(variance_total_ptr + o_output, without_pattern(tl.sum(b_variance, axis=1), terms), mask=m_row)


@jit
def _pattern(x: tl.tensor) -> tl.tensor:
    """Return the bits of 1.5 * 2^52 + x: float64 below 2^51 rounded half to even in the low ones."""
    return (x + 6755399441055744.0).to(tl.int64, bitcast=True)


def moments_triton(weight: Tensor, taps: int, mean: Tensor, variance: Tensor, rho: float) -> OutputMoments:
    """Launch the kernel on one layer; see ``moments_reference``."""
    return grouped_moments([LayerInput(weight, taps, mean, variance, rho)])[0]


def grouped_moments(layers: Sequence[LayerInput]) -> list[OutputMoments]:
    """Launch the kernel once for all layers of a type; see ``moments_reference``."""
    scaled = [_Scaled.of(layer) for layer in layers]
    found = [OutputMoments(*torch.zeros((2, len(layer.weight)), dtype=torch.float64)) for layer in layers]
    # the width matters only to codes, and none are written
    formats = [code_format(x.weight, Grid.SYMMETRIC, 8, max(1, x.weight.shape[1]), layer_wise=False) for x in layers]
    for batch, places in batches_of([layer.weight for layer in layers], formats):
        ones, theirs = [layers[place] for place in places], [scaled[place] for place in places]
        for place, result in zip(places, _launch(batch, ones, theirs), strict=True):
            found[place] = result
    return found


def _launch(batch: Batch, layers: Sequence[LayerInput], scaled: Sequence[_Scaled]) -> list[OutputMoments]:
    rows, start = [], 0
    for layer, one in zip(layers, scaled, strict=True):
        rows.append([layer.taps, one.reach, start, len(layer.weight) // one.vectors.shape[1]])
        start += layer.mean.numel()
    vectors = torch.cat([one.vectors.cpu().flatten(1) for one in scaled], 1)
    rho = [[layer.rho, 1 - layer.rho] for layer in layers]
    inputs = (torch.tensor(rows), torch.tensor(rho, dtype=torch.float64), *vectors.unbind())
    absmax, sums = batch.flat(torch.float32), [batch.flat(torch.int64) for _ in range(2)]
    batch.launch(moments_kernel, *(tensor.to(batch.device) for tensor in inputs), absmax, *sums, walked=WALKED_MOMENTS)
    absmax, totals = absmax.cpu(), torch.stack(sums).cpu()
    return [
        one.finish(entry.segmented(absmax), totals[:, entry.segments])
        for one, entry in zip(scaled, batch.entries, strict=True)
    ]


def moments(weight: Tensor, taps: int, mean: Tensor, variance: Tensor, rho: float) -> OutputMoments:
    """Carry an input's moments through a layer; see ``moments_reference``."""
    run = moments_triton if use_triton(weight) else moments_reference
    return run(weight, taps, mean, variance, rho)
