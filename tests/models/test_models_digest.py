from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from dfmpc.errors import CheckpointError
from dfmpc.models.digest import CHUNK_BYTES, tree_digest


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1], ids=["empty", "1", "chunk", "chunk+1"])
def test_digest_is_the_tree_of_chunk_digests(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    file = tmp_path / "file"
    file.write_bytes(content)
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, size, CHUNK_BYTES)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()
    assert tree_digest(file) == expected


def test_digest_sees_a_flipped_bit_in_the_second_chunk(tmp_path: Path) -> None:
    content = bytearray(CHUNK_BYTES + 8)
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(content)
    content[-1] ^= 1
    second.write_bytes(content)
    assert tree_digest(first) != tree_digest(second)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read \(No such file"):
        tree_digest(tmp_path / "nowhere")
