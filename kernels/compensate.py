"""The closed-form coefficients c that let a HIGH layer repair its LOW one (arXiv 2307.00498, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ._triton import jit, tl
from .launch import on_device, use_triton, warps_for

DEAD_FRACTION = 1e-12
"""A channel is dead where the denominator is at most this fraction of the layer's largest."""
BLOCK = 512
"""Channels that a program works on at a time: four for each thread of four warps."""


@dataclass(frozen=True)
class NormVectors:
    """A BatchNorm's vectors for the LOW layer's channels, float64 [C]: original and re-estimated statistics."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    sigma: Tensor
    """sqrt(variance + eps)."""
    quantized_mean: Tensor
    quantized_sigma: Tensor


@dataclass(frozen=True)
class LowLayer:
    """What the solve needs of a LOW layer; every vector is float64 [C], all on one device."""

    dot: Tensor
    """<Ŵ, W> of every row."""
    quantized_norm: Tensor
    """||Ŵ||² of every row."""
    bias: Tensor
    """The convolution's b; zeros where it has none."""
    norm: NormVectors
    lambda1: float
    lambda2: float


@dataclass(frozen=True)
class Solution:
    """Coefficients c, float64 [C], all >= 0, and which channels are dead (c = 1 there)."""

    c: Tensor
    dead: Tensor


def _solve(layer: LowLayer) -> Solution:
    norm = layer.norm
    scale, quantized_scale = norm.gamma / norm.sigma, norm.gamma / norm.quantized_sigma
    y = norm.beta + scale * (layer.bias - norm.mean)
    y_hat = norm.beta + quantized_scale * (layer.bias - norm.quantized_mean)
    numerator = scale * quantized_scale * layer.dot + layer.lambda1 * y_hat * y
    power = quantized_scale.square() * layer.quantized_norm
    denominator = power + layer.lambda1 * y_hat.square() + layer.lambda2
    dead = denominator <= DEAD_FRACTION * denominator.max() if len(denominator) else denominator > 0
    c = torch.where(dead, 1.0, numerator / torch.where(dead, 1.0, denominator)).clamp_min(0)
    return Solution(c, dead)


def compensate_reference(layers: Sequence[LowLayer]) -> list[Solution]:
    """Minimise ||c X̂ - X||² + λ1 (c ŷ - y)² + λ2 c² for every channel of every layer, c >= 0.

    X = γ W / σ and X̂ = γ Ŵ / σ̂ enter through <Ŵ, W> and ||Ŵ||²; y = β + γ (b - μ) / σ, ŷ likewise with the
    re-estimated statistics. What is NaN in a channel stays NaN in its c.

    Raises:
        ValueError: a vector of a layer is not float64 or has another length than its others.
    """
    for layer in layers:
        _check(layer)
    return [_solve(layer) for layer in layers]


def _vectors(layer: LowLayer) -> list[Tensor]:
    """Return the nine vectors of a layer in the kernel's order."""
    norm = [getattr(layer.norm, field.name) for field in fields(NormVectors)]
    return [layer.dot, layer.quantized_norm, layer.bias, *norm]


def _check(layer: LowLayer) -> None:
    for vector in _vectors(layer):
        if vector.dtype is not torch.float64 or vector.shape != (layer.dot.numel(),):
            raise ValueError(
                f"a vector is {vector.dtype} with shape {tuple(vector.shape)}; expected float64 "
                f"({layer.dot.numel()},), as many as <Ŵ, W> has channels"
            )


