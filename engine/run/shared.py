"""What the tasks of one model share: its files read once, their digests, its key, the loaded network."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..artifact.key import TaskKey, digest_of, task_key
from ..errors import CheckpointError, DfmpcError
from ..job.sources import ModelSource
from ..job.task import Task
from ..models.factory import AllowList
from ..models.locate import input_files
from ..models.reading import FileBytes, FileDigest, digest_files, read_files

if TYPE_CHECKING:
    from torch import nn

    from ..models.load import LoadedModel

T = TypeVar("T")
Read = Callable[[ModelSource], Sequence[FileBytes]]
"""Gives the content of a source's input files, in order."""


@dataclass(frozen=True)
class Inputs:
    """The input files' digests, in order, and what built the network."""

    digests: tuple[str, ...]
    distribution: str | None
    size: int
    """Bytes of the files."""


class ModelKeys:
    """The keys of one model's tasks, from digests alone. A failure is remembered and raised again for every task."""

    def __init__(self, source: ModelSource, allow: AllowList, device: str = "cpu", threads: int = 1) -> None:
        """``device`` and ``threads`` are those of whoever computes: some recipes' keys depend on them."""
        self._source, self._allow = source, allow
        self._device, self._threads = device, threads
        self._inputs: Inputs | None = None
        self._error: DfmpcError | None = None
        self._seconds = 0.0

    def inputs(self) -> Inputs:
        """Digest the inputs; raises what finding or reading them raises."""
        if self._inputs is None:
            self._inputs = self._step(self._digest)
        return self._inputs

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
            _forget_frames(error)
            self._error = error
            raise
        finally:
            self._seconds += time.perf_counter() - started

    def _digest(self) -> Inputs:
        factory, files = self._source.factory, self._digests()
        return Inputs(
            digests=tuple(file.digest for file in files),
            distribution=self._allow.distribution_version(factory) if factory else None,
            size=sum(file.size for file in files),
        )

    def _digests(self) -> Sequence[FileDigest]:
        return digest_files(input_files(self._source))


class SharedModel(ModelKeys):
    """One model on behalf of its tasks: the bytes that were digested are the bytes that are loaded."""

    def __init__(
        self,
        source: ModelSource,
        allow: AllowList,
        device: str = "cpu",
        threads: int = 1,
        read: Read | None = None,
    ) -> None:
        """``read`` gives the files' content (None: it is read when it is wanted)."""
        super().__init__(source, allow, device, threads)
        self._read = read or _read_now
        self._files: Sequence[FileBytes] | None = None
        self._model: LoadedModel | None = None

    def model(self) -> LoadedModel:
        """Load the network and capture its graph; raises what ``load_model`` raises."""
        if self._model is None:
            self._model = self._step(self._load)
        return self._model

    def original(self) -> nn.Module:
        """Return the original network, in eval mode."""
        return self.model().module

    def _digests(self) -> Sequence[FileDigest]:
        self._files = self._read(self._source)
        return self._files

    def _load(self) -> LoadedModel:
        from ..models.load import load_model  # noqa: PLC0415 - torch comes with it, and reused tasks need neither

        digested = self.inputs().digests
        # Nothing but the tensors that view them keeps the bytes from here on.
        files, self._files = self._files, None
        if files is None:
            files = self._read(self._source)
        if tuple(file.digest for file in files) != digested:
            raise CheckpointError(f"{self._source.name}: its files were changed after they were read: run it again")
        return load_model(self._source, self._allow, files)


def _read_now(source: ModelSource) -> Sequence[FileBytes]:
    return read_files(input_files(source))


def _forget_frames(error: BaseException | None) -> None:
    """Drop the local variables that the tracebacks of ``error`` hold: a model's bytes may be among them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
