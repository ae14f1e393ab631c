"""From a layer's weight to its codes by the steps of a plan: the target, the scales, the rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dfmpc.kernels.formats import Grid, Quantized
from dfmpc.kernels.packing import unpack
from dfmpc.kernels.ternary import ternary
from torch import Tensor

from ..job.recipes import Steps
from ..models.graph import Op
from .assign import Assignment
from .calibrate import InputMoments
from .encode import encode
from .factorise import factorise
from .feedback import FROM_A_MODEL, MAX_FEEDBACK, FeedbackOptions, error_feedback, ternary_feedback, uniform_feedback
from .least_squares import resolve
from .quantize import quantize_layer, rows_on
from .scale_search import Rounded, clip_search, nearest_levels, ternary_optimum


@dataclass(frozen=True)
class RoundedLayer:
    """The codes of a layer and what could not be done as planned."""

    quantized: Quantized
    note: str = ""


def round_layer(
    weight: Tensor,
    assignment: Assignment,
    steps: Steps,
    moments: Callable[[], InputMoments | None],
    device: str,
) -> RoundedLayer:
    """Return the codes of ``weight`` (stored shape, any floating type) under ``assignment``.

    ``moments`` is asked only where ``steps`` round or re-solve with them; where it has none, the layer is rounded to
    nearest, and the note says so. Raises NonFiniteError where the weight holds NaN or Inf.
    """
    if is_plain(assignment, steps):
        return RoundedLayer(quantize_layer(weight, assignment, device))
    if not steps.needs_moments:
        rows = rows_on(weight, assignment.layer, device)
        return RoundedLayer(_encoded(rows, _to_nearest(rows.float(), assignment, steps)))
    found = None if assignment.layer.length > MAX_FEEDBACK else moments()
    rows = rows_on(weight, assignment.layer, device)
    target, note = _target(rows.float(), assignment, steps, found)
    if found is None or steps.rounding == "nearest":
        return RoundedLayer(_encoded(rows, _to_nearest(target, assignment, steps)), note)
    rounded = _with_feedback(target, found, assignment, steps)
    return RoundedLayer(_encoded(rows, rounded), "; ".join(text for text in (note, rounded.fallback) if text))


def is_plain(assignment: Assignment, steps: Steps) -> bool:
    """Tell whether the fused kernel does all of it: the codes then follow from the weight alone."""
    if steps.needs_moments:
        return False
    return steps.ternary == "twn" if assignment.grid is Grid.TERNARY else steps.clip == "absmax"


def _target(rows: Tensor, assignment: Assignment, steps: Steps, moments: InputMoments | None) -> tuple[Tensor, str]:
    if moments is None:
        too_long = assignment.layer.length > MAX_FEEDBACK
        because = f"rows longer than {MAX_FEEDBACK}" if too_long else "no second moments of its input"
        return rows, f"{because}: rounded to nearest"
    if steps.compensate != "least-squares" or not _is_resolved(assignment):
        return rows, ""
    if moments.cross is None:
        return rows, "no least squares: the output that is wanted is not known, or at one position an image"
    solved = resolve(rows, assignment.layer, moments)
    return (rows, "least squares failed") if solved is None else (solved, "")


def _is_resolved(assignment: Assignment) -> bool:
    """Whether least squares re-solves the layer: not where a map has one position an image, or a row few weights."""
    return assignment.layer.op is Op.CONV and not assignment.layer.depthwise


def _to_nearest(rows: Tensor, assignment: Assignment, steps: Steps) -> Rounded:
    group, whole = assignment.group_size, assignment.layer_wise
    if assignment.grid is Grid.TERNARY:
        exact = steps.ternary == "exact"
        return ternary_optimum(rows, group_size=group, layer_wise=whole) if exact else _twn(rows, assignment)
    lowest = None if steps.clip == "mse" else 1.0
    found = clip_search(rows, assignment.bits, assignment.grid, group_size=group, layer_wise=whole, lowest=lowest)
    format = assignment.format
    return Rounded(format, nearest_levels(rows, format, found), found.scale, found.zero_point)


def _twn(rows: Tensor, assignment: Assignment) -> Rounded:
    """TWN's 0.7 rule (arXiv 1605.04711)."""
    found = ternary(rows, group_size=assignment.group_size, layer_wise=assignment.layer_wise)
    return Rounded(found.format, unpack(found.codes, 2, found.format.length), found.scale)


def _with_feedback(rows: Tensor, moments: InputMoments, assignment: Assignment, steps: Steps) -> Rounded:
    group, whole = assignment.group_size, assignment.layer_wise
    second = moments.second.to(rows.device)
    options = FeedbackOptions() if steps.tier == "synthetic" else FROM_A_MODEL
    if assignment.grid is Grid.TERNARY and steps.ternary == "twn":
        factor = factorise(second, options.damp, options.order)
        return error_feedback(rows, _twn(rows, assignment), factor, sweeps=2, refit=True)
    if assignment.grid is Grid.TERNARY:
        return ternary_feedback(rows, second, options, group_size=group, layer_wise=whole)
    options = replace(options, clip_search=steps.clip == "mse")
    return uniform_feedback(
        rows, second, assignment.bits, options, grid=assignment.grid, group_size=group, layer_wise=whole
    )


def _encoded(rows: Tensor, rounded: Rounded) -> Quantized:
    return encode(rows, rounded.levels, rounded.format, rounded.scale, rounded.zero_point)
