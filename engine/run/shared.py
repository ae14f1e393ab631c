"""What the tasks of one model share: digests of its inputs, the loaded network, its key; each found once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..artifact.key import TaskKey, digest_of, task_key
from ..errors import CheckpointError, DfmpcError
from ..job.expand import ModelSource, Task
from ..models.digest import tree_digest
from ..models.factory import AllowList
from ..models.load import LoadedModel, input_files, load_model

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """The input files' digests, in order, and what built the network."""

    digests: tuple[str, ...]
    distribution: str | None
    size: int
    """Bytes of the files."""
    states: tuple[tuple[int, int], ...]
    """Size and time of change (ns) of each file when it was digested."""


class SharedModel:
    """One model on behalf of its tasks. A failure is remembered and raised again for every task."""

    def __init__(self, source: ModelSource, allow: AllowList, device: str = "cpu", threads: int = 1) -> None:
        """``device`` and ``threads`` are those of whoever computes: some recipes' keys depend on them."""
        self._source, self._allow = source, allow
        self._device, self._threads = device, threads
        self._inputs: Inputs | None = None
        self._model: LoadedModel | None = None
        self._error: DfmpcError | None = None
        self._seconds = 0.0

    def inputs(self) -> Inputs:
        """Digest the inputs; raises what finding or reading them raises."""
        if self._inputs is None:
            self._inputs = self._step(self._digest)
        return self._inputs

    def model(self) -> LoadedModel:
        """Load the network and capture its graph; raises what ``load_model`` raises."""
        if self._model is None:
            self._model = self._step(self._load)
        return self._model

    def original(self) -> nn.Module:
        """Return the original network, in eval mode."""
        return self.model().module

    def key(self, task: Task) -> TaskKey:
        """Return the key of ``task``."""
        inputs = self.inputs()
        return task_key(
            task, inputs.digests, distribution=inputs.distribution, device=self._device, threads=self._threads
        )

    def model_key(self) -> str:
        """Return a digest of what makes the original network, for the cache of its logits."""
        inputs, source = (
            self.inputs(),
            self._source.model_dump(mode="json", include={"factory", "args", "kwargs", "input"}),
        )
        return digest_of({**source, "digests": list(inputs.digests), "distribution": inputs.distribution})

    def take_seconds(self) -> float:
        """Return the seconds spent here since the last call: they belong to the task that caused them."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _step(self, action: Callable[[], T]) -> T:
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        try:
            return action()
        except DfmpcError as error:
            self._error = error
            raise
        finally:
            self._seconds += time.perf_counter() - started

    def _digest(self) -> Inputs:
        factory, files = self._source.factory, input_files(self._source)
        states = _states(files)
        return Inputs(
            digests=tuple(tree_digest(file) for file in files),
            distribution=self._allow.distribution_version(factory) if factory else None,
            size=sum(size for size, _ in states),
            states=states,
        )

    def _load(self) -> LoadedModel:
        digested = self.inputs().states
        model = load_model(self._source, self._allow)
        if _states(input_files(self._source)) != digested:
            raise CheckpointError(
                f"{self._source.name}: its files were changed while they were read: run the job again"
            )
        return model


def _states(files: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return tuple((state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files))
