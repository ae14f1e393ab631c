"""The peak that is told of an attempt is the attempt's own, in whichever process it runs."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection

import pytest
from dfmpc.run.worker.memory import peak_bytes, reset_peak

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak begin anew")


def _touch(size: int) -> None:
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])


def _peaks(answer: Connection) -> None:
    reset_peak()
    before = peak_bytes()
    _touch(200 * MIB)
    after = peak_bytes()
    reset_peak()
    answer.send((before, after, peak_bytes()))


def test_a_peak_counts_from_where_it_was_reset_in_a_forked_process_too() -> None:
    reset_peak()
    own = peak_bytes()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_peaks, args=(theirs,))
    child.start()
    before, after, again = ours.recv()
    child.join()
    assert after - before > 150 * MIB
    assert after - again > 150 * MIB
    assert peak_bytes() - own < 150 * MIB, "the child has files of its own"
