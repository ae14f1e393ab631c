"""Tap sums of one layer before and after quantization, and contractions of them with per-channel vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dfmpc.kernels.sums import tree_sum
from torch import Tensor

from ..models.graph import Layer


@dataclass(frozen=True)
class Taps:
    """Sums over the kernel positions, float64 [groups, out / groups, in / groups]: of w and of w squared."""

    sums: Tensor
    squares: Tensor

    @staticmethod
    def of(layer: Layer, sums: Tensor, squares: Tensor) -> Taps:
        """Split [out, in / groups] tap sums by group."""
        shape = (layer.groups, layer.out_channels // layer.groups, layer.in_channels // layer.groups)
        return Taps(sums.view(shape), squares.view(shape))

    def scaled(self, factor: Tensor) -> Taps:
        """Taps of the weight whose input channels are multiplied by ``factor``, float64 [in]."""
        by_group = factor.view(self.sums.shape[0], 1, self.sums.shape[2])
        return Taps(self.sums * by_group, self.squares * by_group.square())

    def apply(self, vector: Tensor) -> Tensor:
        """Σ_i Σ_t w_jit x_i for every output channel j, float64 [out]; ``vector`` is x, float64 [in]."""
        return tree_sum(self.sums * self._by_group(vector), -1).flatten()

    def quadratic(self, variance: Tensor, rho: float) -> Tensor:
        """q_j = Σ_i v_i (ρ (Σ_t w_jit)^2 + (1 - ρ) Σ_t w_jit^2), float64 [out] (methods.md, section 2)."""
        power = torch.lerp(self.squares, self.sums.square(), rho)
        return tree_sum(power.mul_(self._by_group(variance)), -1).flatten()

    def _by_group(self, vector: Tensor) -> Tensor:
        return vector.view(self.sums.shape[0], 1, self.sums.shape[2])


def refine_mean(
    taps: Taps, mean: Tensor, variance: Tensor, output_mean: Tensor, output_variance: Tensor, tau: float
) -> Tensor:
    """Correct a layer's input means by what is known of its output's: m += K (μ - b - S m), float64 [in].

    K = diag(v) Sᵀ (S diag(v) Sᵀ + τ diag(σ²))⁻¹ with S the tap sums, solved on the smaller side (methods.md,
    section 2).
    ``output_mean`` is μ - b, ``output_variance`` σ² with eps, both float64 [out].
    """
    groups, outs, ins = taps.sums.shape
    residual = (output_mean - taps.apply(mean)).view(groups, outs, 1)
    root = variance.clamp_min(0).sqrt().view(groups, 1, ins)
    noise = (tau * output_variance).sqrt().view(groups, outs, 1)
    A = taps.sums * root / noise
    whitened = residual / noise
    if outs <= ins:
        gram = A @ A.transpose(1, 2) + torch.eye(outs, dtype=A.dtype)
        step = A.transpose(1, 2) @ _solve(gram, whitened)
    else:
        gram = A.transpose(1, 2) @ A + torch.eye(ins, dtype=A.dtype)
        step = _solve(gram, A.transpose(1, 2) @ whitened)
    return mean + (root.transpose(1, 2) * step).flatten()


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Solve with a symmetric matrix that is the identity plus a positive semidefinite one."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
