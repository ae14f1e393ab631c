"""The thresholds of the exact ternary optimum: sorted prefixes (docs/methods.md, "TWN exact")."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .device import exponent_of, two_to_the
from .formats import CodeFormat
from .launch import LaunchShape, on_device, power_of_two_above, warps_for
from .segments import row_chunks, row_parts
from .sums import exponents, fineness, power_of_two
from .table import Batch, sent_to
from .tiles import chunk_mask, item_of, rounded_pattern, segments_of, without_pattern

LONGEST = 8192
"""Elements of a segment that a program sorts in registers; twice as many spill on every GPU (compile_kernels.py)."""


def optimum_shape(segments: int, length: int) -> LaunchShape:
    """Return the tile for ``segments`` padded to a power of two: 8 elements a thread, 16 of the longest."""
    block = max(16, power_of_two_above(length))
    rows = min(max(1, 1024 // block), power_of_two_above(segments))
    return LaunchShape(rows=rows, block=block, num_warps=max(1, min(16, rows * block // 256)))


@jit
def optimum_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sort |w|, a_1 >= a_2 …; store a_(k+1) for the least k of the largest (sum a_1 … a_k)² / k in float64.

    The zeros that pad a segment change nothing: beyond the last magnitude the objective falls.
    """
    item_ptr, i_tile, _ = item_of(table_ptr, programs_ptr)
    here, m_row, count, o_output, _ = segments_of(item_ptr, i_tile, DTYPE, ROWS, 1, BLOCK, False)
    b_w = tl.load(here, mask=chunk_mask(m_row, count, 0, 1, BLOCK, False), other=0.0)
    b_bits = tl.reshape(b_w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, (ROWS, BLOCK))
    b_bits = tl.sort(b_bits, descending=True)  # bits of magnitudes are ordered as these are, NaN above Inf
    b_largest = tl.max(b_bits, axis=1)
    b_e = exponent_of(tl.where(b_largest < 0x7F800000, b_largest, 0).to(tl.float32, bitcast=True))
    y = b_bits.to(tl.float32, bitcast=True).to(tl.float64) * two_to_the(FINENESS // 2 - b_e)[:, None]
    b_term = without_pattern(rounded_pattern(y, 2.0 ** (FINENESS - FINENESS // 2)), 1)
    b_total = tl.cumsum(b_term, axis=1).to(tl.float64)
    o_last = tl.arange(0, BLOCK)[None, :]
    b_gain = b_total * b_total / (o_last + 1).to(tl.float64)
    b_most = tl.max(b_gain, axis=1)
    i_last = tl.min(tl.where(b_gain == b_most[:, None], o_last, BLOCK), axis=1)
    b_next = tl.sum(tl.where(o_last == i_last[:, None] + 1, b_bits, 0), axis=1)
    tl.store(threshold_ptr + o_output, b_next.to(tl.float32, bitcast=True), mask=m_row)


def optimal_thresholds_triton(weight: Tensor, format: CodeFormat) -> Tensor:
    """Launch the kernel on one tensor of at least one element; see ``optimal_thresholds_reference``."""
    return thresholds_batch(Batch.of(weight, format)).view(1 if format.layer_wise else len(weight), -1)


def thresholds_batch(batch: Batch) -> Tensor:
    """Return the thresholds of all segments of ``batch``, float32 [segments], or [tensors] where it is layer-wise.

    A launch for each power of two that segments are padded to. What no program can hold, segments above LONGEST and
    whole tensors, torch sorts.
    """
    if batch.entries[0].format.layer_wise:
        alone = [optimal_thresholds_reference(entry.weight, entry.format) for entry in batch.entries]
        return torch.cat(alone).flatten()
    found = batch.flat(torch.float32)
    by_length: dict[int, list[list[int]]] = {}
    for number, entry in enumerate(batch.entries):
        if entry.format.group_size > LONGEST:
            entry.segmented(found).copy_(optimal_thresholds_reference(entry.weight, entry.format))
            continue
        for row, _ in entry.items(mixed=False):
            by_length.setdefault(power_of_two_above(row[2]), []).append([*row, number, 0])
    for length, rows in by_length.items():
        _launch(batch, optimum_shape(max(row[3] for row in rows), length), rows, found)
    return found


def _launch(batch: Batch, shape: LaunchShape, rows: list[list[int]], found: Tensor) -> None:
    """Write the thresholds of the segments of the items ``rows``."""
    table, programs = sent_to(batch.device, rows, [shape.rows] * len(rows))
    with on_device(table):
        optimum_kernel[(len(programs) // 2,)](
            table,
            programs,
            found,
            FINENESS=batch.fineness,
            DTYPE=batch.dtype,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=warps_for(shape.num_warps),
            enable_fp_fusion=False,
        )


def optimal_thresholds_reference(weight: Tensor, format: CodeFormat) -> Tensor:
    """Return what |w| must be above to be kept, float32 [rows, groups], or [1, 1] where ``format`` is layer-wise.

    Of every segment of ``weight`` [rows, length] the k largest magnitudes are kept that maximise (Σ|w|)² / k: with
    their mean as the scale no other ternary codes have less squared error. Sums are exact and the objective is rounded
    to float64; of equal ones the least k counts. So every device finds the same k. Sorting is torch's, on the weight's
    device; a layer-wise optimum sorts the whole tensor. Where a segment holds NaN or Inf its threshold means nothing.
    """
    bits = fineness(weight.numel() if format.layer_wise else format.group_size)
    if format.layer_wise:
        return _thresholds(weight.reshape(1, -1), bits)[:, None]
    found = torch.empty((len(weight), format.groups), device=weight.device)
    for chunk in row_chunks(len(weight), format.length):
        for part in row_parts(format.length, format.group_size):
            there = found[chunk, part.groups]
            there.copy_(_thresholds(weight[chunk, part.columns].reshape(-1, part.length), bits).view(there.shape))
    return found


def _thresholds(segments: Tensor, bits: int) -> Tensor:
    """Return the largest magnitude that is not kept, float32 [segments]; 0 where all but zeros are."""
    magnitude = segments.abs().float().sort(1, descending=True).values
    unit = power_of_two(bits - exponents(magnitude[:, 0].nan_to_num(0.0, 0.0)))
    total = (magnitude.double() * unit[:, None]).round_().to(torch.int64).cumsum(1)
    count = torch.arange(1, segments.shape[1] + 1, device=segments.device)
    # equal magnitudes are kept or dropped together: along them the objective is convex in k
    kept = (total.double().square() / count).argmax(1)  # the first of the largest
    after = torch.cat([magnitude, magnitude.new_zeros(len(magnitude), 1)], 1)
    return after.gather(1, kept[:, None] + 1)[:, 0]
