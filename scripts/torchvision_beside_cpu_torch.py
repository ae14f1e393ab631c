"""Import torchvision's networks where its C++ operators are absent.

PyPI's torchvision is built for a CUDA torch: beside a CPU-only one its C++ operators are missing and its import stops
at the fake kernels it registers for them. The networks need none of these operators, so the missing schemas are defined
and the import is tried again.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def torchvision_models() -> ModuleType:
    """Return the module torchvision.models. Raises ImportError where torchvision is not installed."""
    for _ in range(4):
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _LIBRARY.define(f"{missing.group(1)}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")
