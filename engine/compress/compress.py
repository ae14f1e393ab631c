"""One model under one bit-plan: the recipe that ties quantizers, calibrator and compensation together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from dfmpc.kernels.formats import Quantized
from torch import Tensor

from ..errors import NonFiniteError, UnsupportedModelError
from ..job.calibrators import NoCalibrator
from ..job.methods import DfmpcPlan, RtnPlan
from ..job.schema import LayerRule
from ..models.graph import Layer, Pair, Pairing
from ..models.load import LoadedModel
from ..models.pairs import find_pairs
from .assign import Assignment, assign
from .calibrate import make_calibrator
from .compensate import summarise
from .quantize import clipped_fraction, original_taps, quantize_layer, quantized_taps
from .result import Compressed, QuantizedLayer
from .rows import to_rows
from .taps import Taps
from .walk import Lambdas, LayerFigures, Walk, WalkResult


@dataclass(frozen=True)
class PlanDescription:
    """How reports name a bit-plan."""

    method: str
    recipe: str
    tier: str
    """none (no statistics are re-estimated) or closed-form (they are, without images of any kind)."""
    calibrator: str


def describe_plan(plan: DfmpcPlan | RtnPlan) -> PlanDescription:
    """Return method, resolved recipe, tier and calibrator of ``plan``."""
    if isinstance(plan, RtnPlan):
        return PlanDescription("rtn", "", "none", "none")
    tier = "none" if isinstance(plan.calibrator, NoCalibrator) else "closed-form"
    return PlanDescription("dfmpc", "published", tier, plan.calibrator.name)


def compress_model(
    model: LoadedModel, plan: DfmpcPlan | RtnPlan, rules: Sequence[LayerRule] = (), device: str = "cpu"
) -> Compressed:
    """Quantize every weight layer of ``model`` under ``plan`` and repair what the plan's method repairs.

    ``device`` is where the kernels run; everything of a channel's size is computed on the CPU in float64, with one
    thread: the operations are too small to share, and a factorisation's last bits would depend on the number.

    Raises:
        UnsupportedModelError: the network has no weight layer, or the method is dfmpc and it has no pair.
        NonFiniteError: a weight or a BatchNorm statistic is NaN or Inf.

    """
    with _one_thread():
        return _compress(model, plan, rules, device)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compress(model: LoadedModel, plan: DfmpcPlan | RtnPlan, rules: Sequence[LayerRule], device: str) -> Compressed:
    pairing = Pairing(()) if isinstance(plan, RtnPlan) else find_pairs(model.graph)
    _check(model, plan, pairing)
    assignments = assign(model.graph.layers, plan, rules, pairing)
    work = {
        name: _LayerWork(model, assignment, device) for name, assignment in assignments.items() if not assignment.keep
    }
    kept = {name: "kept by a layer rule" for name, assignment in assignments.items() if assignment.keep}
    if isinstance(plan, RtnPlan):
        return Compressed(tuple(item.finish(pairing, None) for item in work.values()), {}, kept)
    pairs = [pair for pair in pairing.pairs if pair.low in work and pair.high in work]
    walked = _walk(model, plan, pairs, work, device)
    tensors = {name: value.float() for name, value in walked.tensors.items()}
    return Compressed(tuple(item.finish(pairing, walked) for item in work.values()), tensors, kept)


def _check(model: LoadedModel, plan: DfmpcPlan | RtnPlan, pairing: Pairing) -> None:
    name = model.source.name
    if not model.graph.layers:
        raise UnsupportedModelError(f"{name}: no convolution or linear layer found, so there is nothing to compress")
    if isinstance(plan, DfmpcPlan) and not pairing.pairs:
        normless = all(node.norm is None for node in model.graph.nodes)
        cause = "it has no BatchNorm" if normless else "no LOW layer is followed by norm, activation and HIGH layer"
        raise UnsupportedModelError(
            f"{name}: method dfmpc finds no pair of layers: {cause}; use a plan with method: rtn for this model"
        )
    for node in model.graph.nodes:
        for tensor in (node.norm.running_mean, node.norm.running_var) if node.norm else ():
            if not bool(torch.isfinite(model.state[tensor]).all()):
                raise NonFiniteError(f"{name}: {tensor} holds NaN or Inf; repair or retrain the checkpoint")


class _LayerWork:
    """One layer on its way: its codes, and its tap sums once somebody asks."""

    def __init__(self, model: LoadedModel, assignment: Assignment, device: str) -> None:
        started = time.perf_counter()
        self.assignment, self.device = assignment, device
        self.weight = model.state[assignment.layer.weight]
        try:
            self.quantized = quantize_layer(self.weight, assignment, device)
        except NonFiniteError as error:
            raise NonFiniteError(f"{model.source.name}: {assignment.layer.weight}: {error}") from error
        self.clipped = clipped_fraction(self.weight, assignment.layer, self.quantized, device)
        self.seconds = time.perf_counter() - started

    def taps(self) -> tuple[Taps, Taps]:
        """Return original and quantized tap sums."""
        started = time.perf_counter()
        layer = self.assignment.layer
        found = original_taps(self.weight, layer, self.device), quantized_taps(self.quantized, layer)
        self.seconds += time.perf_counter() - started
        return found

    def finish(self, pairing: Pairing, walked: WalkResult | None) -> QuantizedLayer:
        """Return the layer as the artifact and the report want it."""
        layer = self.assignment.layer
        result = QuantizedLayer(
            layer=layer,
            role=self.assignment.role,
            granularity=self.assignment.granularity,
            quantized=self.quantized,
            partners=_partners(layer, pairing.pairs),
            reason=self.assignment.reason,
            clipped_fraction=self.clipped,
            seconds=self.seconds,
        )
        return result if walked is None else _with_walk(result, pairing, walked)


def _partners(layer: Layer, pairs: Sequence[Pair]) -> tuple[str, ...]:
    found = [pair.high for pair in pairs if pair.low == layer.name]
    return tuple(dict.fromkeys(found or [pair.low for pair in pairs if pair.high == layer.name]))


def _with_walk(result: QuantizedLayer, pairing: Pairing, walked: WalkResult) -> QuantizedLayer:
    name = result.layer.name
    scale = walked.input_scale.get(name)
    solutions = walked.solutions.get(name)
    folded = walked.folded.get(name)
    unfolded = next((p.unfolded_because for p in pairing.pairs if p.low == name and p.unfolded_because), "")
    return replace(
        result,
        input_scale=None if scale is None else scale.float(),
        coefficients=summarise(solutions) if solutions else None,
        folded=all(folded) if folded else None,
        reason=result.reason or (unfolded if folded and not all(folded) else ""),
        norm_shift=walked.norm_shift.get(name),
    )


def _walk(
    model: LoadedModel, plan: DfmpcPlan, pairs: Sequence[Pair], work: Mapping[str, _LayerWork], device: str
) -> WalkResult:
    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    figures = {layer.name: _figures(model, layer, work.get(layer.name), device) for layer in model.graph.layers}
    lambdas = Lambdas(plan.lambda1, plan.lambda2) if plan.compensate else None
    return Walk(model.graph, pairs, figures, tensor, make_calibrator(plan.calibrator), lambdas).run()


def _figures(model: LoadedModel, layer: Layer, work: _LayerWork | None, device: str) -> LayerFigures:
    bias = model.state[layer.bias].double() if layer.bias else torch.zeros(layer.out_channels, dtype=torch.float64)
    if work is not None:
        quantized: Quantized = work.quantized
        return LayerFigures(layer, bias, quantized.dot, quantized.quantized_norm, quantized.original_norm, work.taps)
    weight = model.state[layer.weight]
    norms = to_rows(weight, layer).double().square().sum(1)

    def unchanged() -> tuple[Taps, Taps]:
        taps = original_taps(weight, layer, device)
        return taps, taps

    return LayerFigures(layer, bias, norms, norms, norms, unchanged)
