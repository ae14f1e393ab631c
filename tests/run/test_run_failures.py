"""Which class a failure is of, how often each is tried again, and how."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import pytest
import torch
from dfmpc.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    FactoryError,
    MismatchError,
    StorageError,
    TaskTimeoutError,
    UsageError,
)
from dfmpc.run.failures import RETRIES, Failure, History, Mode, Retry, classify, classify_exit


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return ``error`` as it is after ``raise error from cause``."""
    try:
        raise error from cause
    except type(error) as raised:
        return raised


def in_the_middle_of(error: Exception, first: BaseException) -> Exception:
    """Return ``error`` as it is when it was raised while ``first`` was handled."""
    try:
        try:
            raise first
        except type(first):
            raise error  # noqa: B904 - without a cause, on purpose
    except type(error) as raised:
        return raised


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def out_of_memory() -> BaseException:
    """Return what torch raises where it cannot allocate: its own text."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


EXAMPLES: dict[str, tuple[Callable[[], BaseException], Failure]] = {
    "full disk": (lambda: caused(StorageError("s"), os_error(errno.ENOSPC)), Failure.NO_SPACE),
    "used up quota": (lambda: caused(StorageError("s"), os_error(errno.EDQUOT)), Failure.NO_SPACE),
    "read-only store": (lambda: caused(StorageError("s"), os_error(errno.EROFS)), Failure.NO_SPACE),
    "bare full disk": (lambda: os_error(errno.ENOSPC), Failure.NO_SPACE),
    "full disk two causes down": (
        lambda: caused(StorageError("s"), caused(ValueError("v"), os_error(errno.ENOSPC))),
        Failure.NO_SPACE,
    ),
    "full disk while another error was handled": (
        lambda: in_the_middle_of(StorageError("s"), os_error(errno.ENOSPC)),
        Failure.NO_SPACE,
    ),
    "full disk under a model's own file": (lambda: caused(CheckpointError("c"), os_error(errno.ENOSPC)), Failure.DATA),
    "bad sector": (lambda: caused(CheckpointError("c"), os_error(errno.EIO)), Failure.IO),
    "stale handle": (lambda: caused(CheckpointError("c"), os_error(errno.ESTALE)), Failure.IO),
    "stale handle of the store": (lambda: caused(StorageError("s"), os_error(errno.ESTALE)), Failure.IO),
    "too many open files": (lambda: os_error(errno.EMFILE), Failure.IO),
    "server gone": (lambda: ConnectionResetError(errno.ECONNRESET, "reset"), Failure.IO),
    "missing file": (lambda: caused(CheckpointError("c"), os_error(errno.ENOENT)), Failure.DATA),
    "store of another user": (lambda: caused(StorageError("s"), os_error(errno.EACCES)), Failure.DATA),
    "no memory": (MemoryError, Failure.HOST_OOM),
    "no memory for a file": (lambda: caused(CheckpointError("c"), MemoryError()), Failure.HOST_OOM),
    "no memory for a fork": (lambda: os_error(errno.ENOMEM), Failure.HOST_OOM),
    "no memory, in torch's words": (out_of_memory, Failure.HOST_OOM),
    "no device memory": (
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        Failure.DEVICE_OOM,
    ),
    "no device memory behind ours": (
        lambda: caused(FactoryError("f"), torch.OutOfMemoryError("CUDA out of memory")),
        Failure.DEVICE_OOM,
    ),
    "no device memory from a library": (lambda: RuntimeError("CUDA error: out of memory"), Failure.DEVICE_OOM),
    "poisoned context": (
        lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
        Failure.POISONED,
    ),
    "poisoned by a kernel": (lambda: RuntimeError("Triton Error [CUDA]: misaligned address"), Failure.POISONED),
    "limit": (lambda: TaskTimeoutError("t"), Failure.TIMEOUT),
    "mismatch": (lambda: MismatchError("m"), Failure.DATA),
    "images": (lambda: DataError("d"), Failure.DATA),
    "usage": (lambda: UsageError("u"), Failure.DATA),
    "a model's own error": (lambda: caused(FactoryError("f"), ZeroDivisionError()), Failure.DATA),
    "bug": (ZeroDivisionError, Failure.BUG),
    "altered artifact": (lambda: ArtifactError("a"), Failure.BUG),
    "text that only resembles": (lambda: ValueError("CUDA error: out of memory"), Failure.BUG),
}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Triton Error [CUDA]: out of memory", Failure.DEVICE_OOM),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Failure.DEVICE_OOM),
        ("HIP error: out of memory\nHIP kernel errors might be reported later", Failure.DEVICE_OOM),
        ("CUDA driver error: out of memory", Failure.DEVICE_OOM),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Failure.DEVICE_OOM),
        ("in a module:\nCUDNN_STATUS_ALLOC_FAILED", Failure.DEVICE_OOM),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", Failure.POISONED),
        ("CUDA error: unspecified launch failure\nthe host is not out of memory", Failure.POISONED),
        ("HIP error: invalid device function", Failure.POISONED),
        ("the tokenizer is out of memory", Failure.BUG),
        ("CUDA is not available", Failure.BUG),
    ],
)
def test_a_library_of_a_device_says_in_its_own_words_that_memory_is_out(said: str, expected: Failure) -> None:
    assert classify(RuntimeError(said)) is expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_exception_is_of_the_class_that_its_causes_say(name: str) -> None:
    make, expected = EXAMPLES[name]
    assert classify(make()) is expected


def test_what_was_said_not_to_be_a_cause_is_none() -> None:
    error = in_the_middle_of(StorageError("s"), os_error(errno.ENOSPC))
    error.__suppress_context__ = True  # as ``raise error from None`` has it
    assert classify(error) is Failure.DATA


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-signal.SIGKILL, Failure.HOST_OOM),
        (-signal.SIGSEGV, Failure.CRASH),
        (-signal.SIGABRT, Failure.CRASH),
        (-signal.SIGTERM, Failure.CRASH),
        (0, Failure.CRASH),
        (71, Failure.CRASH),
    ],
)
def test_an_exit_code_is_a_crash_or_want_of_memory(code: int, expected: Failure) -> None:
    assert classify_exit(code) is expected


def retries(failure: Failure, *, cpu_fallback: bool = True) -> list[Retry | None]:
    """Return what follows from ``failure`` again and again, up to the first time that nothing does."""
    history, found = History(), []
    while not found or found[-1] is not None:
        found.append(history.after(failure, cpu_fallback=cpu_fallback))
    return found


SMALLER, SMALLER_ALONE = Mode(divisor=8), Mode(divisor=8, alone=True)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failure.DATA, []),
        (Failure.TIMEOUT, []),
        (Failure.BUG, []),
        (Failure.NO_SPACE, []),
        (Failure.CRASH, [Retry(Mode())]),
        (Failure.STUCK, [Retry(Mode())]),
        (Failure.HOST_OOM, [Retry(Mode(alone=True))]),
        (Failure.POISONED, [Retry(Mode(), elsewhere=True)]),
        (Failure.IO, [Retry(Mode(), 1.0), Retry(Mode(), 4.0), Retry(Mode(), 16.0)]),
        (Failure.DEVICE_OOM, [Retry(SMALLER), Retry(SMALLER_ALONE), Retry(Mode(on_cpu=True))]),
    ],
)
def test_every_class_has_a_budget_and_a_way_of_its_own(failure: Failure, expected: list[Retry]) -> None:
    assert retries(failure) == [*expected, None]
    assert len(expected) == RETRIES[failure]


def test_the_cpu_is_tried_only_where_the_job_says_so() -> None:
    assert retries(Failure.DEVICE_OOM, cpu_fallback=False) == [Retry(SMALLER), Retry(SMALLER_ALONE), None]


def test_budgets_do_not_touch_each_other_and_what_was_learnt_stays() -> None:
    history = History()
    assert history.after(Failure.HOST_OOM, cpu_fallback=False) == Retry(Mode(alone=True))
    assert history.after(Failure.IO, cpu_fallback=False) == Retry(Mode(alone=True), 1.0)
    assert history.after(Failure.CRASH, cpu_fallback=False) == Retry(Mode(alone=True))
    assert history.after(Failure.IO, cpu_fallback=False) == Retry(Mode(alone=True), 4.0)
    assert history.after(Failure.HOST_OOM, cpu_fallback=False) is None
    assert history.counts == {Failure.HOST_OOM: 2, Failure.IO: 2, Failure.CRASH: 1}


def test_one_who_is_suspected_is_tried_alone_at_no_cost() -> None:
    history = History()
    history.suspect()
    assert (history.mode, history.counts) == (Mode(alone=True), {})
    assert history.after(Failure.CRASH, cpu_fallback=False) == Retry(Mode(alone=True))
    assert history.after(Failure.CRASH, cpu_fallback=False) is None


@pytest.mark.parametrize(
    ("retry", "words"),
    [
        (Retry(Mode()), "once more"),
        (Retry(Mode(), 4.0), "after 4 s"),
        (Retry(SMALLER_ALONE), "alone, with smaller batches"),
        (Retry(Mode(on_cpu=True)), "on the CPU"),
        (Retry(Mode(), elsewhere=True), "on another device"),
    ],
)
def test_a_retry_says_how(retry: Retry, words: str) -> None:
    assert retry.in_words == words


def test_a_mode_computes_on_its_workers_device_or_on_the_cpu() -> None:
    assert (Mode().device("cuda:1"), Mode(on_cpu=True).device("cuda:1")) == ("cuda:1", "cpu")
