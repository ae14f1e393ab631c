"""What an export says of itself: what it cost, what had to be widened, what the file asks of its reader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path


class Format(StrEnum):
    """What an artifact can be exported to."""

    ONNX = "onnx"
    """Packed weights behind DequantizeLinear."""
    PT2 = "pt2"
    """torch.export's program of the dequantized network."""
    STATE_DICT = "state-dict"
    """Dequantized tensors under their original names."""


class Precision(StrEnum):
    """dtype of the floating tensors of a dequantized export."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Runtime(StrEnum):
    """What an export can be compared in."""

    ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class StoredLayer:
    """How one quantized layer's codes lie in the file."""

    weight: str
    bits: int
    """Of the artifact's codes."""
    stored_as: str
    """ONNX's name of the element type: INT2, UINT4, …"""
    stored_bits: int
    weights: int

    @property
    def extra_bytes(self) -> int:
        """Bytes that widening costs."""
        return self.weights * (self.stored_bits - self.bits) // 8


@dataclass(frozen=True)
class ExportReport:
    """One exported file. Sizes are bytes."""

    file: Path
    format: Format
    dtype: Precision
    bytes: int
    artifact_bytes: int
    """Of the artifact's files, its manifest not included."""
    original_bytes: int
    """Of the network's tensors in the checkpoint's dtypes (what compression corrected counts as float32)."""
    batch: int | None = None
    """Fixed batch of the exported graph; None where any batch runs, or where there is no graph."""
    opset: int | None = None
    ir_version: int | None = None
    operators: dict[str, int] = field(default_factory=dict)
    """ONNX operators and how many nodes there are of each."""
    layers: tuple[StoredLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def widened(self) -> tuple[StoredLayer, ...]:
        """Layers whose codes take more bits in the file than in the artifact."""
        return tuple(layer for layer in self.layers if layer.stored_bits != layer.bits)

    def to_json(self) -> str:
        """Return every field, and ``widened``, as one document."""
        fields = asdict(self) | {"widened": [layer.weight for layer in self.widened]}
        return json.dumps(fields, indent=1, default=str)

    def to_text(self) -> str:
        """Return the file with its sizes, its graph, what was widened, and the notes."""
        lines = [
            f"{self.file}: {_mib(self.bytes)} as {self.format} "
            f"(artifact {_mib(self.artifact_bytes)}, original {_mib(self.original_bytes)})"
        ]
        if self.format is not Format.ONNX:
            lines.append(f"dtype {self.dtype}")
        if self.opset is not None:
            lines.append(f"opset {self.opset}, IR version {self.ir_version}; {_counted(self.operators)}")
        lines += [f"weights: {_kinds(self.layers)}"] if self.layers else []
        lines += [f"widened: {_kinds(self.widened)}"] if self.widened else []
        return "\n".join([*lines, *self.notes])


def _mib(size: int) -> str:
    return f"{size / 2**20:.3f} MiB"


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators.items())


def _kinds(layers: tuple[StoredLayer, ...]) -> str:
    """Return layers by the bits they had and the type they got, with the bytes that this costs."""
    counts = Counter((layer.bits, layer.stored_as) for layer in layers)
    extra: Counter[tuple[int, str]] = Counter()
    for layer in layers:
        extra[layer.bits, layer.stored_as] += layer.extra_bytes
    return ", ".join(
        f"{count} of {bits} bits as {kind}" + (f" (+{_mib(extra[bits, kind])})" if extra[bits, kind] else "")
        for (bits, kind), count in sorted(counts.items())
    )
