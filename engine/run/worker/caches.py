"""What torch keeps of every network it has traced, and a process of a night with a thousand networks must let go."""

from __future__ import annotations

import ctypes
import gc
import linecache
import sys
from functools import cache
from typing import Any

_TRIM: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_GENERATED = "<eval_with_key>"
"""Name, less its number, of the file that torch.fx pretends each generated function to be in."""


def let_go() -> None:
    """Forget the source texts of generated functions (torch.fx and linecache keep all of them) and collect cycles.

    Tracebacks of functions that are gone lose their lines, and nothing else. What the C library keeps of freed memory,
    scattered over networks of different kinds, goes back to the system.
    """
    module: Any = sys.modules.get("torch.fx.graph_module")
    loader = getattr(module, "_loader", None)
    getattr(loader, "eval_cache", {}).clear()
    for name in [name for name in linecache.cache if name.startswith(_GENERATED)]:
        del linecache.cache[name]
    gc.collect()
    _keep_the_rest()
    if _TRIM is not None:
        _TRIM(0)


@cache
def _keep_the_rest() -> None:
    """Let later collections pass over what is there after the first network: mostly torch itself, which stays."""
    gc.freeze()
