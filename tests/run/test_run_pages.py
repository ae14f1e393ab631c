from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from dfmpc.job.sources import ModelSource
from dfmpc.run.worker.pages import PagePool
from dfmpc.run.worker.prefetch import Prefetcher

MIB = 2**20


def address(data: memoryview) -> int:
    return torch.frombuffer(data, dtype=torch.uint8).data_ptr()


def test_memory_is_used_again_once_nothing_looks_at_it() -> None:
    pool = PagePool(limit_bytes=64 * MIB)
    first = pool(5 * MIB)
    place = address(first)
    assert place % 4096 == 0
    assert (len(first), first.readonly, pool.bytes_kept) == (5 * MIB, False, 0)
    del first
    assert pool.bytes_kept == 6 * MIB
    second = pool(4 * MIB)
    assert address(second) == place
    assert pool.bytes_kept == 0


VIEWS = {
    "slice": lambda data: data[10:14],
    "cast": lambda data: data.cast("c")[10:14],
    "tensor": lambda data: torch.frombuffer(data, dtype=torch.uint8, offset=10, count=4),
    "slice of a tensor": lambda data: torch.frombuffer(data, dtype=torch.uint8)[10:14],
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_view_keeps_the_memory_out_of_the_pool(view: str) -> None:
    pool = PagePool(limit_bytes=64 * MIB)
    data = pool(2 * MIB)
    data[10:14] = b"abcd"
    kept = VIEWS[view](data)
    del data
    assert pool.bytes_kept == 0
    pool(2 * MIB)[:] = bytes(2 * MIB)
    found = bytes(kept.tolist()) if isinstance(kept, torch.Tensor) else bytes(kept)
    assert found == b"abcd"
    assert pool.bytes_kept == 2 * MIB
    del kept
    assert pool.bytes_kept == 4 * MIB


def test_a_small_file_does_not_take_a_large_block() -> None:
    pool = PagePool(limit_bytes=64 * MIB)
    pool(32 * MIB)
    small = pool(100)
    assert pool.bytes_kept == 32 * MIB
    medium = pool(16 * MIB)
    assert pool.bytes_kept == 0
    assert (len(small), len(medium)) == (100, 16 * MIB)


def test_what_is_kept_and_what_is_given_stay_within_the_limit() -> None:
    pool = PagePool(limit_bytes=10 * MIB)
    blocks = [pool(4 * MIB) for _ in range(4)]
    while blocks:
        blocks.pop()
        given = 4 * MIB * len(blocks)
        assert pool.bytes_kept + given <= max(10 * MIB, given)
    assert pool.bytes_kept == 8 * MIB
    held = pool(10 * MIB)
    assert pool.bytes_kept == 0
    pool.clear()
    del held
    assert pool.bytes_kept == 0


def until_none_is_held(prefetcher: Prefetcher) -> None:
    """The thread that read a file may hold it for a moment longer than whoever took it."""
    end = time.monotonic() + 30
    while prefetcher.bytes_held:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_night_of_models_through_the_same_pages_gives_each_its_own_bytes(tmp_path: Path) -> None:
    chance, prefetcher = random.Random(0), Prefetcher(threads=2, limit_bytes=8 * MIB)
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes(chance.randbytes(chance.choice([0, 1000, MIB, 3 * MIB])))
    sources = [ModelSource(name=file.stem, factory="a:b", checkpoint=str(file), input=[1]) for file in files]
    for file, source, after in zip(files, sources, [*sources[1:], None], strict=True):
        found = prefetcher.take(source)
        if after is not None:
            prefetcher.want(after)
        assert bytes(found[0].data) == file.read_bytes()
        del found
    assert prefetcher.bytes_read == sum(file.stat().st_size for file in files)
    until_none_is_held(prefetcher)
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
