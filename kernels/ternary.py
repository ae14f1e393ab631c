"""Ternary codes with a threshold of 0.7 mean magnitudes (TWN, arXiv 1605.04711; docs/methods.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .blocks import Block, ExactSums, Segments
from .formats import CodeFormat, Grid, Quantized
from .launch import use_triton
from .optimum import optimal_thresholds_reference, thresholds_batch
from .segments import SegmentSums, code_format, finish, nothing, require_finite, row_parts, segment_sizes, units_of
from .statistics import row_statistics_reference, statistics_batch
from .sums import tree_sum
from .table import Batch
from .tap_sums import check_taps
from .tapped import TappedLaunch, with_taps
from .ternary_kernel import ternary_kernel

Rule = Literal["twn", "exact"]
"""How a threshold is found: 0.7 of the mean magnitude, or the one of least squared error."""
THRESHOLD = 0.7
"""Of the mean magnitude: the minimiser of the squared error for normal and uniform weights, approximately."""


def _threshold(total: Tensor, count: int) -> Tensor:
    """Return the float32 threshold from float64 sums of magnitudes over ``count`` elements."""
    return (THRESHOLD * (total / count)).float()


def _layer_threshold(abs_sum: Tensor, count: int) -> Tensor:
    """Return the threshold [1] of a whole tensor from the sums [rows, 1] of its rows."""
    return _threshold(tree_sum(abs_sum[:, 0], 0)[None], count)


@torch.inference_mode()  # without it short segments wait for what autograd notes of every view
def _encode(segments: Segments, format: CodeFormat, given: Tensor | None, packed: Tensor) -> tuple[Tensor, ...]:
    """Write the codes of ``segments`` to ``packed`` and return the fields of ``SegmentSums``.

    ``given`` is the float32 threshold of each or of all; without one it is TWN's.
    """
    absmax = segments.extremes()[0]
    units = units_of(format, absmax, absmax)
    sums, magnitudes = ExactSums(segments, units[:2]), ExactSums(segments, units[1:2], first=2)
    number = torch.zeros_like(absmax, dtype=torch.float64)
    numbers, rows, steps = segments.each(number), segments.rows(packed), segments.each(units[1])
    thresholds = () if given is None else segments.across(given.double())
    for block in segments.blocks():
        magnitude = torch.abs(block.wide, out=block.level)
        if given is None:
            threshold = _twn_threshold(block, magnitudes, steps[block.number])
        else:
            threshold = thresholds[block.number]
        # a comparison that writes numbers is much faster than one that writes booleans
        beyond = torch.gt(magnitude, threshold, out=block.level)
        torch.sum(beyond, block.dim, out=numbers[block.number])
        sign = beyond.mul_(torch.sign(block.wide, out=block.term))
        block.store(sign, 1, 2, rows[block.number])
        sums.multiply(block, 1, block.wide, sign)
        sums.multiply(block, 0, block.wide, block.wide)
        sums.add(block)
    count = number.long()
    return absmax, units, torch.stack([*sums.totals(), count]), segments.length - count


def _twn_threshold(block: Block, magnitudes: ExactSums, step: Tensor) -> Tensor:
    """Return the float64 threshold of the magnitudes in ``level``; what ``magnitudes`` counts is worth ``step``."""
    magnitudes.take(block, 0, block.level)
    magnitudes.add(block)
    found = _threshold(magnitudes.of(block)[0] * step, block.level.shape[block.dim])
    return found.double().unsqueeze(block.dim)


def ternary_triton(
    weight: Tensor, *, group_size: int, layer_wise: bool = False, rule: Rule = "twn", taps: int = 0
) -> Quantized:
    """Launch the kernel on one tensor; see ``ternary_reference``."""
    format = _format(weight, group_size, layer_wise, taps)
    if weight.numel() == 0:
        return with_taps(nothing(format, weight), weight, taps)
    return ternary_batch(Batch.of(weight, format), rule, [taps])[0]


def _format(weight: Tensor, group_size: int, layer_wise: bool, taps: int) -> CodeFormat:
    if taps:
        check_taps(weight, taps)
    return code_format(weight, Grid.TERNARY, 2, group_size, layer_wise)


def ternary_batch(batch: Batch, rule: Rule = "twn", taps: Sequence[int] = ()) -> list[Quantized]:
    """Launch the kernel once over all tensors of ``batch``, each with its ``taps``; see ``ternary_reference``."""
    layer_wise = batch.entries[0].format.layer_wise
    packed, absmax, count = batch.flat_bytes(), batch.flat(torch.float32), batch.flat(torch.int32)
    squares, kept = batch.flat(torch.int64), batch.flat(torch.int64)
    threshold = _layer_thresholds(batch) if layer_wise else absmax
    given = "tensor" if layer_wise else ""
    if rule == "exact":
        threshold = thresholds_batch(batch)
        given = "tensor" if layer_wise else "segment"
    outputs, tapped = (packed, absmax, squares, kept, count), TappedLaunch(batch, taps)
    batch.launch(ternary_kernel, threshold, *outputs, GIVEN=given, FINENESS=batch.fineness, **tapped.arguments())
    sums = [found.cpu() for found in outputs[1:]]
    found = []
    for entry in batch.entries:
        absmax, squares, kept, count = map(entry.segmented, sums)
        units, totals = units_of(entry.format, absmax, absmax), torch.stack([squares, kept, count.long()])
        summed = SegmentSums(absmax, units, totals, segment_sizes(entry.format) - count)
        found.append(_finish(entry.format, entry.packed(packed), summed))
    return tapped.added(batch.entries, found)


def _layer_thresholds(batch: Batch) -> Tensor:
    """Return one float32 threshold a tensor of the batch, on its device."""
    found = []
    for statistics, entry in zip(statistics_batch(batch), batch.entries, strict=True):
        require_finite(statistics.absmax)
        # on the CPU: a GPU divides by a number as a product with its reciprocal
        found.append(_layer_threshold(statistics.abs_sum.cpu(), entry.weight.numel()))
    return torch.cat(found).to(batch.device)


def _finish(format: CodeFormat, codes: Tensor, sums: SegmentSums) -> Quantized:
    """Derive the scale from the kept magnitudes and their count, and the row statistics from all."""
    sums = sums.cpu()
    require_finite(sums.absmax)
    kept, count = sums.totals[1].double() * sums.units[1], sums.totals[2]
    if format.layer_wise:
        kept, count = tree_sum(kept, 0)[None], count.sum(0)[None]
    scale = torch.where(count > 0, kept / count.clamp(min=1), 0.0).float()
    return finish(format, codes, scale.to(codes.device), None, sums, scale.double())


def ternary_reference(
    weight: Tensor, *, group_size: int, layer_wise: bool = False, rule: Rule = "twn", taps: int = 0
) -> Quantized:
    """Quantize ``weight`` (float32, float16 or bfloat16 [rows, length]) to {-1, 0, 1} times a scale.

    A segment's threshold is float32(0.7 * mean|w|); weights strictly above it keep their sign; the scale is the mean
    magnitude of those kept, 0 where there are none. ``layer_wise`` takes one threshold and scale for the whole tensor.
    The ``rule`` "exact" takes the threshold of least squared error instead (optimum.py). ``taps`` asks for the sums
    over each run of so many neighbours too, of the weight and of what its codes stand for.

    Raises:
        ValueError: the weight's shape or type or the group size cannot be used, or ``taps`` does not divide the length.
        NonFiniteError: the weight holds NaN or Inf.
    """
    format = _format(weight, group_size, layer_wise, taps)
    if weight.numel() == 0:
        return with_taps(nothing(format, weight), weight, taps)
    (rows, length), threshold = weight.shape, None
    if rule == "exact":
        threshold = optimal_thresholds_reference(weight, format)
    elif layer_wise:
        statistics = row_statistics_reference(weight, length)
        require_finite(statistics.absmax)
        threshold = _layer_threshold(statistics.abs_sum, weight.numel())[:, None]
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    found = []
    for part in row_parts(length, format.group_size):
        given = None if threshold is None else threshold[:, part.groups].flatten()
        segments = Segments(weight, part)
        found.append(_encode(segments, format, given, packed[:, part.bytes(2)]))
    return with_taps(_finish(format, packed, SegmentSums.joined(found, rows)), weight, taps)


def ternary(
    weight: Tensor, *, group_size: int, layer_wise: bool = False, rule: Rule = "twn", taps: int = 0
) -> Quantized:
    """Quantize to ternary codes; see ``ternary_reference``."""
    run = ternary_triton if use_triton(weight) else ternary_reference
    return run(weight, group_size=group_size, layer_wise=layer_wise, rule=rule, taps=taps)
