"""The same mathematics as `dfmpc` with the analytic calibrator, written channel by channel in plain PyTorch.

This is the yardstick of bench_compress.py: what one writes in an afternoon, eager, one output channel at a time.
It shares the captured graph and the choice of pairs with the product and nothing else; the bench compares its codes
with the product's before it quotes any time.
"""

from __future__ import annotations

import torch
from dfmpc.models.graph import Layer, Node, Op
from dfmpc.models.load import LoadedModel
from dfmpc.models.pairs import find_pairs
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit stream of one row, LSB first: bits as 0/1, then eight a byte."""
    stream = ((codes[:, None] >> torch.arange(bits)) & 1).flatten()
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (padded << torch.arange(8)).sum(1).to(torch.uint8)


def ternary_channel(row: Tensor) -> tuple[Tensor, Tensor]:
    """TWN of one channel: codes t + 1 and quantized values."""
    delta = (0.7 * row.double().abs().mean()).float()
    mask = row.abs() > delta
    alpha = row.double().abs()[mask].mean().float() if mask.any() else torch.tensor(0.0)
    sign = torch.sign(row) * mask
    return (sign + 1).long(), alpha * sign


def dorefa_channel(row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """DoReFa grid of one channel: codes and quantized values."""
    levels, scale = 2**bits - 1, row.abs().max()
    if scale == 0:
        return torch.full_like(row, levels / 2).round().long(), torch.zeros_like(row)
    codes = torch.round(row.double() * (levels / (2 * scale.double())) + levels / 2).clamp(0, levels)
    return codes.long(), (scale.double() * (2 * codes - levels) / levels).float()


def rectified(mean: Tensor, variance: Tensor, op: Op) -> tuple[Tensor, Tensor]:
    """Mean and variance of the activation of a Gaussian, all channels at once."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def parts(m: Tensor) -> tuple[Tensor, Tensor]:
        s = variance.sqrt().clamp_min(1e-30)
        cdf, pdf = normal.cdf(m / s), normal.log_prob(m / s).exp()
        return m * cdf + s * pdf, (m * m + variance) * cdf + m * s * pdf

    first, second = parts(mean)
    if op is Op.RELU6:
        above, above2 = parts(mean - 6)
        first, second = first - above, second - above2 - 12 * above
    return first, (second - first * first).clamp_min(0)


def compress(model: LoadedModel, low: int, high: int, rho: float) -> dict[str, Tensor]:
    """Return packed codes a layer, restated norms and c; the prior of the means is not refined."""
    lows = find_pairs(model.graph).lows
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for node in model.graph.nodes:
        before = [moments[name] for name in node.inputs]
        if node.layer is not None:
            quantized = quantize(model, node.layer, low if node.layer.name in lows else high, found)
            moments[node.name] = before[0]
            restate(model, node, quantized, before[0], rho, found)
        else:
            moments[node.name] = behind(model, node, before)
    return found


def quantize(model: LoadedModel, layer: Layer, bits: int, found: dict[str, Tensor]) -> Tensor:
    weight = model.state[layer.weight].float().reshape(layer.out_channels, -1)
    rows, packed = [], []
    for row in weight:
        codes, values = ternary_channel(row) if bits == 2 else dorefa_channel(row, bits)
        packed.append(pack(codes, bits))
        rows.append(values)
    found[f"{layer.weight}.codes"] = torch.stack(packed)
    return torch.stack(rows)


def restate(
    model: LoadedModel,
    node: Node,
    quantized: Tensor,
    state: tuple[Tensor, Tensor],
    rho: float,
    found: dict[str, Tensor],
) -> None:
    layer = node.layer
    norm = next((user.norm for user in model.graph.users[node.name] if user.norm is not None), None)
    if layer is None or norm is None:
        return
    weight = model.state[layer.weight].double().reshape(layer.out_channels, -1, layer.taps)
    values = quantized.double().reshape(layer.out_channels, -1, layer.taps)
    width, per_group = weight.shape[1], layer.out_channels // layer.groups
    mean, var = model.state[norm.running_mean].double().clone(), model.state[norm.running_var].double().clone()
    gamma, beta = model.state[norm.weight or ""].double(), model.state[norm.bias or ""].double()
    c = torch.ones_like(mean)
    for j in range(layer.out_channels):
        part = slice(j // per_group * width, j // per_group * width + width)
        m, v = state[0][part], state[1][part]
        w, w_hat = weight[j], values[j]
        old_mean, old_var = mean[j].clone(), var[j].clone()
        mean[j] += ((w_hat - w).sum(1) * m).sum()
        q, q_hat = (((rho * x.sum(1).square() + (1 - rho) * x.square().sum(1)) * v).sum() for x in (w, w_hat))
        var[j] *= q_hat / q if q > 0 else 1.0
        s, s_hat = gamma[j] / (old_var + norm.eps).sqrt(), gamma[j] / (var[j] + norm.eps).sqrt()
        y, y_hat = beta[j] - s * old_mean, beta[j] - s_hat * mean[j]
        power = s_hat * s_hat * w_hat.square().sum() + 0.5 * y_hat * y_hat
        c[j] = (s * s_hat * (w * w_hat).sum() + 0.5 * y * y_hat) / power if power > 0 else 1.0
    found[norm.running_mean], found[norm.running_var], found[f"{layer.name}.c"] = mean, var, c


def behind(model: LoadedModel, node: Node, before: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    channels = node.shape[1] if len(node.shape) > 1 else 1
    if node.norm is not None:
        return model.state[node.norm.bias or ""].double(), model.state[node.norm.weight or ""].double().square()
    if not before:
        return torch.zeros(channels).double(), torch.ones(channels).double()
    if node.op in (Op.RELU, Op.RELU6):
        return rectified(*before[0], node.op)
    if node.op is Op.ADD:
        return before[0][0] + before[1][0], before[0][1] + before[1][1]
    return before[0]
