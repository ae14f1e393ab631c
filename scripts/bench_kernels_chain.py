"""The same work without our kernels: eager PyTorch, torch.compile, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Chain = Callable[[Tensor], tuple[Tensor, ...]]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return the dense LSB-first stream of uint8 codes [rows, length]: eight codes a word, ``bits`` bytes of it."""
    rows, length = codes.shape
    lanes = torch.nn.functional.pad(codes, (0, -length % 8)).view(rows, -1, 8)
    if bits in (2, 4):
        few = lanes.view(rows, -1, 8 // bits)
        shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
        stream = (few << shifts).sum(2, dtype=torch.uint8)
    else:
        shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
        words = (lanes.to(torch.int64) << shifts).sum(2)
        bytes_of = torch.arange(0, 8 * bits, 8, device=codes.device)
        stream = ((words[:, :, None] >> bytes_of) & 255).to(torch.uint8).view(rows, -1)
    return stream[:, : (length * bits + 7) // 8]


def ternary_chain(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes, scale, ⟨Ŵ,W⟩, ‖Ŵ‖² and ‖W‖² a row: mean, threshold, where, packing, all in float32."""
    wide = weight.float()
    magnitude = wide.abs()
    mask = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
    count = mask.sum(1, keepdim=True)
    scale = (magnitude * mask).sum(1, keepdim=True) / count.clamp(min=1)
    level = torch.where(mask, torch.sign(wide), 0.0)
    value = scale * level
    sums = (value * wide).sum(1), value.square().sum(1), wide.square().sum(1)
    return packed((level + 1).to(torch.uint8), 2), scale, *sums


def uniform_chain(weight: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes, scale, ⟨Ŵ,W⟩, ‖Ŵ‖² and ‖W‖² a row of the DoReFa grid, in float32."""
    wide, levels = weight.float(), 2**bits - 1
    scale = wide.abs().amax(1, keepdim=True)
    level = torch.round(wide * (levels / (2 * scale)) + levels / 2).clamp(0, levels)
    value = scale * (2 * level - levels) / levels
    sums = (value * wide).sum(1), value.square().sum(1), wide.square().sum(1)
    return packed(level.to(torch.uint8), bits), scale, *sums


CHAINS: dict[str, Chain] = {
    "ternary": ternary_chain,
    "uniform 4": lambda weight: uniform_chain(weight, 4),
    "uniform 6": lambda weight: uniform_chain(weight, 6),
}


def peers() -> dict[str, Callable[[Tensor], object]]:
    """Return what quantizes one matrix [rows, length] to 4 or 8 bits in the libraries that are installed."""
    found: dict[str, Callable[[Tensor], object]] = {}
    if find_spec("hqq") is not None:
        from hqq.core.quantize import Quantizer  # noqa: PLC0415 - only where it is installed

        found["HQQ 4 bit, groups of 64"] = lambda weight: Quantizer.quantize(weight, nbits=4, group_size=64, axis=1)
    if find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

        def int8(weight: Tensor) -> object:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            return quantize_(layer, Int8WeightOnlyConfig())

        found["torchao int8 weight only"] = int8
    return found


ABSENT = [name for name in ("hqq", "torchao") if find_spec(name) is None]
