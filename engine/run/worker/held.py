"""The model that a process keeps from one task to the next, and what it lets go of in between."""

from __future__ import annotations

import sys

from ...job.sources import ModelSource
from ...models.factory import AllowList
from ..failures import Failure, Mode
from ..messages import WorkerSettings
from ..shared import Read, SharedModel
from .caches import let_go
from .prefetch import Prefetcher

_KEPT = 16
_LARGE = 64 * 2**20
"""Networks, or bytes of inputs still held, after which a process lets go of what it keeps: that takes 30 ms."""
_LASTING = frozenset({None, Failure.DATA, Failure.BUG})
"""After these what is known of the model stays: another attempt would find the same."""


class HeldModel:
    """One model at a time, shared by its tasks as long as they come in one way of trying."""

    def __init__(self, settings: WorkerSettings, prefetcher: Prefetcher, read: Read | None = None) -> None:
        """``read`` gives the files' content (None: the prefetcher)."""
        self._settings, self._prefetcher = settings, prefetcher
        self._read = read or prefetcher.take
        self._allow = AllowList.default(settings.allow_code)
        self._held: tuple[ModelSource, Mode, SharedModel] | None = None
        self._kept = 0

    def of(self, source: ModelSource, mode: Mode) -> SharedModel:
        """Return what the tasks of ``source`` share, in place of what was kept where that is another's."""
        if self._held is not None and self._held[:2] == (source, mode):
            return self._held[2]
        self.forget()
        device, threads = mode.device(self._settings.computes_on), self._settings.threads
        shared = SharedModel(source, self._allow, device, threads, read=self._read)
        self._held = source, mode, shared
        return shared

    def settle(self, failure: Failure | None) -> None:
        """Forget the model after an attempt that ended with ``failure``, unless another one would find the same."""
        if failure not in _LASTING:
            self.forget()

    def forget(self) -> None:
        """Keep no model, and now and then nothing of those before it."""
        self._held = None
        torch = sys.modules.get("torch")
        if torch is None:
            return
        self._kept += 1
        if self._kept >= _KEPT or self._prefetcher.bytes_held >= _LARGE:
            self._kept = 0
            let_go()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
