"""Four families of plain networks in any width, and weights for them that look trained.

Every factory takes a width (channels of its first stage, or for DenseNet its growth) and gives ten logits for images of
[N, 3, H, W], H and W a multiple of 16. Nothing here needs more than torch: make_registry.py
copies this file into a registry as its code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CLASSES = 10


def _unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class BasicBlock(nn.Module):
    """ResNet's block of two 3 x 3 convolutions, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _unit(inputs, outputs, 3, stride), _unit(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _unit(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [_unit(inputs, inner, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [_unit(inner, inner, 3, stride, inner), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, _unit(inner, outputs, 1))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return x + self.layers(x) if self.added else self.layers(x)


class DenseLayer(nn.Module):
    """DenseNet's bottleneck layer: its output is put behind its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, inputs + growth, H, W]."""
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


def resnet(width: int) -> nn.Module:
    """Four stages of two blocks, ResNet18's plan; ``width`` 64 is its size."""
    layers: list[nn.Module] = [_unit(3, width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, *_head(inputs))


def vgg(width: int) -> nn.Module:
    """VGG11's eight convolutions with BatchNorm, pooled four times; ``width`` 64 is its size."""
    layers: list[nn.Module] = []
    inputs = 3
    for factor, pooled in ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, False)):
        layers += [_unit(inputs, factor * width), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
        inputs = factor * width
    return nn.Sequential(*layers, *_head(inputs))


def mobilenet(width: int) -> nn.Module:
    """Inverted residuals as in MobileNetV2, seven of them; ``width`` 32 comes to half a million weights."""
    plan = ((1, width // 2, 1), (6, width, 2), (6, width, 1), (6, 2 * width, 2), (6, 2 * width, 1), (6, 4 * width, 2))
    layers: list[nn.Module] = [_unit(3, width), nn.ReLU6()]
    inputs = width
    for expansion, outputs, stride in (*plan, (6, 4 * width, 1)):
        layers.append(InvertedResidual(inputs, outputs, stride, expansion))
        inputs = outputs
    return nn.Sequential(*layers, _unit(inputs, 16 * width, 1), nn.ReLU6(), *_head(16 * width))


def densenet(growth: int) -> nn.Module:
    """Three dense blocks of six bottleneck layers with halving transitions between them."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for block in range(3):
        layers += [DenseLayer(width + index * growth, growth) for index in range(6)]
        width += 6 * growth
        if block < 2:
            transition = nn.Conv2d(width, width // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(width), nn.ReLU(), transition, nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), *_head(width))


FAMILIES = {"resnet": resnet, "vgg": vgg, "mobilenet": mobilenet, "densenet": densenet}


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Overwrite all tensors of ``module`` in place: He's normal weights, and norms as training leaves them.

    The variance a BatchNorm has recorded scatters about the 2 that He's weights give behind a ReLU; scales scatter
    about 1, shifts and means about 0, and a hundredth of the channels is nearly silent. The same seed gives the same
    tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = math.prod(layer.weight.shape[1:])
            layer.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.05, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            _fill_norm(layer, generator)


def _fill_norm(norm: nn.BatchNorm2d, generator: torch.Generator) -> None:
    running_mean, running_var, counter = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if running_mean is None or running_var is None or counter is None:
        raise ValueError("a BatchNorm without statistics cannot look trained: build it with track_running_stats")
    norm.weight.uniform_(0.5, 1.5, generator=generator)
    norm.weight[torch.rand(norm.weight.shape, generator=generator) < 0.01] *= 1e-3
    norm.bias.normal_(0, 0.2, generator=generator)
    running_mean.normal_(0, 0.3, generator=generator)
    running_var.log_normal_(math.log(2), 0.4, generator=generator)
    counter.fill_(10_000)
