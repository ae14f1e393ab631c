"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def project() -> Path:
    """Return the project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with pretrained networks and images, or skip."""
    folder = Path(os.environ.get("DFMPC_SHARED", ROOT.parent / "shared"))
    if not (folder / "models" / "cifar_models.py").is_file():
        pytest.skip(f"needs the shared networks and images: {folder} is absent (set DFMPC_SHARED)")
    return folder
