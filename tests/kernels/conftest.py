"""Where kernels run, and outputs that show what nobody wrote. tests/conftest.py switches the interpreter on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where launchers run: the GPU, or the CPU with the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty gives with NaN, -1 or 0xFF, so that an output nobody wrote shows."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        fresh = plain(*args, **kwargs)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 255 if fresh.dtype is torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", empty)
