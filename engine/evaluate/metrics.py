"""Figures of two sets of logits; pure functions, all in float64."""

from __future__ import annotations

import math

from torch import Tensor


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the per cent of rows of ``logits`` [N, classes] whose label (int64 [N]) is among the ``k`` largest."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * float((best == labels.unsqueeze(1)).any(dim=1).double().mean())


def agreement(original: Tensor, compressed: Tensor) -> float:
    """Return the fraction, 0-1, of rows of two [N, classes] logits whose largest element is the same."""
    return float((original.argmax(dim=1) == compressed.argmax(dim=1)).double().mean())


def kl_nats(original: Tensor, compressed: Tensor) -> float:
    """Return the mean over rows of KL(softmax of ``original`` || softmax of ``compressed``) in nats, both [N, classes].

    0 where every row's probabilities are equal; it has no upper end.
    """
    before, after = (scores.double().log_softmax(dim=1) for scores in (original, compressed))
    divergence = float((before.exp() * (before - after)).sum(dim=1).mean())
    return max(divergence, 0.0)  # rounding leaves -1e-17 of equal rows


def logit_sqnr_db(original: Tensor, compressed: Tensor) -> float:
    """Return 10 log10(sum f^2 / sum (f - q)^2) in dB over two [N, classes] logits; inf where they are equal."""
    signal = float(original.double().square().sum())
    error = float((original.double() - compressed.double()).square().sum())
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
