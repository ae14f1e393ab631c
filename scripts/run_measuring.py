"""One `dfmpc run` under measurement: its wall time, its phases, the memory of its processes, and who else computed.

Used by bench_run.py. Times of phases come from the report's rows, the moments of tasks from the ledger, memory from
/proc (Linux).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dfmpc.report.parts import read_models
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.store import RunFolder, find_run

PHASES = ("read_s", "compress_s", "write_s", "evaluate_s")
"""Columns of the report. Where they overlap in time (reading ahead, committing behind) their sum exceeds the wall."""
SAMPLE_S = 0.2
"""Between two looks at the memory of the processes."""
FLAT = 1.1
"""Memory is flat where the last quarter's median is at most this times the first quarter's.

The largest models run first, so this says something of networks of one size and little of a mix.
"""
_MIB = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_COMMAND = (sys.executable, "-P", "-c", "from dfmpc.cli import main; main()", "run")


class RunFailedError(Exception):
    """A run that did not do what it was started for: nothing of it is worth quoting."""


@dataclass(frozen=True)
class Sample:
    """Resident memory at one moment, in bytes: of the scheduler, and of the largest process below it."""

    at: float
    scheduler: int
    worker: int


@dataclass(frozen=True)
class Memory:
    """Resident memory of one kind of process. The quarters are medians over the first and last quarter of the tasks."""

    process: str
    first_quarter_mib: float | None
    last_quarter_mib: float | None
    peak_mib: float
    growth_kib_a_task: float | None
    """Of the run's tasks."""
    flat: bool | None
    """None where too few samples fell into a quarter."""


@dataclass(frozen=True)
class RunFigures:
    """What one run took, in seconds, from its launch to its end."""

    wall_s: float
    startup_s: float
    """Until the first task started."""
    slots_startup_s: float
    """The same, summed over the workers."""
    winddown_s: float
    """From the last task's end to the command's."""
    phases: dict[str, float]
    """Sum over the tasks."""
    tasks: int
    statuses: dict[str, int]
    overhead_ms: float
    """(workers x wall - start-up of every worker - sum of phases) / tasks."""
    other_cores: float
    """Cores that other processes of this machine kept busy meanwhile."""
    memory: list[Memory]


def measure_run(
    job: Path, store: Path, devices: Sequence[str], *, allow_code: Sequence[Path], log: Path, timeout_s: float
) -> RunFigures:
    """Run ``job`` into ``store`` on ``devices`` (a worker each) and return its figures; its output goes to ``log``.

    Raises RunFailedError with the log's last lines where it does not end with 0 in ``timeout_s``.
    """
    allowed = [text for folder in allow_code for text in ("--allow-code", str(folder))]
    command = [*_COMMAND, str(job), "--output", str(store), "--devices", ",".join(devices), *allowed]
    busy, used, launched = _busy_cpu_s(), _own_cpu_s(), time.time()
    samples = _watched(command, log, timeout_s)
    ended = time.time()
    wall = ended - launched
    other = max(0.0, (_busy_cpu_s() - busy) - (_own_cpu_s() - used)) / wall
    return _figures(find_run(store), samples, len(devices), launched, ended, other)


def _watched(command: Sequence[str], log: Path, timeout_s: float) -> list[Sample]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        watcher = _Watcher(process.pid)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RunFailedError(f"not finished after {timeout_s:.0f} s: {_tail(log)}; raise --timeout") from error
        finally:
            watcher.stop()
            _end(process)
    if code:
        raise RunFailedError(f"`dfmpc run` ended with {code}: {_tail(log)}")
    return watcher.samples


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a run that is still there stop in its own way, then make sure."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(lines[-8:]) or "it said nothing"


class _Watcher:
    """A thread that samples the memory of ``pid`` and of everything below it."""

    def __init__(self, pid: int) -> None:
        self.samples: list[Sample] = []
        self._pid, self._stopped = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            workers = max(map(_resident, _descendants(self._pid)), default=0)
            self.samples.append(Sample(time.time(), _resident(self._pid), workers))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _descendants(pid: int) -> Iterator[int]:
    parents = dict(_parents())
    for one in parents:
        above = parents.get(one)
        while above and above != pid:
            above = parents.get(above)
        if above == pid:
            yield one


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                after_name = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
                yield int(entry.name), int(after_name.split()[1])
            except OSError:
                continue


def _own_cpu_s() -> float:
    """Return the processor seconds of this process and of those below it that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _busy_cpu_s() -> float:
    """Return the processor seconds that the machine has spent on anything."""
    counts = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle = counts[3] + counts[4]
    return (sum(counts) - idle) / os.sysconf("SC_CLK_TCK")


def _figures(
    run: RunFolder, samples: Sequence[Sample], workers: int, launched: float, ended: float, other_cores: float
) -> RunFigures:
    rows, starts = read_models(run.path), _starts(run)
    if not rows:
        raise RunFailedError(f"{run.path}: the run ended with 0, and its report has no row")
    # What is reused may never have been started.
    starts = starts or [min(row.finished_at for row in rows).timestamp()]
    statuses = {status: sum(row.status == status for row in rows) for status in sorted({row.status for row in rows})}
    startup = min(starts) - launched
    # One process that starts all tasks says nothing of each worker.
    slots = sum(start - launched for start in starts) if len(starts) == workers else workers * startup
    phases = {name: sum(getattr(row, name) or 0.0 for row in rows) for name in PHASES}
    spent = workers * (ended - launched) - slots - sum(phases.values())
    finished = sorted(row.finished_at.timestamp() for row in rows)
    return RunFigures(
        wall_s=ended - launched,
        startup_s=startup,
        slots_startup_s=slots,
        winddown_s=ended - finished[-1],
        phases=phases,
        tasks=len(rows),
        statuses=statuses,
        overhead_ms=1e3 * spent / len(rows),
        other_cores=other_cores,
        memory=[_memory(name, samples, finished) for name in ("scheduler", "worker")],
    )


def _starts(run: RunFolder) -> list[float]:
    """Return when each process of the ledger first started a task, in seconds of the epoch."""
    first: dict[str, float] = {}
    for event in read_events(run):
        if event.kind is Kind.TASK_STARTED:
            first.setdefault(event.process, datetime.fromisoformat(event.at).timestamp())
    return list(first.values())


def _memory(process: str, samples: Sequence[Sample], finished: Sequence[float]) -> Memory:
    count = len(finished)
    first = _median(process, samples, finished[0], finished[max(0, count // 4 - 1)])
    last = _median(process, samples, finished[count - max(1, count // 4)], finished[-1])
    grown = None if first is None or last is None else last - first
    return Memory(
        process=process,
        first_quarter_mib=None if first is None else first / _MIB,
        last_quarter_mib=None if last is None else last / _MIB,
        peak_mib=max((getattr(sample, process) for sample in samples), default=0) / _MIB,
        growth_kib_a_task=None if grown is None else grown / 1024 / (0.75 * count),
        flat=None if first is None or last is None else last <= FLAT * first,
    )


def _median(process: str, samples: Sequence[Sample], start: float, end: float) -> float | None:
    within = [getattr(sample, process) for sample in samples if start <= sample.at <= end]
    return statistics.median(within) if len(within) >= 3 else None
