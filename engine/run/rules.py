"""Layer rules of a job that no layer of its models answers to."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import UsageError
from ..job.schema import LayerRule
from ..report.parts import read_layers

_SHOWN = 4


def unmatched_rules(run: Path, rules: Sequence[LayerRule]) -> list[str]:
    """Return a sentence for every rule whose pattern matches no layer in the run's report.

    A task that failed has no layers there; where none has, or the report is torn, nothing is said.
    """
    names = list(dict.fromkeys(_layer_names(run))) if rules else []
    return [
        f"layers[{index}].match: {rule.match!r} matches no layer of this run, so the rule changed nothing; "
        f"layers are named {_few(names)}"
        for index, rule in enumerate(rules)
        if names and not any(fnmatchcase(name, rule.match) for name in names)
    ]


def _layer_names(run: Path) -> list[str]:
    try:
        return [row.name for row in read_layers(run)]
    except UsageError:
        return []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
