"""From what compression left to the manifest: every figure rounded, nothing that differs from run to run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..compress.result import Coefficients, Compressed, QuantizedLayer
from ..job.recipes import describe_plan
from ..job.task import Task
from ..models.load import LoadedModel
from .key import TaskKey
from .manifest import FORMAT_VERSION, PROGRAM, CoefficientEntry, FileEntry, LayerEntry, Manifest, SourceEntry

_DECIMALS = 4
"""Of figures: far above what the order of a sum could change."""


def make_manifest(
    *, model: LoadedModel, compressed: Compressed, task: Task, key: TaskKey, files: Mapping[str, FileEntry]
) -> Manifest:
    """Return the manifest of ``task``'s artifact, whose other files are ``files``."""
    plan = describe_plan(task.plan)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=task.model.name,
        plan=task.plan.model_dump(mode="json"),
        method=plan.method,
        recipe=plan.recipe,
        calibrator=plan.calibrator,
        tier=plan.tier,
        key=key.key,
        ingredients=key.ingredients,
        source=_source(model, key),
        input_shape=tuple(model.input_shape),
        params=sum(parameter.numel() for parameter in model.module.parameters()),
        bits_per_weight=bits_per_weight(compressed.layers),
        layers=tuple(_layer_entry(layer, model.state[layer.layer.weight]) for layer in compressed.layers),
        kept=compressed.kept,
        files=dict(files),
    )


def _source(model: LoadedModel, key: TaskKey) -> SourceEntry:
    if model.program is not None:
        return SourceEntry(program=PROGRAM)
    source, ingredients = model.source, key.ingredients["source"]
    distribution = ingredients["distribution"] if isinstance(ingredients, dict) else None
    return SourceEntry.model_validate(
        {"factory": source.factory, "args": source.args, "kwargs": source.kwargs, "distribution": distribution}
    )


def weight_parts(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return the tensors that replace the layer's weight, by their names in the file."""
    found = {
        "codes": layer.quantized.codes,
        "scale": layer.quantized.scale,
        "zero_point": layer.quantized.zero_point,
        "input_scale": layer.input_scale,
    }
    return {f"{layer.layer.weight}.{part}": tensor for part, tensor in found.items() if tensor is not None}


def bits_per_weight(layers: tuple[QuantizedLayer, ...]) -> float | None:
    """Return the bits of codes and factors a quantized weight; None where nothing is quantized."""
    params = sum(layer.layer.params for layer in layers)
    parts = [tensor for layer in layers for tensor in weight_parts(layer).values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts)
    return round(8 * size / params, 6) if params else None


def _layer_entry(layer: QuantizedLayer, original: Tensor) -> LayerEntry:
    form, quantized = layer.quantized.format, layer.quantized
    return LayerEntry(
        name=layer.layer.name,
        weight=layer.layer.weight,
        op=layer.layer.op,
        shape=layer.layer.shape,
        dtype=str(original.dtype).removeprefix("torch."),
        groups=layer.layer.groups,
        role=layer.role,
        partners=layer.partners,
        folded=layer.folded,
        reason=layer.reason,
        bits=form.bits,
        grid=form.grid,
        granularity=layer.granularity,
        rows=quantized.codes.shape[0],
        length=form.length,
        group_size=form.group_size,
        layer_wise=form.layer_wise,
        zero_point=quantized.zero_point is not None,
        input_scale=layer.input_scale is not None,
        sqnr_db=_figure(layer.sqnr_db),
        sparsity=round(layer.sparsity, _DECIMALS),
        clipped_fraction=round(layer.clipped_fraction, _DECIMALS),
        coefficients=_coefficients(layer.coefficients),
        norm_shift=None if layer.norm_shift is None else _figure(layer.norm_shift),
    )


def _figure(value: float) -> float | None:
    return round(value, _DECIMALS) if math.isfinite(value) else None


def _coefficients(found: Coefficients | None) -> CoefficientEntry | None:
    if found is None:
        return None
    return CoefficientEntry(
        minimum=round(found.minimum, _DECIMALS),
        mean=round(found.mean, _DECIMALS),
        maximum=round(found.maximum, _DECIMALS),
        histogram=found.histogram,
        dead=found.dead,
    )
