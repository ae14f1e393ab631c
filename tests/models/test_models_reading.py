from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.errors import CheckpointError
from dfmpc.job.sources import ModelSource
from dfmpc.models.checkpoint import read_checkpoint
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.models.memory_file import opened
from dfmpc.models.reading import CHUNK_BYTES, FileBytes, ReadingStoppedError, digest_files, read_files
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

MIB = 2**20
PREADV = os.preadv


def tree(content: bytes) -> str:
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Return a file of three chunks, the last one short."""
    file = tmp_path / "large"
    file.write_bytes(random.Random(0).randbytes(2 * CHUNK_BYTES + 12345))
    return file


def resources() -> set[object]:
    """Return the threads and the open files of this process; those of earlier tests may go at any time."""
    gc.collect()
    files = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            files.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return {*files, *threading.enumerate()}


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_content_digest_and_state_of_every_file_in_order(large: Path, tmp_path: Path, threads: int) -> None:
    files = [large, tmp_path / "empty", tmp_path / "one"]
    files[1].write_bytes(b"")
    files[2].write_bytes(b"x")
    before = resources()
    found = read_files(files, threads=threads)
    assert resources() <= before
    assert [file.path for file in found] == files
    for file in found:
        content = file.path.read_bytes()
        assert bytes(file.data) == content
        assert file.digest == tree(content)
        assert (file.size, file.state) == (len(content), (len(content), file.path.stat().st_mtime_ns))
        assert not file.data.readonly
    assert [file.digest for file in digest_files(files, threads=threads)] == [file.digest for file in found]


def test_the_memory_is_page_aligned_unless_the_caller_gives_it(large: Path) -> None:
    found = read_files([large], threads=2)[0]
    assert torch.frombuffer(found.data, dtype=torch.uint8).data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
    given: list[bytearray] = []

    def allocate(size: int) -> memoryview:
        given.append(bytearray(size + 100))
        return memoryview(given[-1])

    other = read_files([large], threads=2, allocate=allocate)[0]
    assert given[0][: other.size] == large.read_bytes() == bytes(other.data)
    assert other.digest == found.digest


def test_short_reads_are_continued(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return PREADV(descriptor, [memoryview(buffers[0])[:99_991]], offset)

    monkeypatch.setattr(os, "preadv", short)
    found = read_files([large], threads=2)[0]
    assert bytes(found.data) == large.read_bytes()
    assert found.digest == tree(large.read_bytes())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_disk_is_named_with_its_error_and_leaves_no_thread(
    large: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    def failing(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if offset >= CHUNK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PREADV(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    before = resources()
    with pytest.raises(
        CheckpointError, match=r"large: cannot be read \(Input/output error\); check the disk"
    ) as caught:
        read_files([large], threads=threads)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    assert resources() <= before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_is_cut_short_meanwhile(large: Path, threads: int) -> None:
    before = resources()
    with pytest.raises(
        CheckpointError, match=r"large: (ended at byte \d+ of 33566777, so|was changed) .*run again when"
    ):
        read_files([large], threads=threads, progress=lambda _: os.truncate(large, 3 * MIB))
    assert resources() <= before


def test_a_file_that_is_written_to_meanwhile(large: Path) -> None:
    def touch(_: int) -> None:
        os.utime(large, ns=(1, 1))

    with pytest.raises(CheckpointError, match="large: was changed while it was read; run again when nobody writes"):
        read_files([large], threads=2, progress=touch)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file or directory\); check the path"):
        read_files([tmp_path / "gone"], threads=1)
    with pytest.raises(CheckpointError, match=r"cannot be read \(it is not a regular file\)"):
        read_files([tmp_path], threads=1)


def test_no_memory_is_an_error_of_memory(large: Path) -> None:
    def nothing(_: int) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with pytest.raises(MemoryError, match="large: no memory for its 33566777 bytes"):
        read_files([large], threads=1, allocate=nothing)


@pytest.mark.parametrize("threads", [1, 2])
def test_progress_counts_every_byte_and_reading_stops_when_asked(large: Path, threads: int) -> None:
    counts: list[int] = []
    read_files([large], threads=threads, progress=counts.append)
    assert sum(counts) == large.stat().st_size
    assert max(counts) == MIB
    stop, read = threading.Event(), list[int]()

    def step(count: int) -> None:
        read.append(count)
        stop.set()

    before = resources()
    with pytest.raises(ReadingStoppedError):
        read_files([large], threads=threads, progress=step, stop=stop)
    assert 1 <= len(read) <= 2 * threads
    assert resources() <= before


def test_the_fault_after_reading(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFMPC_FAULT", "after-read=raise")
    with pytest.raises(RuntimeError, match="after-read"):
        read_files([large], threads=1)
    assert digest_files([large], threads=1)[0].digest == tree(large.read_bytes())


def test_bytes_in_memory_read_like_a_file(large: Path) -> None:
    content = large.read_bytes()
    file = opened(memoryview(content))
    assert file.read(5) == content[:5]
    assert file.seek(-7, os.SEEK_END) == len(content) - 7
    assert file.read() == content[-7:]
    assert file.read(1) == b""
    file.seek(3)
    into = bytearray(20 * MIB)
    assert file.readinto(into) == len(into)  # type: ignore[attr-defined]  # of io.BufferedIOBase
    assert into == content[3 : 3 + len(into)]
    assert file.tell() == 3 + len(into)


# Safetensors, parsed here


def in_memory(content: bytes, tmp_path: Path) -> list[FileBytes]:
    file = tmp_path / "net.safetensors"
    file.write_bytes(content)
    return read_files([file], threads=1)


def with_header(header: object, data: bytes, pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def same(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and bytes(first.reshape(-1).view(torch.uint8)) == bytes(second.reshape(-1).view(torch.uint8))


def test_every_dtype_and_shape_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.arange(6).to(dtype).reshape(2, 3) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "counter": torch.tensor(7)}
    content = save(tensors, metadata={"format": "pt"})
    found, expected = read_checkpoint(in_memory(content, tmp_path)), load(content)
    assert found.keys() == expected.keys() == tensors.keys()
    assert all(same(tensor, expected[name]) for name, tensor in found.items())


def test_tensors_are_views_of_the_file_and_copies_where_the_dtype_needs_another_place(tmp_path: Path) -> None:
    data = torch.arange(6, dtype=torch.float32).numpy().tobytes() + bytes([9])
    header = {"a": entry("F32", [2, 3], 0, 24), "b": entry("U8", [1], 24, 25)}
    pad = -len(json.dumps(header)) % 8
    for more, view in ((0, True), (3, False)):
        files = in_memory(with_header(header, data, pad + more), tmp_path)
        found = read_checkpoint(files)
        assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
        assert found["b"].tolist() == [9]
        assert found["a"].data_ptr() % 4 == 0
        files[0].data[-25:-1] = bytes(24)
        assert bool(found["a"].any()) is not view


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1234567", "7 bytes, too few for a header"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "claims 100000001 bytes, the format allows 100000000"),
        ((9).to_bytes(8, "little") + b"{}", "claims 9 bytes, the file has 10"),
        (with_header(b" {}", b""), "its header is no JSON object"),
        (with_header(b'{"a": ', b""), "its header is no JSON: Expecting value"),
        (with_header(b'{"a\xff": 1}', b""), "its header is no JSON: 'utf-8' codec"),
        (with_header(b'{"a": ' + b"[" * 100_000, b""), "its header is no JSON: maximum recursion"),
        (with_header(b'{"a": {}, "a": {}}', b""), "its header has 'a' twice"),
        (with_header(b'{"a": {"dtype": "U8", "dtype": "I8"}}', b""), "its header has 'dtype' twice"),
        (with_header({"__metadata__": {"a": 1}}, b""), "its __metadata__ is no map of texts"),
        (with_header({"a": []}, b""), "tensor a has no dtype, shape and data_offsets"),
        (with_header({"a": entry("F33", [1], 0, 4)}, bytes(4)), "tensor a has the dtype 'F33'; known are F64, F32"),
        (with_header({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "the shape of tensor a is no list of sizes"),
        (with_header({"a": entry("F32", [True], 0, 4)}, bytes(4)), "the shape of tensor a is no list"),
        (with_header({"a": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "the shape of tensor a is no list"),
        (with_header({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0]}}, bytes(4)), "data_offsets of tensor a"),
        (with_header({"a": entry("F32", [1], 0, 4)}, bytes(3)), "tensor a lies at 0 to 4 of 3 bytes"),
        (with_header({"a": entry("F32", [1], 4, 0)}, bytes(4)), "tensor a lies at 4 to 0 of 4 bytes"),
        (with_header({"a": entry("F32", [2], 0, 4)}, bytes(4)), r"tensor a has 4 bytes; F32 \[2\] takes 8"),
        (
            with_header({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, bytes(4)),
            "tensor b overlaps a",
        ),
        (
            with_header({"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 3, 4)}, bytes(4)),
            "tensor b leaves a hole behind a",
        ),
        (with_header({"a": entry("U8", [2], 1, 3)}, bytes(3)), "tensor a leaves a hole behind the header"),
        (with_header({"a": entry("U8", [2], 0, 2)}, bytes(3)), "1 bytes behind its tensors belong to none"),
    ],
)  # fmt: skip
def test_a_header_that_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"net\.safetensors: truncated or corrupt; copy or download it again"
    ) as e:
        read_checkpoint(in_memory(content, tmp_path))
    assert e.match(said)


def test_what_is_accepted_of_damaged_files_is_what_the_library_reads(tmp_path: Path) -> None:
    whole = save({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.float16), "c": torch.zeros(3)})
    chance, accepted = random.Random(1), 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 2)):
            content[chance.randrange(len(whole))] = chance.choice(b'0123456789{}[]":,abFU\x00\xff')
        try:
            found = read_checkpoint(in_memory(bytes(content), tmp_path))
        except CheckpointError:
            continue
        accepted += 1
        try:
            expected = load(bytes(content))
        except SafetensorError as error:
            pytest.fail(f"read here, and the library says: {error}")
        assert found.keys() == expected.keys()
        assert all(same(tensor, expected[name]) for name, tensor in found.items())
    assert 20 < accepted < 500


# Memory


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["safetensors", "pt"])
def eight_mib(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a checkpoint of a linear layer."""
    state = {"weight": torch.ones(1024, 2048), "bias": torch.zeros(1024)}
    file = tmp_path / f"net.{request.param}"
    save_file(state, file) if request.param == "safetensors" else torch.save(state, file)
    return file


def check_flat(action: Callable[[], float]) -> None:
    """Call ``action`` fifty times and hold the memory to what half of them took, within two files of 8 MiB."""
    sizes = []
    for _ in range(50):
        assert action() == 1024 * 2048
        sizes.append(resident())
    assert max(sizes[25:]) - max(sizes[:25]) < 16 * MIB


def test_fifty_checkpoints_take_flat_memory(eight_mib: Path) -> None:
    check_flat(lambda: read_checkpoint(read_files([eight_mib], threads=2))["weight"].sum().item())


@pytest.mark.slow
def test_fifty_models_take_flat_memory(eight_mib: Path, make_source: Callable[..., ModelSource]) -> None:
    source = make_source(factory="torch.nn:Linear", args=[2048, 1024], checkpoint=str(eight_mib), input=[1, 2048])

    def once() -> float:
        model = load_model(source, AllowList(("torch.nn",)), read_files([eight_mib], threads=2))
        found = model.state["weight"].sum().item()
        del model
        gc.collect()  # networks are full of circles
        return found

    check_flat(once)
