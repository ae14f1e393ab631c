"""One model under one bit-plan: the recipe that ties quantizers, calibrator and compensation together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError, UnsupportedModelError
from ..job.methods import BitPlan, DfmpcPlan, RtnPlan
from ..job.neighbours import NeighbourPlan
from ..job.recipes import Steps, steps_of
from ..job.schema import LayerRule
from ..models.graph import Layer, Pair, Pairing
from ..models.load import LoadedModel
from ..models.pairs import find_pairs
from .assign import Assignment, assign
from .budget.choose import choose_bits
from .calibrate import InputMoments
from .fold_scales import fold_scales
from .make_calibrator import make_calibrator, sums_taps
from .neighbours.run import compress_neighbour
from .quantize import quantize_layer
from .result import Compressed
from .rounding import RoundedLayer, is_plain, round_layer
from .walk import Lambdas, LayerFigures, Walk, WalkResult
from .work import LayerWork, Moments, kept_figures, partners, round_together


def compress_model(
    model: LoadedModel,
    plan: BitPlan,
    rules: Sequence[LayerRule] = (),
    device: str = "cpu",
    threads: int = 1,
) -> Compressed:
    """Quantize every weight layer of ``model`` under ``plan`` and repair what the plan's method repairs.

    ``device`` is where the kernels, the forward passes and the factorisations run. ``threads`` is how many of the CPU
    those take where the recipe has any; everything of a channel's size is computed on the CPU in float64 with one
    thread: such operations are too small to share.

    Raises:
        UnsupportedModelError: the network has no weight layer, or the method is dfmpc and it has no pair.
        NonFiniteError: a weight or a BatchNorm statistic is NaN or Inf.

    """
    heavy = isinstance(plan, DfmpcPlan) and steps_of(plan).factorises
    with _threads(threads if heavy else 1), torch.inference_mode():
        if isinstance(plan, NeighbourPlan):
            return compress_neighbour(model, plan, rules, device)
        return _compress(model, plan, rules, device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compress(model: LoadedModel, plan: DfmpcPlan | RtnPlan, rules: Sequence[LayerRule], device: str) -> Compressed:
    pairing = Pairing(()) if isinstance(plan, RtnPlan) else find_pairs(model.graph)
    _check(model, plan, pairing)
    assignments = assign(model.graph.layers, plan, rules, pairing, _chosen_bits(model, plan, rules))
    kept = {name: "kept by a layer rule" for name, given in assignments.items() if given.keep}
    told = [_with_lost_partners(given, pairing, kept) for given in assignments.values() if not given.keep]
    work = {given.layer.name: LayerWork(model, given, device) for given in told}
    steps = None if isinstance(plan, RtnPlan) else steps_of(plan)
    plain = (item for item in work.values() if steps is None or is_plain(item.assignment, steps))
    round_together(plain, with_taps=steps is not None and sums_taps(steps.calibrator))
    if isinstance(plan, RtnPlan) or steps is None:
        for item in work.values():
            item.quantize(_plainly(device), lambda: None)
        return Compressed(tuple(item.finish(pairing, None) for item in work.values()), {}, kept)
    pairs = [pair for pair in pairing.pairs if pair.low in work and pair.high in work]
    walked = _walk(model, plan, steps, pairs, work, device)
    tensors = {name: value.float() for name, value in walked.tensors.items()}
    found = Compressed(tuple(item.finish(pairing, walked) for item in work.values()), tensors, kept)
    return fold_scales(found, model.graph, model.state) if plan.fold_scales else found


def _with_lost_partners(given: Assignment, pairing: Pairing, kept: Mapping[str, str]) -> Assignment:
    """Say why a layer of a pair has no partner that repairs it, or that it repairs."""
    lost = [name for name in partners(given.layer, pairing.pairs) if name in kept]
    return replace(given, reason=f"its partner {', '.join(lost)} is kept by a layer rule") if lost else given


def _chosen_bits(model: LoadedModel, plan: DfmpcPlan | RtnPlan, rules: Sequence[LayerRule]) -> Mapping[str, int]:
    """Return the widths that a budget's solver chose, by layer; nothing where the plan names widths."""
    if isinstance(plan, RtnPlan) or plan.budget is None:
        return {}
    return choose_bits(model, plan, rules).bits


def _plainly(device: str) -> Callable[[Tensor, Assignment, Moments], RoundedLayer]:
    return lambda weight, assignment, _moments: RoundedLayer(quantize_layer(weight, assignment, device))


def _walk(
    model: LoadedModel, plan: DfmpcPlan, steps: Steps, pairs: Sequence[Pair], work: dict[str, LayerWork], device: str
) -> WalkResult:
    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    def rounding(weight: Tensor, assignment: Assignment, moments: Moments) -> RoundedLayer:
        return round_layer(weight, assignment, steps, moments, device)

    def quantize(layer: Layer, moments: Callable[[], InputMoments | None]) -> LayerFigures:
        if layer.name not in work:
            return kept_figures(model, layer, device)
        work[layer.name].quantize(rounding, moments)
        return work[layer.name].figures()

    calibrator = make_calibrator(model, steps.calibrator, device)
    lambdas = Lambdas(plan.lambda1, plan.lambda2) if steps.compensate == "c" else None
    return Walk(model.graph, pairs, quantize, tensor, calibrator, lambdas, steps.correct_biases).run()


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
    stated = [tensor for node in model.graph.nodes if node.norm for tensor in node.norm.tensors]
    for tensor in (*stated, *(layer.weight for layer in model.graph.layers)):
        if not bool(torch.isfinite(model.state[tensor]).all()):
            raise NonFiniteError(f"{name}: {tensor} holds NaN or Inf; repair or retrain the checkpoint")
