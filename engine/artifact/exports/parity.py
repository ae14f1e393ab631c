"""Does another runtime compute what ``dfmpc.load`` computes: every weight and the network's outputs, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UnsupportedModelError
from ..loader import load_state_dict
from ..verify import VerifyResult
from .graph import OnnxModel, build_onnx
from .source import Source, open_source

TOLERANCE = 1e-5
"""Greatest relative error that still is the same network."""
_SEED = 0
_BATCH = 2
"""Of the compared inputs, where any batch runs."""


class Mode(StrEnum):
    """How onnxruntime may run a graph."""

    AS_WRITTEN = "as written"
    OPTIMIZED = "optimized"
    FOLDED = "folded"
    """Optimized, and weights dequantized once, when the session starts."""


@dataclass(frozen=True)
class ParityResult:
    """One artifact in a runtime beside ``dfmpc.load``; errors are relative, 0 is the same bit for bit."""

    path: Path
    runtime: str
    """Name and version."""
    weights: int
    """Weights compared."""
    weight_error: float
    """Largest |found − expected| / |expected| of any element of any weight; inf where only one of the two is 0."""
    output_error: float
    """Largest |found − expected| over the largest |expected| of an output, the graph run as it is written."""
    optimized_error: float
    """The same after the runtime's own optimizations."""
    folded_error: float
    """The same with weights dequantized once, when the session starts (``session.disable_quant_qdq``)."""
    findings: list[str]
    """One sentence for each weight or output beyond the tolerance; none means parity."""

    def to_text(self) -> str:
        """Return the figures on one line."""
        return (
            f"{self.runtime}: {self.weights} weights within {self.weight_error:.2g}, outputs within "
            f"{self.output_error:.2g} ({self.optimized_error:.2g} optimized, {self.folded_error:.2g} folded)"
        )


def check_parity(
    folder: Path, *, allow_code: Sequence[str] = (), opset: int | None = None, tolerance: float = TOLERANCE
) -> ParityResult:
    """Export the artifact ``folder`` in memory and compare it, in onnxruntime on the CPU, with ``dfmpc.load``.

    Inputs are seeded standard normal numbers. Raises what ``open_source`` and ``build_onnx`` raise.
    """
    source = open_source(folder, allow_code)
    return compare(source, build_onnx(source, opset), tolerance)


def with_parity(
    result: VerifyResult, *, allow_code: Sequence[str] = (), tolerance: float = TOLERANCE
) -> tuple[VerifyResult, ParityResult | None]:
    """Return ``result`` with what the comparison found added, and the comparison; None where there was none.

    A damaged artifact is not compared; one that cannot be written as ONNX is a finding. Raises FactoryError.
    """
    if result.findings:
        return result, None
    try:
        parity = check_parity(result.path, allow_code=allow_code, tolerance=tolerance)
    except UnsupportedModelError as error:
        return replace(result, findings=[f"not compared with onnxruntime: {error}"]), None
    return replace(result, findings=parity.findings), parity


def compare(source: Source, model: OnnxModel, tolerance: float = TOLERANCE) -> ParityResult:
    """Return how far ``model``, run by onnxruntime, is from the artifact that it was made of."""
    expected = load_state_dict(source.folder)
    found = dequantized_weights(model)
    errors = {name: element_error(found[name], expected[name]) for name in found}
    images = _inputs(source, model)
    reference = _outputs(source.module, images)
    outputs = {mode: max(map(tensor_error, run(model.proto, images, mode), reference)) for mode in Mode}
    beyond = [f"{name}: relative error {error:.3g}" for name, error in errors.items() if not error <= tolerance]
    beyond += [
        f"outputs of the graph {mode}: relative error {error:.3g}"
        for mode, error in outputs.items()
        if not error <= tolerance
    ]
    version = f"onnxruntime {onnxruntime.__version__}"
    return ParityResult(
        path=source.folder,
        runtime=version,
        weights=len(errors),
        weight_error=max(errors.values(), default=0.0),
        output_error=outputs[Mode.AS_WRITTEN],
        optimized_error=outputs[Mode.OPTIMIZED],
        folded_error=outputs[Mode.FOLDED],
        findings=[f"{text}; {version} may differ from dfmpc.load by {tolerance:g}" for text in beyond],
    )


def dequantized_weights(model: OnnxModel) -> dict[str, Tensor]:
    """Return every quantized weight, float32 in its stored shape, as onnxruntime dequantizes it."""
    names = [layer.weight for layer in model.layers]
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    needed = [node for node in proto.graph.node if node.output[0].split("/")[0] in names]
    del proto.graph.node[:], proto.graph.output[:], proto.graph.input[:]
    proto.graph.node.extend(needed)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return dict(zip(names, _run(proto, {}, Mode.AS_WRITTEN), strict=True)) if names else {}


def run(proto: onnx.ModelProto, images: Tensor, mode: Mode) -> list[Tensor]:
    """Return the outputs of ``proto`` for ``images`` in onnxruntime on the CPU."""
    return _run(proto, {proto.graph.input[0].name: images}, mode)


def _run(proto: onnx.ModelProto, inputs: Mapping[str, Tensor], mode: Mode) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if mode is Mode.AS_WRITTEN else levels.ORT_ENABLE_ALL
    if mode is Mode.FOLDED:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # by default a fused product with packed weights rounds its inputs to eight bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session: Any = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in found]


def _inputs(source: Source, model: OnnxModel) -> Tensor:
    shape = (model.batch or _BATCH, *source.manifest.input_shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))


def _outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [leaf for leaf in pytree.tree_leaves(module(images)) if isinstance(leaf, Tensor)]


def tensor_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected magnitude.

    It is inf where shapes differ, where ``found`` is not finite, and where only ``expected`` is 0 throughout.
    """
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    scale = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / scale if scale else float("inf")


def element_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of an element; inf where one is 0 and the other is not."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).abs()
    ratio = torch.where(difference == 0, 0.0, difference / expected.double().abs())
    return float(ratio.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if ratio.numel() else 0.0
