"""What a compressed model takes, foretold: codes and factors to the byte, the artifact's other bytes nearly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dfmpc.kernels.formats import CodeFormat

from ...job.methods import DfmpcPlan
from ...job.recipes import steps_of
from ...models.graph import Pair, Pairing
from ...models.load import LoadedModel
from ..assign import Assignment

_FLOAT = 4
_ENTRY = 64
"""Bytes of a tensor's entry in the file's header and of its part of the alignment, beside its name and offsets."""
_MANIFEST, _MANIFEST_LAYER = 2_500, 900
"""Bytes of the manifest: of its frame and of a layer's entry; measured."""


def layer_bytes(option: Assignment, in_norm: bool = False) -> int:
    """Return the bytes of a layer's codes and scales; ``in_norm``: a norm holds the scales of its channels."""
    layer = option.layer
    form = CodeFormat(option.grid, option.bits, layer.length, option.group_size, option.layer_wise)
    one = option.layer_wise or (in_norm and form.groups == 1)
    scales = 1 if one else layer.out_channels * form.groups
    return layer.out_channels * form.row_bytes + _FLOAT * scales


@dataclass(frozen=True)
class Overhead:
    """Bytes that no choice of widths changes."""

    factors: int
    """Unfolded coefficients c, which count as part of the quantized weights."""
    rest: int
    """Every other tensor, header and manifest: an estimate, made to be a little too high."""


def overhead(model: LoadedModel, plan: DfmpcPlan, assigned: Mapping[str, Assignment], pairing: Pairing) -> Overhead:
    """Return what ``plan`` stores beside the codes and scales of the layers in ``assigned`` that are not kept."""
    quantized = {name for name, option in assigned.items() if not option.keep}
    pairs = [pair for pair in pairing.pairs if pair.low in quantized and pair.high in quantized]
    steps = steps_of(plan)
    unfolded = {pair.high for pair in pairs if steps.compensate == "c" and not _folds(model, pair)}
    factors = sum(_FLOAT * assigned[name].layer.in_channels for name in unfolded)
    replaced = {assigned[name].layer.weight for name in quantized}
    corrected = {name for node in model.graph.nodes if node.norm for name in node.norm.tensors}
    if steps.correct_biases:
        corrected |= {layer.bias for layer in model.graph.layers if layer.bias}
    tensors = sum(
        tensor.numel() * (max(_FLOAT, tensor.element_size()) if name in corrected else tensor.element_size())
        for name, tensor in model.state.items()
        if name not in replaced
    )
    return Overhead(factors, tensors + _header(model, quantized, assigned))


def _folds(model: LoadedModel, pair: Pair) -> bool:
    affine = {node.norm.name for node in model.graph.nodes if node.norm and node.norm.weight and node.norm.bias}
    return pair.folds and pair.norm in affine


def _header(model: LoadedModel, quantized: set[str], assigned: Mapping[str, Assignment]) -> int:
    """Return the bytes of the tensor file's header, the manifest and the program where there is one."""
    names = [name for name in model.state if name not in {assigned[name].layer.weight for name in quantized}]
    names += [f"{assigned[name].layer.weight}.{part}" for name in quantized for part in ("codes", "scale")]
    entries = sum(_ENTRY + len(name) for name in names)
    manifest = _MANIFEST + _MANIFEST_LAYER * len(quantized)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state.values())
    program = max(0, model.checkpoint_bytes - weights) if model.program is not None else 0
    return entries + manifest + program
