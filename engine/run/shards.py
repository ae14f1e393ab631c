"""Which part of a run's tasks a command does: shard I of N, by the models' frozen sizes, without any coordination."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UsageError

INDEXED = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in every pod of an Indexed Job."""
ARRAY = "SLURM_ARRAY_TASK_ID"
"""Set by Slurm in every element of an array."""
COUNT = "DFMPC_SHARDS"
"""How many shards there are, where ``--shard auto`` cannot know."""
_EXPECTED = "I/N with I from 0 to N-1 (0/4, 1/4, 2/4, 3/4), auto, or auto/N"


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``."""

    index: int
    count: int

    def __str__(self) -> str:
        """Return I/N."""
        return f"{self.index}/{self.count}"


def parse_shard(text: str, env: Mapping[str, str]) -> Shard:
    """Return the shard that ``text`` names: I/N, or auto or auto/N, which take I from Slurm's or Kubernetes' variables.

    ``auto`` counts the elements of a Slurm array from its first; where N is given (or DFMPC_SHARDS set) and the array
    has another number of elements, as when single ones are submitted again, an element's number is its I. Raises
    UsageError that names what is missing or out of range.
    """
    if match := re.fullmatch(r"auto(?:/(\d{1,9}))?", text):
        return _from_environment(text, match[1], env)
    if match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text):
        return _checked(int(match[1]), int(match[2]), f"--shard {text}")
    raise UsageError(f"--shard {text!r} is no shard: give {_EXPECTED}")


def _checked(index: int, count: int, seen: str) -> Shard:
    if 0 <= index < count:
        return Shard(index, count)
    raise UsageError(f"{seen} is out of range ({index} of {count}): give {_EXPECTED}")


def _from_environment(text: str, given: str | None, env: Mapping[str, str]) -> Shard:
    count = int(given) if given else _number(env, COUNT)
    if ARRAY in env:
        return _from_slurm(text, count, env)
    if INDEXED not in env:
        raise UsageError(f"--shard {text}: neither {ARRAY} nor {INDEXED} is set: run it in an array, or give I/N")
    if count is None:
        raise UsageError(
            f"--shard {text}: {INDEXED} does not tell how many shards there are: give auto/N or set {COUNT}"
        )
    index = _number(env, INDEXED) or 0
    return _checked(index, count, f"--shard {text} with {INDEXED}={index}")


def _from_slurm(text: str, count: int | None, env: Mapping[str, str]) -> Shard:
    number, elements = _number(env, ARRAY) or 0, _number(env, "SLURM_ARRAY_TASK_COUNT")
    if count is None and elements is None:
        raise UsageError(f"--shard {text}: SLURM_ARRAY_TASK_COUNT is not set: give auto/N or set {COUNT}")
    seen = f"--shard {text} with {ARRAY}={number}"
    if elements is None or (count is not None and count != elements):
        return _checked(number, count or 0, seen)
    first, step = _number(env, "SLURM_ARRAY_TASK_MIN") or 0, _number(env, "SLURM_ARRAY_TASK_STEP") or 1
    if (number - first) % step:
        raise UsageError(
            f"{seen} is not {first} plus a multiple of {step}: use a regular array such as 0-{elements - 1}"
        )
    return _checked((number - first) // step, elements, seen)


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise UsageError(f"{name}={value!r} is no number: unset it, or give --shard I/N")
    return int(value)


def array_note(env: Mapping[str, str]) -> str | None:
    """Return what to say where a command without --shard runs in an array, None elsewhere.

    It does everything: an array over job files is as common as one over shards, so a part is taken only on request.
    """
    name = next((name for name in (ARRAY, INDEXED) if name in env), None)
    if name is None:
        return None
    return f"{name}={env[name]}, but no --shard is given: this does all tasks; --shard auto does this element's part"


def assign(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return the shard (0 … count-1) of every model in ``sizes`` (bytes by name): the same wherever it is computed.

    The largest model comes first, by name where sizes are equal; each goes to the shard with the fewest bytes, then the
    fewest models, then the lowest number. So no two shards differ by more than the largest model.
    """
    loads = [(0, 0, shard) for shard in range(count)]
    owner = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, models, shard = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, models + 1, shard))
        owner[name] = shard
    return owner


def models_of(shard: Shard, models: Iterable[str], sizes: Mapping[str, int]) -> frozenset[str]:
    """Return which of ``models``, a run's whole list, are the shard's; a size that is not known counts as 0 bytes."""
    owner = assign({name: sizes.get(name, 0) for name in models}, shard.count)
    return frozenset(name for name, index in owner.items() if index == shard.index)
