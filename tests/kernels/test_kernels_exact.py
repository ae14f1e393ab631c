"""References against the same rules written number by number, with fractions for the sums: every bit must agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from dfmpc.kernels import Grid, Quantized
from dfmpc.kernels import blocks as blocks_module
from dfmpc.kernels.sums import fineness
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
KINDS = ("normal", "denormal", "tiny", "largest", "wide", "zero rows", "signed zeros", "one value", "ties", "one large")


def hostile(kind: str, rows: int, length: int) -> Tensor:
    """Return float32 [rows, length]."""
    g = torch.Generator().manual_seed(rows * length)
    w = 0.05 * torch.randn(rows, length, generator=g)
    steps = torch.randint(-300, 301, (rows, length), generator=g)
    match kind:
        case "denormal":
            return (steps * 2.0**-149).float()
        case "tiny":
            return (steps.sign() * 2.0**-149).float()
        case "largest":
            return steps.sign() * LARGEST
        case "wide":
            return (w.sign().double() * 2.0 ** (steps * 0.4 + 3)).float()
        case "zero rows":
            w[::2] = 0
        case "signed zeros":
            w = torch.copysign(torch.zeros(()), w)
            w[0, 0] = -1e-3
        case "one value":
            w[:] = w[:, :1].clone()
        case "ties":
            w = (steps / 4).clamp(-31.5, 31.5)
        case "one large":
            w *= 1e-4
            w[:, length // 2] = 3.0
    return w


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def exponent(absmax: float) -> int:
    """Return the least e >= -125 with absmax < 2^e, 129 where there is none."""
    e = -125
    while e < 129 and absmax >= 2.0**e:
        e += 1
    return e


def tree(numbers: list[float]) -> float:
    """Add halves of a power of two."""
    size = 1 << (len(numbers) - 1).bit_length()
    numbers = numbers + [0.0] * (size - len(numbers))
    while size > 1:
        size //= 2
        numbers = [a + b for a, b in zip(numbers[:size], numbers[size:], strict=True)]
    return numbers[0]


def total(terms: list[Fraction], unit: int) -> int:
    """Return the sum of terms, each rounded half to even to a multiple of 2^unit, in such multiples."""
    return sum(round(term / Fraction(2) ** unit) for term in terms)


def stream(codes: list[int], bits: int) -> list[int]:
    word = sum(code << (bits * place) for place, code in enumerate(codes))
    return list(word.to_bytes((len(codes) * bits + 7) // 8, "little"))


@dataclass
class Row:
    """What is expected of a row, a number a segment in each list."""

    codes: list[int] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    zero_point: list[float] = field(default_factory=list)
    dot: list[float] = field(default_factory=list)
    quantized_norm: list[float] = field(default_factory=list)
    original_norm: list[float] = field(default_factory=list)
    zeros: int = 0


def scales(extremes: tuple[float, float, float], grid: Grid, bits: int, clip: float) -> tuple[float, float, float]:
    """Return scale, zero point and multiplier."""
    absmax, low, high = (float32(x * float32(clip)) for x in extremes)
    low, high = extremes[1:] if extremes[1] == extremes[2] else (low, high)
    if grid is Grid.DOREFA:
        return absmax, 0.0, (2**bits - 1) / (2 * absmax) if absmax else 0.0
    if grid is Grid.SYMMETRIC:
        scale = float32(absmax / (2 ** (bits - 1) - 1))
        return scale, 0.0, 1 / scale if scale else 0.0
    if low == high:
        return 1.0, 0.0 - low, 0.0
    scale = float32(max((high - low) / (2**bits - 1), 2.0**-149))
    return scale, float32((0.0 - low) / scale), 1 / scale


def add_segment(
    row: Row, w: list[float], shared: tuple[float, float, float] | None, grid: Grid, bits: int, clip: float, fine: int
) -> None:
    """Append what a segment of a uniform grid becomes."""
    absmax = max(map(abs, w))
    scale, zero_point, inverse = shared or scales((absmax, min(w), max(w)), grid, bits, clip)
    e, levels, limit = exponent(absmax), 2**bits - 1, 2 ** (bits - 1) - 1
    offset = {Grid.DOREFA: levels / 2, Grid.SYMMETRIC: 0.0, Grid.ASYMMETRIC: zero_point if inverse else 0.0}[grid]
    rounded = [round(x * inverse + offset) for x in w]
    if grid is Grid.SYMMETRIC:
        found = [min(max(q, -limit), limit) + limit + 1 for q in rounded]
        values: list[float] = [u - limit - 1 for u in found]
        reach, step = bits - 1, scale
    else:
        found = [min(max(u, 0), levels) for u in rounded]
        values = [2 * u - levels for u in found]
        reach, step = bits, scale / levels
    if grid is Grid.ASYMMETRIC:
        values = [float32(float32(u - zero_point) * scale) for u in found]
        reach, step = exponent(float32(absmax + (scale if inverse else 0.0))), 1.0
    exact, weights = [Fraction(v) for v in values], [Fraction(x) for x in w]
    unit = e + reach - fine
    norm_unit = 2 * reach - fine if grid is Grid.ASYMMETRIC else 0
    row.codes += found
    row.scale.append(scale)
    row.zero_point.append(zero_point)
    row.dot.append(float(total([v * x for v, x in zip(exact, weights, strict=True)], unit)) * (step * 2.0**unit))
    row.quantized_norm.append(float(total([v * v for v in exact], norm_unit)) * (step * step * 2.0**norm_unit))
    row.original_norm.append(float(total([x * x for x in weights], 2 * e - fine)) * 2.0 ** (2 * e - fine))
    row.zeros += sum(float32(v * scale / levels if grid is Grid.DOREFA else v) == 0 for v in values)


def assert_same(q: Quantized, rows: list[Row], *, layer_wise: bool = False) -> None:
    """Compare the bits of everything."""
    assert q.codes.tolist() == [stream(row.codes, q.format.bits) for row in rows]
    stored = rows[:1] if layer_wise else rows
    for name in ("scale", "zero_point"):
        if (found := getattr(q, name)) is not None:
            expected = torch.tensor([getattr(row, name) for row in stored], dtype=torch.float32)
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), name
    for name in ("dot", "quantized_norm", "original_norm"):
        expected = torch.tensor([tree(getattr(row, name)) for row in rows], dtype=torch.float64)
        assert torch.equal(getattr(q, name), expected), name  # the sign of a zero is the sum's
    assert q.zeros.tolist() == [row.zeros for row in rows]


def uniform_rows(
    weight: Tensor, bits: int, grid: Grid, group_size: int, *, layer_wise: bool = False, clip: float = 1.0
) -> list[Row]:
    numbers, rows = weight.double().tolist(), []
    every = [x for w in numbers for x in w]
    extremes = max(map(abs, every)), min(every), max(every)
    for w in numbers:
        rows.append(Row())
        for first in range(0, len(w), group_size):
            shared = scales(extremes, grid, bits, clip) if layer_wise else None
            add_segment(rows[-1], w[first : first + group_size], shared, grid, bits, clip, fineness(group_size))
    return rows


@pytest.mark.parametrize("grid", [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "group_size"), [(1, 1), (9, 9), (31, 31), (97, 97), (203, 64), (53, 8)])
def test_uniform_codes_and_sums_are_exact(kind: str, length: int, group_size: int, grid: Grid) -> None:
    weight = hostile(kind, 3, length)
    for number, clip in enumerate((1.0, 0.7)):
        if grid is Grid.ASYMMETRIC and kind == "largest" and clip == 1:
            continue  # (u - zero_point) * scale leaves float32
        bits = 2 + (length + len(kind) + 3 * number) % 7
        q = uniform_reference(weight, bits, grid, group_size=group_size, clip=clip)
        assert_same(q, uniform_rows(weight, bits, grid, group_size, clip=clip))


@pytest.mark.parametrize("length", [9, 97])
def test_a_grid_whose_values_may_lie_beyond_float32_is_exact(length: int) -> None:
    weight = 3.4e38 * hostile("normal", 3, length).sign()  # a step more is beyond float32, but no value is
    q = uniform_reference(weight, 8, Grid.ASYMMETRIC, group_size=length)
    assert bool(torch.isfinite(q.quantized_norm).all())
    assert_same(q, uniform_rows(weight, 8, Grid.ASYMMETRIC, length))


@pytest.mark.parametrize("grid", [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC])
@pytest.mark.parametrize("kind", ["normal", "denormal", "tiny", "wide", "zero rows", "one large"])
def test_a_scale_of_the_whole_tensor_is_exact(kind: str, grid: Grid) -> None:
    weight = hostile(kind, 4, 37)
    for bits, clip in ((2, 1.0), (5, 0.3), (8, 1.0)):
        q = uniform_reference(weight, bits, grid, group_size=37, layer_wise=True, clip=clip)
        rows = uniform_rows(weight, bits, grid, 37, layer_wise=True, clip=clip)
        assert_same(q, rows, layer_wise=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exact(dtype: torch.dtype) -> None:
    weight = hostile("normal", 3, 101).to(dtype)
    assert_same(uniform_reference(weight, 6, Grid.DOREFA, group_size=40), uniform_rows(weight, 6, Grid.DOREFA, 40))
    assert_same(ternary_reference(weight, group_size=40), ternary_rows(weight, 40))


def test_rows_longer_than_a_run_are_exact() -> None:
    weight = hostile("normal", 2, 8209)
    for grid in (Grid.DOREFA, Grid.SYMMETRIC):
        assert_same(uniform_reference(weight, 8, grid, group_size=8209), uniform_rows(weight, 8, grid, 8209))
    assert_same(ternary_reference(weight, group_size=8209), ternary_rows(weight, 8209))


def ternary_rows(weight: Tensor, group_size: int) -> list[Row]:
    fine, rows = fineness(group_size), []
    for w in weight.double().tolist():
        row = Row()
        rows.append(row)
        for first in range(0, len(w), group_size):
            segment = w[first : first + group_size]
            e, weights = exponent(max(map(abs, segment))), [Fraction(x) for x in segment]
            unit = 2.0 ** (e - fine)
            threshold = float32(0.7 * (total([abs(x) for x in weights], e - fine) * unit / len(segment)))
            signs = [(x > threshold) - (x < -threshold) for x in segment]
            kept, count = total([t * x for t, x in zip(signs, weights, strict=True)], e - fine), sum(map(abs, signs))
            scale = float32(kept * unit / count) if count else 0.0
            row.codes += [t + 1 for t in signs]
            row.scale.append(scale)
            row.dot.append(float(kept) * (scale * unit))
            row.quantized_norm.append(float(count) * (scale * scale))
            row.original_norm.append(float(total([x * x for x in weights], 2 * e - fine)) * 2.0 ** (2 * e - fine))
            row.zeros += len(segment) - count
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "group_size"), [(1, 1), (9, 9), (97, 97), (203, 64), (53, 8)])
def test_ternary_codes_and_sums_are_exact(kind: str, length: int, group_size: int) -> None:
    weight = hostile(kind, 3, length)
    assert_same(ternary_reference(weight, group_size=group_size), ternary_rows(weight, group_size))


@pytest.mark.parametrize("length", [9, 64, 201])
def test_blocks_of_any_size_give_the_same(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = hostile("normal", 23, length)

    def found() -> list[Quantized]:
        uniform = [uniform_reference(weight, 5, grid, group_size=64) for grid in Grid if grid is not Grid.TERNARY]
        return [*uniform, ternary_reference(weight, group_size=64)]

    whole = found()
    monkeypatch.setattr(blocks_module, "BLOCK", 2 * length + 1)
    for one, other in zip(found(), whole, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.dot, other.dot)
        assert torch.equal(one.zeros, other.zeros)


def test_a_segment_above_four_million_is_rounded_more_coarsely() -> None:
    weight = hostile("normal", 1, (1 << 22) + 3)
    q = uniform_reference(weight, 8, Grid.SYMMETRIC, group_size=weight.shape[1])
    unit = 2.0 ** (2 * exponent(float(weight.abs().max())) - 39)
    squares = (weight.double().square() / unit).round().to(torch.int64).sum(1)
    assert torch.equal(q.original_norm, squares.double() * unit)
