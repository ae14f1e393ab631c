"""What kinds of failure there are, how often a task may have each, and what follows from one (docs/engine.md)."""

from __future__ import annotations

import errno
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ..errors import DataError, ModelError, StorageError, TaskTimeoutError, UsageError


class Failure(StrEnum):
    """Classes of failure; each has a budget of its own in ``RETRIES``."""

    DATA = "data"
    DEVICE_OOM = "device-oom"
    HOST_OOM = "host-oom"
    CRASH = "crash"
    POISONED = "poisoned"
    STUCK = "stuck"
    TIMEOUT = "timeout"
    IO = "io"
    NO_SPACE = "no-space"
    BUG = "bug"


RETRIES = {
    Failure.DATA: 0,
    Failure.DEVICE_OOM: 3,
    Failure.HOST_OOM: 1,
    Failure.CRASH: 1,
    Failure.POISONED: 1,
    Failure.STUCK: 1,
    Failure.TIMEOUT: 0,
    Failure.IO: 3,
    Failure.NO_SPACE: 0,
    Failure.BUG: 0,
}
"""How often a task is tried again after a failure of each class."""
BACKOFF_S = (1.0, 4.0, 16.0)
"""Seconds before the first, second and third retry after a failure of input or output."""
SMALL = 8
"""What batches are divided by after a device ran out of memory."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENFILE,
    errno.EMFILE,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.ENOLCK,
}
"""What a file system may say today and not tomorrow."""
_NO_HOST_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_NO_DEVICE_MEMORY = re.compile(
    r"\b(cuda|cublas|cudnn|cusolver|cusparse|cufft|hip|miopen|triton).*(out of memory|ALLOC_FAILED)",
    re.IGNORECASE,
)
"""Within one line, as the libraries of a device say it; torch's own allocator raises OutOfMemoryError instead."""
_STICKING = ("CUDA error", "Triton Error", "HIP error")


@dataclass(frozen=True)
class Mode:
    """How an attempt is made: with batches divided by ``divisor``, ``alone``, on the CPU instead of the device."""

    divisor: int = 1
    alone: bool = False
    on_cpu: bool = False

    def device(self, name: str) -> str:
        """Return the device that computes where ``name`` is the worker's."""
        return "cpu" if self.on_cpu else name


@dataclass(frozen=True)
class Retry:
    """Try again: how, not before so many seconds have passed, and not on the same device where there is another."""

    mode: Mode
    after_s: float = 0.0
    elsewhere: bool = False

    @property
    def in_words(self) -> str:
        """The way in which it is tried again, such as ``alone, with smaller batches``."""
        said = {
            "on the CPU": self.mode.on_cpu,
            "alone": self.mode.alone,
            "with smaller batches": self.mode.divisor > 1,
            f"after {self.after_s:g} s": self.after_s > 0,
            "on another device": self.elsewhere,
        }
        return ", ".join(text for text, holds in said.items() if holds) or "once more"


@dataclass
class History:
    """The failures that one task has had in this run."""

    mode: Mode = field(default_factory=Mode)
    counts: Counter[Failure] = field(default_factory=Counter)

    def suspect(self) -> None:
        """Have it tried alone, at no cost: it was one of several at which a worker ended."""
        self.mode = replace(self.mode, alone=True)

    def after(self, failure: Failure, *, cpu_fallback: bool) -> Retry | None:
        """Count ``failure``; return how to try again, or None where its budget is spent."""
        self.counts[failure] += 1
        nth = self.counts[failure]
        if nth > RETRIES[failure] or (failure is Failure.DEVICE_OOM and nth == RETRIES[failure] and not cpu_fallback):
            return None
        self.mode = _next_mode(self.mode, failure, nth)
        return Retry(
            self.mode, BACKOFF_S[nth - 1] if failure is Failure.IO else 0.0, elsewhere=failure is Failure.POISONED
        )


def _next_mode(mode: Mode, failure: Failure, nth: int) -> Mode:
    if failure is Failure.HOST_OOM:
        return replace(mode, alone=True)
    if failure is Failure.DEVICE_OOM:
        return (Mode(divisor=SMALL), Mode(divisor=SMALL, alone=True), Mode(on_cpu=True))[nth - 1]
    return mode


def classify(error: BaseException) -> Failure:
    """Return the class of an exception that ended an attempt, by its cause where it has one."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _FULL and isinstance(error, StorageError | OSError):
            return Failure.NO_SPACE
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return Failure.IO
        if isinstance(cause, MemoryError) or _says(cause, _NO_HOST_MEMORY) or _is_errno(cause, errno.ENOMEM):
            return Failure.HOST_OOM
        if type(cause).__name__ == "OutOfMemoryError" or _is_full_device(cause):
            return Failure.DEVICE_OOM
        if _says(cause, _STICKING):
            return Failure.POISONED
    if isinstance(error, TaskTimeoutError):
        return Failure.TIMEOUT
    return Failure.DATA if isinstance(error, ModelError | DataError | UsageError | StorageError) else Failure.BUG


def full_disk(error: BaseException) -> str:
    """Return what the system said where a disk or a quota that is full is behind ``error``, else nothing."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return cause.strerror or str(cause)
    return ""


def classify_exit(code: int) -> Failure:
    """Return the class of a worker's end by its exit code (negative: the signal). SIGKILL is mostly want of memory."""
    return Failure.HOST_OOM if code == -signal.SIGKILL else Failure.CRASH


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _is_full_device(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _NO_DEVICE_MEMORY.search(str(error)) is not None


def _is_errno(error: BaseException, number: int) -> bool:
    return isinstance(error, OSError) and error.errno == number
