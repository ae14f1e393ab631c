"""What torch keeps of every network it has traced, and a process of a night with a thousand networks must let go."""

from __future__ import annotations

import gc
import linecache
import sys
from typing import Any

_GENERATED = "<eval_with_key>"
"""Name, less its number, of the file that torch.fx pretends each generated function to be in."""


def let_go() -> None:
    """Forget the source texts of generated functions (torch.fx and linecache keep all of them) and collect cycles.

    Tracebacks of functions that are gone lose their lines, and nothing else.
    """
    module: Any = sys.modules.get("torch.fx.graph_module")
    loader = getattr(module, "_loader", None)
    getattr(loader, "eval_cache", {}).clear()
    for name in [name for name in linecache.cache if name.startswith(_GENERATED)]:
        del linecache.cache[name]
    gc.collect()
