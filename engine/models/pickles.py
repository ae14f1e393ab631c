"""What torch says when it refuses a pickle, without its advice to load it all the same."""

from __future__ import annotations

import pickle
import re

_CAUSE = re.compile(
    r"WeightsUnpickler error: (.+?)(?:\. Please use .*)?$|^\s*(Trying to load unsupported .+?)\.?$", re.MULTILINE
)


def refusal(error: pickle.UnpicklingError) -> str:
    """Return the cause that torch.load names for a refusal under ``weights_only=True``, in one line."""
    found = _CAUSE.search(str(error))
    cause = (found.group(1) or found.group(2)) if found else "it holds more than tensors"
    return " ".join(cause.split())
