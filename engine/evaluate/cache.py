"""What ``<store>/evaluations/`` knows already: scores by artifact, settings and images. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..artifact.key import evaluation_key
from ..artifact.storage import write_atomically
from ..errors import StorageError
from .data_file import data_digest
from .settings import EvaluationSettings

FORMAT_VERSION = 1
"""Of the cached files: bumped when a figure would come out differently; part of every evaluation's key."""
_SYNTHETIC_DIGEST = hashlib.sha256(b"synthetic").hexdigest()


@dataclass(frozen=True)
class Scores:
    """The original network (before) and its compressed form (after) on the same images."""

    agreement: float
    """Fraction of the images, 0-1, that both put into the same class."""
    kl: float
    """Nats: mean of KL(softmax of the original's logits || softmax of the compressed network's)."""
    logit_sqnr_db: float | None
    """dB; None where the logits are equal (infinite)."""
    images: int
    measured_on: Literal["images", "synthetic"]
    top1_before: float | None = None
    """Per cent, like the next three; None without labels."""
    top1_after: float | None = None
    top5_before: float | None = None
    """None also where the job did not ask for top5 and where there are not more than five classes."""
    top5_after: float | None = None


class EvaluationCache:
    """The results of ``settings`` in ``store``; the images are digested once, so that all its keys speak of one set."""

    def __init__(self, store: Path, settings: EvaluationSettings) -> None:
        """Digest the images of ``settings``, if any. Raises DataError where they cannot be read."""
        self._folder, self._settings = store / "evaluations", settings
        self._digest = _SYNTHETIC_DIGEST if settings.data is None else data_digest(settings.data)
        self._ingredients = settings.ingredients() | {"format_version": FORMAT_VERSION}

    def scores(self, artifact_key: str) -> Scores | None:
        """Return what an earlier evaluation of the artifact left, None where there is none. Raises StorageError."""
        scores = _read(self._scores_file(artifact_key))
        return None if scores is None else self._as_asked(scores)

    def keep(self, artifact_key: str, scores: Scores) -> Scores:
        """Keep ``scores`` for the artifact and return what the job asked for of them. Raises StorageError."""
        content = json.dumps({"artifact": artifact_key} | asdict(scores), sort_keys=True, indent=1) + "\n"
        write_atomically(self._scores_file(artifact_key), content.encode())
        return self._as_asked(scores)

    def logits_file(self, model_key: str, device: str) -> Path:
        """Return where the original network's logits lie."""
        # Logits of a CPU and of a GPU differ in their last bits, which the ratio to the original must not see.
        ingredients = self._ingredients | {"device": device.partition(":")[0]}
        return self._folder / f"{evaluation_key(model_key, ingredients, self._digest)}.safetensors"

    def _scores_file(self, artifact_key: str) -> Path:
        return self._folder / f"{evaluation_key(artifact_key, self._ingredients, self._digest)}.json"

    def _as_asked(self, scores: Scores) -> Scores:
        """Leave out what the job did not ask for; it is measured and kept all the same."""
        return scores if self._settings.top5 else replace(scores, top5_before=None, top5_after=None)


def cached_scores(settings: EvaluationSettings, *, store: Path, artifact_key: str) -> Scores | None:
    """Return the scores that an earlier evaluation left in ``store``, None where it has to be done (again).

    Raises DataError where the images cannot be read, StorageError where the cache cannot.
    """
    return EvaluationCache(store, settings).scores(artifact_key)


def _read(file: Path) -> Scores | None:
    """Return what ``file`` holds; a file that is absent or no such record is made anew."""
    try:
        fields = json.loads(file.read_bytes())
        fields.pop("artifact", None)  # for `dfmpc gc`, which cannot tell it from the file's name
        return Scores(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror}): check the store's rights") from error