@jit
def compensate_kernel(
    vector_ptr: tl.tensor,
    lambda_ptr: tl.tensor,
    start_ptr: tl.tensor,
    c_ptr: tl.tensor,
    dead_ptr: tl.tensor,
    total: tl.tensor,
    DEAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """C = max(0, (s ŝ <Ŵ,W> + λ1 ŷ y) / (ŝ² ||Ŵ||² + λ1 ŷ² + λ2)) with s = γ/σ, ŝ = γ/σ̂; a layer a program."""
    i_layer = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + i_layer)
    stop = tl.load(start_ptr + i_layer + 1)
    lambda1 = tl.load(lambda_ptr + 2 * i_layer)
    lambda2 = tl.load(lambda_ptr + 2 * i_layer + 1)
    largest = tl.full((1,), float("-inf"), dtype=tl.float64)
    unknown = tl.zeros((1,), dtype=tl.int32)
    for first in range(start, stop, BLOCK):
        o_channel = first + tl.arange(0, BLOCK)
        m_channel = o_channel < stop
        _, b_denominator = fraction_kernel(vector_ptr + o_channel, m_channel, total, lambda1, lambda2)
        b_known = tl.abs(b_denominator) >= 0  # not NaN
        largest = tl.maximum(largest, tl.max(tl.where(m_channel & b_known, b_denominator, float("-inf")), axis=0))
        unknown += tl.sum((m_channel & (b_known == 0)).to(tl.int32), axis=0)
    # a denominator of NaN makes the largest NaN, and then no channel is dead
    limit = tl.where(unknown > 0, float("nan"), DEAD * largest)
    for first in range(start, stop, BLOCK):
        o_channel = first + tl.arange(0, BLOCK)
        m_channel = o_channel < stop
        b_numerator, b_denominator = fraction_kernel(vector_ptr + o_channel, m_channel, total, lambda1, lambda2)
        b_dead = b_denominator <= limit
        b_c = tl.where(b_dead, 1.0, b_numerator / tl.where(b_dead, 1.0, b_denominator))
        tl.store(c_ptr + o_channel, tl.where(b_c < 0, 0.0, b_c), mask=m_channel)
        tl.store(dead_ptr + o_channel, b_dead.to(tl.uint8), mask=m_channel)


@jit
def fraction_kernel(
    here_ptr: tl.tensor, mask: tl.tensor, total: tl.tensor, lambda1: tl.tensor, lambda2: tl.tensor
) -> tl.tensor:
    """Return numerator and denominator of c, float64, in the reference's order of operations."""
    total = total + tl.zeros((), dtype=tl.int64)  # one channel in all is a constant to the compiler
    b_dot = tl.load(here_ptr, mask=mask, other=0.0)
    b_norm = tl.load(here_ptr + total, mask=mask, other=0.0)
    b_bias = tl.load(here_ptr + 2 * total, mask=mask, other=0.0)
    b_gamma = tl.load(here_ptr + 3 * total, mask=mask, other=0.0)
    b_beta = tl.load(here_ptr + 4 * total, mask=mask, other=0.0)
    b_mean = tl.load(here_ptr + 5 * total, mask=mask, other=0.0)
    b_sigma = tl.load(here_ptr + 6 * total, mask=mask, other=1.0)
    b_new_mean = tl.load(here_ptr + 7 * total, mask=mask, other=0.0)
    b_new_sigma = tl.load(here_ptr + 8 * total, mask=mask, other=1.0)
    b_scale = b_gamma / b_sigma
    b_new_scale = b_gamma / b_new_sigma
    b_y = b_beta + b_scale * (b_bias - b_mean)
    b_new_y = b_beta + b_new_scale * (b_bias - b_new_mean)
    b_numerator = b_scale * b_new_scale * b_dot + lambda1 * b_new_y * b_y
    b_denominator = b_new_scale * b_new_scale * b_norm + lambda1 * (b_new_y * b_new_y) + lambda2
    return b_numerator, b_denominator


def compensate_triton(layers: Sequence[LowLayer]) -> list[Solution]:
    """Launch the kernel, one program a layer; see ``compensate_reference``."""
    for layer in layers:
        _check(layer)
    if not layers:
        return []
    device = layers[0].dot.device
    sizes = [layer.dot.numel() for layer in layers]
    vectors = torch.stack([torch.cat(column) for column in zip(*map(_vectors, layers), strict=True)])
    lambdas = torch.tensor([[layer.lambda1, layer.lambda2] for layer in layers], dtype=torch.float64, device=device)
    starts = torch.tensor([0, *sizes], device=device).cumsum(0)
    c = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    dead = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    with on_device(c):
        compensate_kernel[(len(layers),)](
            vectors,
            lambdas,
            starts,
            c,
            dead,
            sum(sizes),
            DEAD=DEAD_FRACTION,
            BLOCK=BLOCK,
            num_warps=warps_for(4),
            enable_fp_fusion=False,
        )
    pairs = zip(torch.split(c, sizes), torch.split(dead.bool(), sizes), strict=True)
    return [Solution(*pair) for pair in pairs]


def compensate(layers: Sequence[LowLayer]) -> list[Solution]:
    """Solve for c; see ``compensate_reference``. One launch does all layers, which are on one device."""
    run = compensate_triton if layers and use_triton(layers[0].dot) else compensate_reference
    return run(layers)
