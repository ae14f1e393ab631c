"""The only file that imports triton; without it (no Linux wheel) the torch references still work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__all__ = ["available", "interpreted", "jit", "tl", "triton"]

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None


def available() -> bool:
    """Tell whether Triton can be imported."""
    return triton is not None


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on tensors of the CPU (TRITON_INTERPRET=1 before import)."""
    return available() and os.environ.get("TRITON_INTERPRET", "0") == "1"


def jit(function: Any) -> Any:
    """Make ``function`` a Triton kernel, or leave it a plain function that nothing calls where Triton is absent."""
    return triton.jit(function) if available() else function
