"""What the machine can do with the same files: cat, cp, sha256, from the page cache or with it dropped."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHUNK = 16 * 2**20


def seconds_of(name: str, files: Sequence[Path], scratch: Path) -> float:
    """Return the seconds of ``cat``, ``cp`` (into ``scratch``) or ``sha256, N threads`` over all ``files``."""
    if name == "cp":
        return _cp(files, scratch)
    started = time.perf_counter()
    if name == "cat":
        _over(["cat"], files)
    else:
        _sha256(files, threads=int(name.split()[1]))
    return time.perf_counter() - started


def _over(command: Sequence[str], files: Sequence[Path]) -> None:
    names = b"\0".join(os.fsencode(file) for file in files)
    subprocess.run(["xargs", "-0", *command], input=names, stdout=subprocess.DEVNULL, check=True)


def _cp(files: Sequence[Path], scratch: Path) -> float:
    folder = Path(tempfile.mkdtemp(prefix="cp-", dir=scratch))
    try:
        started = time.perf_counter()
        _over(["cp", "--parents", "-t", str(folder)], [file.absolute() for file in files])
        return time.perf_counter() - started
    finally:
        shutil.rmtree(folder)


def _sha256(files: Sequence[Path], threads: int) -> None:
    """Read and hash, chunk by chunk, as the engine's digests are made."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_hash, files))


def _hash(file: Path) -> str:
    whole, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, max(1, file.stat().st_size))))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            whole.update(hashlib.sha256(buffer[:count]).digest())
    return whole.hexdigest()


def drop_from_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget ``files``; what is dirty is written first. No rights are needed."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
