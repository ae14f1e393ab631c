"""The figures of bench_run.py and their table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from run_measuring import PHASES, Memory, RunFigures

BUSY = 0.3
"""Cores that others use above which times are not worth quoting."""


@dataclass(frozen=True)
class Machine:
    """Where and when. ``load`` is the load average of the last minute before the bench began."""

    processor: str
    cores: int
    memory_gib: float
    date: str
    python: str
    torch: str
    dfmpc: str
    load: float


@dataclass(frozen=True)
class Yardstick:
    """Another command over the same files; seconds of every repetition."""

    name: str
    seconds: list[float]


@dataclass(frozen=True)
class CaseRuns:
    """The runs of one case: in a fresh store, and again where everything is reused."""

    label: str
    workers: int
    dropped: bool
    cold: list[RunFigures]
    warm: list[RunFigures]


@dataclass(frozen=True)
class Bench:
    """Everything that was found."""

    machine: Machine
    registry: str
    models: int
    tasks: int
    checkpoint_bytes: int
    repeat: int
    yardsticks: list[Yardstick]
    runs: list[CaseRuns]
    gpu: str

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the medians by yardstick and case: seconds, and GB of checkpoints a second."""
        walls = {one.name: statistics.median(one.seconds) for one in self.yardsticks}
        walls |= {runs.label: median_of(runs.cold, "wall_s") for runs in self.runs if runs.cold}
        found = {name: {"s": wall, "gb_per_s": self.checkpoint_bytes / wall / 1e9} for name, wall in walls.items()}
        return found | {f"{runs.label}, reused": {"s": median_of(runs.warm, "wall_s")} for runs in self.runs}


def median_of(runs: Sequence[RunFigures], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def machine_now() -> Machine:
    """Describe this machine."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        python=platform.python_version(),
        torch=version("torch"),
        dfmpc=version("dfmpc"),
        load=os.getloadavg()[0],
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def render(bench: Bench) -> str:
    """Return the whole text: machine, rates, phases, comparisons, memory, warnings."""
    measured = [runs for runs in bench.runs if runs.cold]
    parts = [_head(bench)]
    if measured:
        parts += ["\n".join(_rates(bench, measured)), "\n".join(_phases(measured)), "\n".join(_memory(measured))]
    parts += ["\n".join([*_speed_up(measured), *_warm(bench), *_ends(bench)])]
    return "\n\n".join(parts)


def _head(bench: Bench) -> str:
    machine = bench.machine
    return (
        f"{bench.registry}: {bench.models} models, {bench.tasks} tasks, {bench.checkpoint_bytes / 1e9:.3f} GB, "
        f"medians of {bench.repeat}\n"
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:.0f} GiB; {machine.date}; "
        f"Python {machine.python}, torch {machine.torch}, dfmpc {machine.dfmpc}; load at start {machine.load:.2f}"
    )


def _rates(bench: Bench, measured: Sequence[CaseRuns]) -> Iterator[str]:
    medians, workers = bench.medians(), {runs.label: runs for runs in measured}
    hashed = max((name for name in medians if name.startswith("sha256")), key=lambda name: medians[name]["gb_per_s"])
    yield f"| what | s | models/s | GB/s | of cat | of {hashed} |\n| --- | --- | --- | --- | --- | --- |"
    for name, found in medians.items():
        if "gb_per_s" not in found:
            continue
        dropped = name in workers and workers[name].dropped
        of_cat = found["gb_per_s"] / medians["cat, cache dropped" if dropped else "cat"]["gb_per_s"]
        of_hash = found["gb_per_s"] / medians[hashed]["gb_per_s"]
        shown = f"run, {name}" if name in workers else name
        yield (
            f"| {shown} | {found['s']:.3f} | {bench.models / found['s']:.2f} | {found['gb_per_s']:.4f} | "
            f"{of_cat:.3f} | {of_hash:.3f} |"
        )


def _phases(measured: Sequence[CaseRuns]) -> Iterator[str]:
    names = " | ".join(f"{name.removesuffix('_s')} s" for name in PHASES)
    yield f"| run | wall s | start-up s | {names} | wind-down s | overhead ms a task | others' cores |"
    yield "| --- " * (6 + len(PHASES)) + "|"
    for runs in measured:
        phases = " | ".join(f"{statistics.median(run.phases[name] for run in runs.cold):.2f}" for name in PHASES)
        wall, start = (f"{median_of(runs.cold, name):.2f}" for name in ("wall_s", "startup_s"))
        end, other = (f"{median_of(runs.cold, name):.2f}" for name in ("winddown_s", "other_cores"))
        overhead = f"{median_of(runs.cold, 'overhead_ms'):.1f}"
        yield f"| {runs.label} | {wall} | {start} | {phases} | {end} | {overhead} | {other} |"


def _memory(measured: Sequence[CaseRuns]) -> Iterator[str]:
    yield "| resident MiB | process | first quarter | last quarter | peak | KiB a task | flat |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for runs in measured:
        for memory in runs.cold[-1].memory:
            yield f"| {runs.label} | {_memory_cells(memory)} |"


def _memory_cells(memory: Memory) -> str:
    numbers = (memory.first_quarter_mib, memory.last_quarter_mib, memory.peak_mib, memory.growth_kib_a_task)
    shown = ["too few tasks" if number is None else f"{number:.1f}" for number in numbers]
    flat = {None: "not known", True: "yes", False: "NO"}[memory.flat]
    return " | ".join([memory.process, *shown, flat])


def _speed_up(measured: Sequence[CaseRuns]) -> Iterator[str]:
    """Compare each case with the one of fewest workers of its kind; ratio of medians."""
    for runs in measured:
        kind = runs.label.partition(" x ")[2]
        base = min((one for one in measured if one.label.endswith(f" x {kind}")), key=lambda one: one.workers)
        if base.workers == runs.workers:
            continue
        walls = median_of(base.cold, "wall_s") / median_of(runs.cold, "wall_s")
        working = [median_of(one.cold, "wall_s") - median_of(one.cold, "startup_s") for one in (base, runs)]
        yield f"{runs.label} over {base.label}: {walls:.2f} times as fast, {working[0] / working[1]:.2f} after start-up"


def _warm(bench: Bench) -> Iterator[str]:
    for runs in bench.runs:
        wall, start = median_of(runs.warm, "wall_s"), median_of(runs.warm, "startup_s")
        each = 1e3 * (wall - start) / bench.tasks
        times = f"{wall:.2f} s in all, {start:.2f} s to the first, {each:.2f} ms a task"
        yield f"all {bench.tasks} reused, {runs.label}: {times}"


def _ends(bench: Bench) -> Iterator[str]:
    yield f"GPU: {bench.gpu}"
    if any(run.overhead_ms < 0 for runs in bench.runs for run in runs.cold):
        yield "overhead below zero: reading and committing overlap with the rest, the phases come to more than the wall"
    others = max((run.other_cores for runs in bench.runs for run in (*runs.cold, *runs.warm)), default=0.0)
    if bench.machine.load > BUSY * bench.machine.cores or others > BUSY:
        yield (
            f"WARNING: the machine was busy (load {bench.machine.load:.2f} at start; others took up to {others:.2f} "
            "cores during a run): repeat on an idle one before quoting times"
        )
