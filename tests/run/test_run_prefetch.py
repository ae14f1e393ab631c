from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dfmpc.errors import CheckpointError
from dfmpc.job.sources import ModelSource
from dfmpc.models.reading import digest_files
from dfmpc.run.worker.prefetch import Prefetcher

SIZE = 100_000


@pytest.fixture
def sources(tmp_path: Path) -> list[ModelSource]:
    """Return three models of one file of SIZE bytes each."""
    made = []
    for name in "abc":
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(name.encode() * SIZE)
        made.append(ModelSource(name=name, factory="nets:net", checkpoint=str(file), input=[1]))
    return made


@pytest.fixture
def prefetcher() -> Iterator[Prefetcher]:
    made = Prefetcher(threads=2, limit_bytes=2 * SIZE)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds; fail after half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def path_of(source: ModelSource) -> Path:
    return Path(str(source.checkpoint))


def content(source: ModelSource) -> bytes:
    return path_of(source).read_bytes()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Gate:
    """Memory that is given only once the gate is open."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __call__(self, size: int) -> memoryview:
        self.asked.set()
        assert self.open.wait(30)
        return memoryview(bytearray(size))


def test_what_is_read_ahead_is_read_once(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    prefetcher.want(sources[0])
    prefetcher.want(sources[0])
    until(lambda: prefetcher.bytes_read == SIZE)
    path = path_of(sources[0])
    digest = digest_files([path])[0].digest
    files = prefetcher.take(sources[0])
    path.unlink()
    assert [file.path for file in files] == [path]
    assert bytes(files[0].data) == b"a" * SIZE
    assert files[0].digest == digest
    assert prefetcher.bytes_read == prefetcher.bytes_held == SIZE
    prefetcher.want(sources[0])  # it is in use
    until(lambda: not prefetcher.reads)
    assert prefetcher.bytes_read == SIZE


def test_what_was_never_wanted_is_read_when_it_is_taken(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    assert [bytes(prefetcher.take(source)[0].data) for source in sources] == [content(source) for source in sources]
    assert prefetcher.bytes_read == 3 * SIZE
    assert prefetcher.bytes_held == 0


def test_the_next_model_waits_for_room(sources: list[ModelSource]) -> None:
    order: list[str] = []

    def allocate(size: int) -> memoryview:
        order.append("read")
        return memoryview(bytearray(size))

    prefetcher = Prefetcher(threads=1, limit_bytes=2 * SIZE - 1, allocate=allocate)
    files = prefetcher.take(sources[0])
    tensor = torch.frombuffer(files[0].data, dtype=torch.uint8)[:10]
    weakref.finalize(files[0].data, order.append, "gone")
    prefetcher.want(sources[1])
    del files
    assert prefetcher.bytes_held == SIZE  # the tensor is a view
    assert tensor.tolist() == [97] * 10
    del tensor
    until(lambda: prefetcher.bytes_read == 2 * SIZE)
    assert order == ["read", "gone", "read"]
    assert bytes(prefetcher.take(sources[1])[0].data) == content(sources[1])
    assert order == ["read", "gone", "read"]


@pytest.mark.parametrize("limit", [0, SIZE - 1, 2 * SIZE - 1])
def test_without_room_it_is_read_when_it_is_taken(sources: list[ModelSource], limit: int) -> None:
    prefetcher = Prefetcher(threads=1, limit_bytes=limit)
    held = prefetcher.take(sources[0])
    prefetcher.want(sources[1])
    assert bytes(prefetcher.take(sources[1])[0].data) == content(sources[1])
    assert bytes(held[0].data) == content(sources[0])
    assert prefetcher.bytes_read == 2 * SIZE


def test_an_error_belongs_to_the_model_that_has_it(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    path_of(sources[0]).unlink()
    prefetcher.want(sources[0])
    assert bytes(prefetcher.take(sources[1])[0].data) == content(sources[1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no such file"):
        prefetcher.take(sources[0])
    path_of(sources[0]).write_bytes(b"back")
    assert bytes(prefetcher.take(sources[0])[0].data) == b"back"


def test_without_memory_ahead_it_is_read_when_it_is_taken(sources: list[ModelSource]) -> None:
    asked: list[int] = []

    def allocate(size: int) -> memoryview:
        asked.append(size)
        if len(asked) == 1:
            raise MemoryError
        return memoryview(bytearray(size))

    prefetcher = Prefetcher(threads=1, limit_bytes=2 * SIZE, allocate=allocate)
    prefetcher.want(sources[0])
    until(lambda: asked == [SIZE])
    files = prefetcher.take(sources[0])
    assert bytes(files[0].data) == content(sources[0])
    assert asked == [SIZE, SIZE]
    assert prefetcher.bytes_held == SIZE


@pytest.mark.parametrize("how", ["want another", "keep another", "close"])
def test_what_is_wanted_no_longer_is_let_go(sources: list[ModelSource], how: str) -> None:
    gate = Gate()
    prefetcher = Prefetcher(threads=1, limit_bytes=3 * SIZE, allocate=gate)
    prefetcher.want(sources[0])
    assert gate.asked.wait(30)
    assert prefetcher.bytes_held == SIZE
    if how == "want another":
        prefetcher.want(sources[1])
    elif how == "keep another":
        prefetcher.keep_only(sources[1])
    else:
        threading.Timer(0.01, gate.open.set).start()
        prefetcher.close()
        prefetcher.want(sources[1])
    gate.open.set()
    until(lambda: not prefetcher.reads)
    assert prefetcher.bytes_held == (SIZE if how == "want another" else 0)
    assert bytes(prefetcher.take(sources[0])[0].data) == content(sources[0])


def test_what_is_about_to_be_taken_is_kept(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    prefetcher.want(sources[0])
    prefetcher.keep_only(sources[0])
    until(lambda: not prefetcher.reads)
    read = prefetcher.bytes_read
    assert bytes(prefetcher.take(sources[0])[0].data) == content(sources[0])
    assert prefetcher.bytes_read == read == SIZE


def test_what_is_needed_now_goes_before_what_is_read_ahead(sources: list[ModelSource]) -> None:
    prefetcher = Prefetcher(threads=1, limit_bytes=2 * SIZE)
    held = [prefetcher.take(sources[0])]
    prefetcher.want(sources[1])
    until(lambda: prefetcher.bytes_read == 2 * SIZE)
    held.append(prefetcher.take(sources[2]))
    assert bytes(held[1][0].data) == content(sources[2])
    until(lambda: prefetcher.bytes_held == 2 * SIZE)
    assert bytes(prefetcher.take(sources[1])[0].data) == content(sources[1])
    assert prefetcher.bytes_read == 4 * SIZE


def test_one_thread_reads_one_model_after_the_other(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    before, seen = set(readers()), set()
    for source in [*sources, *sources]:
        prefetcher.want(source)
        assert bytes(prefetcher.take(source)[0].data) == content(source)
        seen |= set(readers()) - before
    assert len(seen) == 1
    prefetcher.close()
    (reader,) = seen
    reader.join(30)
    assert not reader.is_alive()


def test_a_file_that_does_not_come_keeps_no_other_waiting(sources: list[ModelSource]) -> None:
    gate, asked = Gate(), 0

    def first_hangs(size: int) -> memoryview:
        nonlocal asked
        asked += 1
        return gate(size) if asked == 1 else memoryview(bytearray(size))

    prefetcher = Prefetcher(threads=1, limit_bytes=3 * SIZE, allocate=first_hangs)
    before = set(readers())
    prefetcher.want(sources[0])
    assert gate.asked.wait(30)
    prefetcher.want(sources[1])
    assert bytes(prefetcher.take(sources[1])[0].data) == content(sources[1])
    gate.open.set()
    until(lambda: len(set(readers()) - before) == 1)  # one is enough from here on
    prefetcher.close()
    until(lambda: not set(readers()) - before)


def test_a_thread_that_waits_holds_nothing(prefetcher: Prefetcher, sources: list[ModelSource]) -> None:
    prefetcher.want(sources[0])
    until(lambda: prefetcher.bytes_read == SIZE and not prefetcher.reads)
    prefetcher.keep_only(None)
    until(lambda: prefetcher.bytes_held == 0)
