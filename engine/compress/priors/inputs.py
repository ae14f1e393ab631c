"""Which networks take images: what the priors need to know of an input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ...errors import UnsupportedModelError
from ...models.load import LoadedModel

MOST_CHANNELS = 16
"""Grey, colour, and the bands of multispectral cameras; what has more is a feature map."""


def image_shape(model: LoadedModel) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that ``model`` takes.

    Raises UnsupportedModelError, naming shape, type and remedy, where its input is not float32 [N, C, H, W] with C at
    most MOST_CHANNELS: sequences, volumes, and token ids are no images.
    """
    shape = model.input_shape
    dtype = torch.float32 if model.program is None else _input_dtype(model.program)
    if len(shape) != 4 or not dtype.is_floating_point or not 1 <= shape[1] <= MOST_CHANNELS or min(shape[2:]) < 1:
        found = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise UnsupportedModelError(
            f"{model.source.name}: its input is {found}, and the synthetic calibrator makes images, float32 "
            f"[N, C, H, W] with C at most {MOST_CHANNELS}; use calibrator: analytic, which needs none"
        )
    return shape[1], shape[2], shape[3]


def _input_dtype(program: ExportedProgram) -> torch.dtype:
    """Type of the one tensor input (capture refuses programs of another number)."""
    specs = program.graph_signature.input_specs
    inputs = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    return next(value.dtype for value in values if isinstance(value, Tensor))
