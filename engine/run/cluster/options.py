"""What a run asks of a cluster, checked: the same for every kind of cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import UsageError

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MARGIN_S = 30
"""Time beyond the grace that the cluster leaves a run to end in order, in seconds."""


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim and where its pods see it."""

    claim: str
    mount: str


@dataclass(frozen=True)
class Request:
    """A run of ``shards`` parts, and what each part gets."""

    job: str
    """The job file, as the machines that run it see it."""
    name: str
    """The job's name, any text."""
    folder: str
    """The folder that the run starts in; the job's ``output`` is relative to it."""
    command: tuple[str, ...] = ("dfmpc",)
    """How dfmpc is started."""
    run_options: tuple[str, ...] = ()
    """Options of ``dfmpc run`` beside those that follow from this request."""
    shards: int = 1
    gpus: int = 1
    cpus: int = 8
    memory: str = "32G"
    """A number with K, M, G or T, which are powers of 1024 bytes."""
    time: str = "08:00:00"
    """[D-]HH:MM:SS."""
    grace_s: int = 90
    """How long what is at work may take once the cluster asks for the machine."""
    requeues: int = 3

    def __post_init__(self) -> None:
        """Check what is text; UsageError."""
        if not re.fullmatch(r"[1-9]\d*[KMGT]", self.memory):
            raise UsageError(f"--memory {self.memory!r}: give a number with K, M, G or T, such as 32G")
        if not re.fullmatch(r"(\d+-)?\d+:[0-5]\d:[0-5]\d", self.time) or self.seconds == 0:
            raise UsageError(f"--time {self.time!r}: give HH:MM:SS or D-HH:MM:SS, such as 08:00:00")
        least = 2 * (self.grace_s + MARGIN_S)
        if self.seconds < least:
            raise UsageError(f"--time {self.time}: at least {least} s are needed with --grace {self.grace_s}")

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    @property
    def memory_bytes(self) -> int:
        """The memory of a part in bytes."""
        return int(self.memory[:-1]) * _UNITS[self.memory[-1]]

    def run_command(self) -> list[str]:
        """Return the words of the command that does one part; which one, it reads from the cluster's variables."""
        own = ["--shard", f"auto/{self.shards}", "--grace", str(self.grace_s), "--deadline", "auto"]
        return [*self.command, "run", *own, *self.run_options, "--", self.job]


def plain_name(text: str, most: int) -> str:
    """Return ``text`` as lower-case letters, digits and single dashes, ``most`` characters or fewer; never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].rstrip("-") or "job"


def parse_volume(text: str) -> Volume:
    """Return the volume that ``NAME:/MOUNT`` names; UsageError where that is not its form."""
    match = re.fullmatch(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?):(/[^:\n]*)", text)
    if match is None:
        raise UsageError(f"--pvc {text!r}: give NAME:/MOUNT, such as models:/data")
    return Volume(match[1], match[3])
