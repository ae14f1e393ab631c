"""One model under one of the other methods: widths by role, then the method, then what reports want."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from dfmpc.kernels.formats import Quantized
from dfmpc.kernels.grids import grid_steps
from torch import Tensor

from ...errors import NonFiniteError, UnsupportedModelError
from ...job.neighbours import DfqPlan, NeighbourPlan
from ...job.schema import LayerRule
from ...models.graph import Pairing
from ...models.load import LoadedModel
from ...models.pairs import find_pairs
from ..assign import Assignment, assign
from ..result import Compressed, QuantizedLayer
from ..rows import to_rows
from ..scale_search import spread
from ..work import partners
from . import quantize_rows
from .dfq import dfq

_SLACK = 1e-3
"""Steps by which rounding to float32 may put the grid's ends off."""


def compress_neighbour(
    model: LoadedModel, plan: NeighbourPlan, rules: Sequence[LayerRule] = (), device: str = "cpu"
) -> Compressed:
    """Quantize every weight layer of ``model`` by ``plan``'s method; ``device`` is where codes are chosen.

    Under ``low`` and ``high`` the LOW layers of dfmpc's pairs get ``low`` bits and every other layer ``high``; under
    ``bits`` all get the same and no layer has a role.

    Raises:
        UnsupportedModelError: the network has no weight layer, or no pair to give two widths to.
        NonFiniteError: a weight or a BatchNorm tensor is NaN or Inf.
    """
    pairing = find_pairs(model.graph) if plan.paired else Pairing(())
    _check(model, plan, pairing)
    assignments = assign(model.graph.layers, plan, rules, pairing)
    kept = {name: "kept by a layer rule" for name, assignment in assignments.items() if assignment.keep}
    if isinstance(plan, DfqPlan):
        return _by_dfq(model, plan, assignments, pairing, kept, device)
    layers = tuple(
        _by_rows(model, plan, assignment, pairing, device) for assignment in assignments.values() if not assignment.keep
    )
    return Compressed(layers, {}, kept)


def _check(model: LoadedModel, plan: NeighbourPlan, pairing: Pairing) -> None:
    name = model.source.name
    if not model.graph.layers:
        raise UnsupportedModelError(f"{name}: no convolution or linear layer found, so there is nothing to compress")
    if plan.paired and not pairing.pairs:
        raise UnsupportedModelError(
            f"{name}: no pair of layers found, so low: {plan.low} has no layer; use bits in place of low and high"
        )
    names = [layer.weight for layer in model.graph.layers]
    names += [tensor for node in model.graph.nodes if node.norm for tensor in node.norm.tensors]
    for tensor in names:
        if not bool(torch.isfinite(model.state[tensor]).all()):
            raise NonFiniteError(f"{name}: {tensor} holds NaN or Inf; repair or retrain the checkpoint")


def _by_rows(
    model: LoadedModel, plan: NeighbourPlan, assignment: Assignment, pairing: Pairing, device: str
) -> QuantizedLayer:
    started, layer = time.perf_counter(), assignment.layer
    rows = to_rows(model.state[layer.weight].to(device), layer).float()
    quantized = quantize_rows(rows, assignment.format, plan, layer.taps)
    return _layer(assignment, quantized, rows, pairing, assignment.reason, time.perf_counter() - started)


def _by_dfq(
    model: LoadedModel,
    plan: DfqPlan,
    assignments: Mapping[str, Assignment],
    pairing: Pairing,
    kept: dict[str, str],
    device: str,
) -> Compressed:
    done = dfq(model, plan, assignments, device)
    layers = tuple(
        _layer(
            assignments[name],
            quantized,
            done.weights[name].to(device),
            pairing,
            done.reasons.get(name, ""),
            done.seconds[name],
            done.norm_shift.get(name),
        )
        for name, quantized in done.quantized.items()
    )
    return Compressed(layers, done.tensors, kept)


def _layer(
    assignment: Assignment,
    quantized: Quantized,
    rows: Tensor,
    pairing: Pairing,
    reason: str,
    seconds: float,
    norm_shift: float | None = None,
) -> QuantizedLayer:
    return QuantizedLayer(
        layer=assignment.layer,
        role=assignment.role,
        granularity=assignment.granularity,
        quantized=quantized,
        partners=partners(assignment.layer, pairing.pairs),
        reason=reason,
        norm_shift=norm_shift,
        clipped_fraction=clipped_fraction(rows, quantized),
        seconds=seconds,
    )


def clipped_fraction(rows: Tensor, quantized: Quantized) -> float:
    """Return the fraction of ``rows`` ([rows, length]), 0-1, beyond the ends of their own grid."""
    if not rows.numel():
        return 0.0
    form = quantized.format
    steps = grid_steps(form.grid, form.bits, quantized.scale, quantized.zero_point)
    low = (steps.low - steps.offset - _SLACK) * steps.step
    high = (steps.high - steps.offset + _SLACK) * steps.step
    beyond = (rows < spread(low, form, len(rows))) | (rows > spread(high, form, len(rows)))
    return int(beyond.sum()) / rows.numel()
