"""Let scripts import dfmpc.kernels from a checkout where dfmpc is not installed (a lent machine with torch only)."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ensure_dfmpc() -> None:
    """Make ``import dfmpc.kernels`` work: engine/ is the package and kernels/ its sub-package (pyproject.toml)."""
    if find_spec("dfmpc") is not None:
        return
    folders = [str(ROOT / "engine"), str(ROOT)]
    spec = spec_from_file_location("dfmpc", ROOT / "engine" / "__init__.py", submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"no package in {ROOT / 'engine'}; run this from a checkout of dfmpc")
    module = module_from_spec(spec)
    sys.modules["dfmpc"] = module
    spec.loader.exec_module(module)
