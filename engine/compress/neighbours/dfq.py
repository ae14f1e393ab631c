"""DFQ: equalise, absorb, round to nearest, correct."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from dfmpc.kernels.dequantize import dequantize
from dfmpc.kernels.formats import Quantized
from dfmpc.kernels.tap_sums import tap_sums
from dfmpc.kernels.uniform import uniform
from torch import Tensor

from ...job.neighbours import DfqPlan
from ...models.graph import Layer
from ...models.load import LoadedModel
from ..assign import Assignment
from ..rows import to_rows
from ..taps import Taps
from .correct import correct_biases
from .equalise import Balance, absorb_biases, store
from .links import Links, find_links
from .overlay import Overlay, own_norms, single_uses


@dataclass
class DfqResult:
    """What DFQ leaves of one network."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By layer, the balanced weight that was rounded, float32 [out, length] on the CPU."""
    quantized: dict[str, Quantized] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Norm tensors and biases that changed, float32."""
    norm_shift: dict[str, float] = field(default_factory=dict)
    """Root mean square of a layer's correction in standard deviations of its own norm."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why a layer was not equalised with the next one."""


def dfq(model: LoadedModel, plan: DfqPlan, assignments: Mapping[str, Assignment], device: str) -> DfqResult:
    """Data-free quantization through equalisation and bias correction (Nagel et al., arXiv 1906.04721, section 4).

    Ranges of adjacent layers are balanced on the view with the norms folded in (``equalise.Balance``), high biases
    move into the next layer (``absorb_biases``), weights are rounded to nearest, and what that does to expected
    outputs is taken out of running means and biases (``correct_biases``). The paper also replaces ReLU6 by ReLU; here
    a network's operators stay, so layers before a ReLU6 are not equalised, and the result says so. ``assignments`` are
    those of all layers; kept ones stay as they are.
    """
    tensors = Overlay(model.state)
    links = balanced(model, plan, assignments, tensors)
    result = DfqResult(reasons=links.reasons if plan.equalise else {})
    for name, assignment in assignments.items():
        if not assignment.keep:
            started = time.perf_counter()
            result.weights[name] = to_rows(tensors[assignment.layer.weight].float(), assignment.layer)
            result.quantized[name] = _round(result.weights[name], assignment, device)
            result.seconds[name] = time.perf_counter() - started
    if plan.correct:
        _correct(model, tensors, result)
    weights = {assignments[name].layer.weight for name in result.quantized}
    for name, value in tensors.changed.items():
        if name not in weights and not torch.equal(value, model.state[name].double()):
            result.tensors[name] = value.float()
    return result


def balanced(model: LoadedModel, plan: DfqPlan, assignments: Mapping[str, Assignment], tensors: Overlay) -> Links:
    """Equalise and absorb as ``plan`` says, writing into ``tensors``; return the links."""
    graph, kept = model.graph, [name for name, assignment in assignments.items() if assignment.keep]
    norms = {name: node for name, node in own_norms(graph).items() if name not in kept}
    links = find_links(graph, norms, kept)
    nodes = {name: node for name, node in single_uses(graph).items() if name not in kept}
    if plan.equalise:
        balance = Balance([node.layer for node in nodes.values() if node.layer], norms, tensors)
        balance.settle(links.found)
        store(balance, norms, tensors)
    if plan.absorb:
        absorb_biases(graph, links.found, nodes, tensors)
    return links


def _round(rows: Tensor, assignment: Assignment, device: str) -> Quantized:
    return uniform(
        rows.to(device),
        assignment.bits,
        assignment.grid,
        group_size=assignment.group_size,
        layer_wise=assignment.layer_wise,
    )


def _correct(model: LoadedModel, tensors: Overlay, result: DfqResult) -> None:
    def taps(layer: Layer) -> tuple[Taps, Taps] | None:
        if layer.name not in result.quantized:
            return None
        done = result.quantized[layer.name]
        values = dequantize(done.format, done.codes, done.scale, done.zero_point)
        return _taps(result.weights[layer.name], layer), _taps(values, layer)

    norms = own_norms(model.graph)
    for name, shift in correct_biases(model.graph, tensors, taps).items():
        norm = norms[name].norm if name in norms else None
        if norm is not None:
            result.norm_shift[name] = float((shift / tensors.sigma(norm)).square().mean().sqrt())


def _taps(rows: Tensor, layer: Layer) -> Taps:
    found = tap_sums(rows, layer.taps)
    return Taps.of(layer, found.sums.cpu(), found.squares.cpu())
