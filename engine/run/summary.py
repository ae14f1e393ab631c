"""What a command asks of a run, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..report.rows import ModelRow
from .shards import Shard
from .vanished import Vanished


@dataclass(frozen=True)
class RunOptions:
    """What a command line adds to a job file."""

    only: str | None = None
    """fnmatch pattern over task ids (MODEL/PLAN)."""
    retry_failed: bool = False
    devices: str | None = None
    """Replaces resources.devices: auto, cpu, cuda or names separated by commas."""
    allow_code: tuple[str, ...] = ()
    """Module prefixes or folders added to the allow-list of factories."""
    progress: bool = True
    explain: bool = False
    """Collect why tasks were not reused."""
    shard: Shard | None = None
    """Do this part of the list only."""
    grace_s: float = 20.0
    """Seconds that tasks at work may go on after a signal or before the deadline."""
    deadline: str | None = None
    """When the run has to be over: a duration, a time, or auto (the end of the Slurm job)."""
    executor: Literal["local", "ray"] = "local"
    """Who runs the tasks: processes of this machine, or a Ray cluster."""
    ray_address: str = "auto"
    """HOST:PORT of the Ray cluster's head, or auto: the one that this machine is a node of."""
    preflight: bool = True
    """Refuse to start where the artifacts may not fit on the disk."""
    metrics: Path | None = None
    """A file for Prometheus's textfile collector."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. ``exit_code``: 0 all done or reused, 3 failed tasks or a closed gate, 75 interrupted."""

    run: Path
    rows: list[ModelRow]
    exit_code: int
    explanations: list[str] = field(default_factory=list)
    resumed: bool = False
    unmatched: list[str] = field(default_factory=list)
    """The layer rules that match no layer, a sentence each; they were said on stderr too."""
    log_tails: dict[str, list[str]] = field(default_factory=dict)
    """The last lines of the logs of the tasks that failed now, by task id."""
    stopped: str = ""
    """Why tasks are left, in words; empty where none is."""
    published: list[str] = field(default_factory=list)
    """Tasks whose ``latest`` pointer this command moved to what they left."""
    unpublished: str = ""
    """Why pointers or MLflow versions are missing, which gives exit code 3; a closed gate is no such reason."""
    registered: list[str] = field(default_factory=list)
    """MLflow versions that this command made, NAME/NUMBER."""
    vanished: Vanished = field(default_factory=Vanished)
    """Models of the job's previous finished run that are gone."""
