"""The optional distributions that some exports need."""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import UsageError

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise UsageError, naming what is missing, unless onnx, onnxscript and onnxruntime can be imported."""
    missing = [name for name in _ONNX if find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}, not installed here: pip install 'dfmpc[onnx]'")
