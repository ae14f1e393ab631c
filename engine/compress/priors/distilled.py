"""The prior ``distilled``: images changed until a network's BatchNorms see on them what they saw in training.

Cai et al., ZeroQ, arXiv 2001.00281, section 3.1; with the jitter and smoothness of Yin et al., DeepInversion,
arXiv 1912.08795. The one prior that runs the network, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import NonFiniteError, UnsupportedModelError, UsageError

STEPS = 100
LEARNING_RATE = 0.05
"""Adam's, of normalised pixels; falls to 0 as a half cosine."""
SMOOTHNESS = 1e-3
"""Weight of the mean squared difference of neighbouring pixels."""
JITTER = 1 / 16
"""Every step sees the images rolled by up to this part of their sides."""
VARIANCE_FLOOR = 1e-3
"""Of a layer's mean running variance: channels below are dead, and what is relative to theirs would drown the rest."""
_PIXELS = 2**16
"""Pixels that go through the network at once: about 1 GB of activations in the widest networks of this kind."""


@dataclass(frozen=True)
class _Seen:
    """What one BatchNorm saw: mean and mean square of its input less the running mean, [channels]."""

    first: Tensor
    second: Tensor
    variance: Tensor
    """The running variance, 1 for dead channels."""
    alive: Tensor
    """1, and 0 for dead channels."""

    def mismatch(self) -> Tensor:
        """Mean over living channels of (mean - mu)^2 / sigma^2 + (var / sigma^2 - 1)^2."""
        ratio = (self.second - self.first.square()) / self.variance
        error = self.first.square() / self.variance + (ratio - 1).square()
        return (error * self.alive).sum() / self.alive.sum().clamp_min(1)


class _Observer(TorchFunctionMode):
    """Sees every BatchNorm call of the forward passes inside it, of modules and of exported programs alike."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Seen] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "batch_norm" in getattr(func, "__name__", ""):
            self._see(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # torch.nn.functional has the statistics before weight and bias, ATen and torch behind them.
        places = {"input": 0, "running_mean": 1, "running_var": 2}
        if func is not nn.functional.batch_norm:
            places |= {"running_mean": 3, "running_var": 4}
        x, mean, variance = (kwargs.get(name, args[i] if i < len(args) else None) for name, i in places.items())
        if x is None or mean is None or variance is None:
            return
        axes = [axis for axis in range(x.dim()) if axis != 1]
        centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
        alive = (variance > VARIANCE_FLOOR * variance.mean()).to(variance.dtype)
        kept = torch.where(alive > 0, variance, 1.0)
        self.seen.append(_Seen(centred.mean(axes), centred.square().mean(axes), kept, alive))


def distil(module: nn.Module, start: Tensor, *, steps: int = STEPS, seed: int = 0, batch: int | None = None) -> Tensor:
    """Return ``start`` changed by ``steps`` steps of Adam so that the BatchNorms' inputs have their running statistics.

    ``start``: normalised images, float32 [N, C, H, W], on the device of ``module``, which is in eval mode and stays as
    it is. Minimises ``mismatch`` plus SMOOTHNESS times the mean squared difference of neighbours; values stay within
    the start's range a channel. ``batch`` is the only batch that the module takes, where it was exported with one.
    Images go through in portions that bound the memory, and the gradient is that of the whole set's statistics. The
    same seed gives the same images on the same kind of machine only: the network computes in float32.

    Raises UnsupportedModelError where no BatchNorm with running statistics is reached, NonFiniteError where the loss
    is NaN or Inf, UsageError where there are fewer images than ``batch``.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = start.amin((0, 2, 3), keepdim=True), start.amax((0, 2, 3), keepdim=True)
    images = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=LEARNING_RATE)
    for step in range(steps):
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + cos(pi * step / steps)) / 2
        adam.zero_grad()
        _backward(module, images, _jitter(images, generator), batch)
        adam.step()
        with torch.no_grad():
            images.clamp_(low, high)
    return images.detach()


def mismatch(module: nn.Module, images: Tensor, batch: int | None = None) -> float:
    """Return how far the BatchNorms' inputs are from their running statistics, on normalised ``images`` [N, C, H, W].

    The mean over BatchNorms and their living channels of (mean - mu)^2 / sigma^2 + (var / sigma^2 - 1)^2: 0 for
    images that are just like those of the training. Raises what ``distil`` raises.
    """
    return float(_loss(_whole(module, images, lambda x: x, batch)))


def _jitter(images: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """One roll for all images of a step."""
    most = [int(side * JITTER) for side in images.shape[2:]]
    shift = [int(torch.randint(-limit, limit + 1, (), generator=generator)) for limit in most]
    return lambda x: x.roll(shift, (2, 3))


def _backward(module: nn.Module, images: Tensor, view: Callable[[Tensor], Tensor], batch: int | None) -> None:
    """Add the loss's gradient to ``images.grad``."""
    portions = list(_portions(images, batch))
    smooth = SMOOTHNESS * _roughness(images)
    if len(portions) == 1:
        (_loss(_observe(module, view(images))) + smooth).backward()  # type: ignore[no-untyped-call]
        return
    smooth.backward()  # type: ignore[no-untyped-call]
    whole = _whole(module, images, view, batch)
    moments = [moment.requires_grad_() for seen in whole for moment in (seen.first, seen.second)]
    slopes = torch.autograd.grad(_loss(whole), moments)
    for portion in portions:
        seen = _observe(module, view(portion))
        own = [moment for one in seen for moment in (one.first, one.second)]
        torch.autograd.backward(own, [slope / len(portions) for slope in slopes])


def _whole(module: nn.Module, images: Tensor, view: Callable[[Tensor], Tensor], batch: int | None) -> list[_Seen]:
    """What the BatchNorms see on all portions together, without gradients."""
    with torch.no_grad():
        found = [_observe(module, view(portion)) for portion in _portions(images, batch)]
    return [
        replace(
            same[0],
            first=torch.stack([seen.first for seen in same]).mean(0),
            second=torch.stack([seen.second for seen in same]).mean(0),
        )
        for same in zip(*found, strict=True)
    ]


def _portions(images: Tensor, batch: int | None) -> Iterator[Tensor]:
    """Portions of one size; the last may share images with the one before it."""
    size = batch or max(1, min(len(images), _PIXELS // (images.shape[2] * images.shape[3])))
    if size > len(images) or not len(images):
        raise UsageError(f"{len(images)} images to distil: the network takes {size} at a time; ask for that many")
    starts = range(0, len(images) - size + 1, size)
    yield from (images[start : start + size] for start in starts)
    if len(images) % size:
        yield images[-size:]


def _observe(module: nn.Module, images: Tensor) -> list[_Seen]:
    with _Observer() as observer:
        module(images)
    if not observer.seen:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no BatchNorm with running statistics to distil images from; "
            "use the prior 'leaves', or calibrator: analytic"
        )
    seen: list[_Seen] = observer.seen
    return seen


def _loss(seen: Sequence[_Seen]) -> Tensor:
    loss = torch.stack([one.mismatch() for one in seen]).mean()
    if not bool(loss.isfinite()):
        raise NonFiniteError(
            "distilling images: the BatchNorms' inputs hold NaN or Inf; use the prior 'leaves', or calibrator: analytic"
        )
    return loss


def _roughness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbours, 0 along a side of one pixel."""
    steps = [images.diff(dim=axis) for axis in (2, 3) if images.shape[axis] > 1]
    return sum((step.square().mean() for step in steps), images.new_zeros(()))
