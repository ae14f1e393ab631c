from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.artifact.commit import discard, new_attempt
from dfmpc.artifact.manifest import MANIFEST
from dfmpc.artifact.storage import storing
from dfmpc.artifact.tensors import TensorFile, write_tensors
from dfmpc.errors import ArtifactError, StorageError, UnsupportedModelError
from safetensors.torch import load_file
from torch import Tensor

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def test_a_full_device_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, which this system does not have")
    with (
        pytest.raises(StorageError, match=r"disk is full: free some space or choose another --output"),
        storing(tmp_path),
    ):
        full.write_bytes(b"x")


def test_a_write_that_the_system_cuts_short_is_a_storage_error(
    make: Callable[..., Any], tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    attempt = new_attempt(tmp_path, "a" * 64)
    example = make()
    with largest_file(1500), pytest.raises(StorageError, match=rf"{attempt}: .*EFBIG.*ulimit -f"):
        example.write(attempt)
    assert not (attempt / MANIFEST).exists()
    discard(attempt)
    assert list(attempt.parent.iterdir()) == []


def values(dtype: torch.dtype) -> Tensor:
    numbers = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0]])
    return numbers.to(dtype)


def test_the_library_reads_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): values(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}
    entry = write_tensors(tmp_path / "t.safetensors", tensors, {"a": "1"})
    assert entry.size == (tmp_path / "t.safetensors").stat().st_size
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double()), name
    file = TensorFile(tmp_path / "t.safetensors")
    assert file.layout("torch.bfloat16") == ("BF16", (2, 3))
    assert {name: file.size(name) for name in ("torch.bfloat16", "scalar", "empty")} == {
        "torch.bfloat16": 12,
        "scalar": 4,
        "empty": 0,
    }


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tensor phase: torch.complex64 cannot be stored"):
        write_tensors(tmp_path / "t.safetensors", {"phase": torch.zeros(2, dtype=torch.complex64)}, {})


def test_a_file_that_is_no_tensor_file(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ArtifactError, match=r"t.safetensors: cannot be read: .*run the job again"):
        TensorFile(tmp_path / "t.safetensors")
    write_tensors(tmp_path / "u.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(ArtifactError, match="tensor b is missing"):
        TensorFile(tmp_path / "u.safetensors").tensor("b")
