"""Every named point × every way to fail there: the run ends as it should, and the same command makes it whole.

A cell runs three tasks (two of one model, one of another) with the fault at every attempt, then once more without it.
In the end every file of every artifact has the bytes of an undisturbed run, and nothing else is left in the store.
Most cells are forks of a warm process (warm_commands.py says what that leaves out); those in COLD and the undisturbed
run are started by their command line. Two cells run at a time; each is a test of its own, which waits for its result.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dfmpc.faults import KINDS, POINTS
from dfmpc.report.parts import read_models
from dfmpc.run.ledger import Kind, fold, read_events
from dfmpc.run.store import RunFolder, Store

pytestmark = pytest.mark.slow
TASKS = ["ax/px", "ax/q", "b/px"]
LANES = 2
LIMIT_S = 280  # below the limit of a test
STUCK_S = 3
MATRIX = [point for point in POINTS if point != "after-claim"]  # that one is test_run_claims.py's
ALWAYS = [(point, kind) for point in MATRIX for kind in KINDS]
ONCE = [(point, kind) for point in MATRIX for kind in ("kill", "oom", "hang")]
COLD = [("mid-pack", "kill"), ("before-rename", "hang"), ("mid-ledger-line", "raise")]
FAILS = {"kill": ("host-oom", 2), "raise": ("bug", 1), "oom": ("host-oom", 2), "hang": ("stuck", 2)}
"""By kind of fault: the class of failure that the row names, and after how many attempts."""
ENDS = {"kill": "WorkerDiedError", "raise": "RuntimeError", "oom": "MemoryError", "hang": "WorkerDiedError"}


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["task"]: row for row in json.loads(self.out)["models"]}

    @property
    def run(self) -> Path:
        return Path(json.loads(self.out)["run"])


class Lane:
    """Runs commands as forks of a process that is warm; or cold ones."""

    def __init__(self, script: Path) -> None:
        self._warm = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def command(self, folder: Path, *argv: str, fault: str = "", cold: bool = False) -> Ended:
        out, err = folder / "out", folder / "err"
        environment = {"DFMPC_FAULT": fault}
        if cold:
            with out.open("wb") as stdout, err.open("wb") as stderr:
                command = [sys.executable, "-m", "dfmpc.cli", *argv]
                env = {**os.environ, **environment}
                code = subprocess.run(command, stdout=stdout, stderr=stderr, env=env, check=False).returncode
        else:
            order = {"argv": argv, "environment": environment, "out": str(out), "err": str(err)}
            assert self._warm.stdin is not None
            assert self._warm.stdout is not None
            self._warm.stdin.write(json.dumps(order) + "\n")
            self._warm.stdin.flush()
            code = int(self._warm.stdout.readline())
        return Ended(code, out.read_text(), err.read_text())

    def close(self) -> None:
        self._warm.communicate(timeout=LIMIT_S)


@dataclass(frozen=True)
class Cell:
    """One point and kind of fault, tried in a store of its own against the files of ``undisturbed``."""

    folder: Path
    job: Path
    lane: Lane
    undisturbed: dict[str, bytes]
    cold: bool = False

    def run(self, *flags: str, fault: str = "") -> Ended:
        argv = ("run", str(self.job), "--json", "--only", "*x*", "--output", str(self.folder / "store"), *flags)
        return self.lane.command(self.folder, *argv, fault=fault, cold=self.cold)

    def check_whole(self, run: Path) -> None:
        """Check that the store holds what an undisturbed run leaves, and nothing else."""
        store = Store(self.folder / "store")
        assert artifact_files(store) == self.undisturbed
        assert list(store.attempts.iterdir()) == []
        names = [path.name for path in store.root.rglob("*")]
        assert [name for name in names if name.endswith(".tmp") or name.startswith(".new-")] == []
        rows = read_models(run)
        assert [row.task for row in rows] == TASKS
        assert {row.status for row in rows} <= {"done", "reused"}
        assert {task: state.status for task, state in fold(RunFolder(run)).items()} == {
            row.task: row.status for row in rows
        }
        verified = self.lane.command(self.folder, "verify", str(store.root))
        assert verified.code == 0, verified.out + verified.err

    def always(self, point: str, kind: str) -> None:
        """A fault in every worker, then none."""
        first = self.run(fault=f"worker/{point}={kind}")
        if kind == "enospc":
            check_full(first)
        elif point == "after-rename" and kind != "raise":
            check_reused(first)
            self.check_whole(first.run)
            return
        else:
            assert first.code == 3, first.err
            expected = (*FAILS[kind], ENDS[kind])
            found = {task: (row["failure"], row["attempts"], row["error_class"]) for task, row in first.rows.items()}
            assert found == dict.fromkeys(TASKS, expected), first.err
        again = self.run(*(["--retry-failed"] if first.code == 3 else []))
        assert again.code == 0, again.err
        assert again.run == first.run
        self.check_whole(first.run)
        assert [event.kind for event in read_events(RunFolder(first.run))].count(Kind.RUN_FINISHED) == 2 - (
            first.code != 3
        )

    def once(self, point: str, kind: str) -> None:
        """A fault in one worker, which the run itself gets over."""
        marker = self.folder / "once"
        ended = self.run(fault=f"worker/{point}={kind}@{marker}")
        assert ended.code == 0, ended.err
        assert marker.exists()
        # what was read ahead without memory is read again, unheard; whether it was read ahead is a matter of moments
        assert "tried again" in ended.err or (point, kind) == ("after-read", "oom"), ended.err
        self.check_whole(ended.run)

    def scheduler(self, point: str, kind: str) -> None:
        """A fault in the scheduler itself."""
        first = self.run(fault=f"scheduler/{point}={kind}")
        assert first.code == {"kill": -9, "raise": 1, "enospc": 0}[kind], first.err
        if first.code == 0:  # its own notes were lost; what the workers did was not
            assert first.err.count("cannot be recorded") == 1
        (run,) = Store(self.folder / "store").run_folders()
        again = self.run()
        assert again.code == 0, again.err
        assert first.code == 0 or again.run == run.path
        self.check_whole(again.run)


def check_full(ended: Ended) -> None:
    """Check that a full disk stops the run with one clear message and fails no task."""
    assert ended.code == 75, ended.err
    said = [line for line in ended.err.splitlines() if "No space left on device" in line]
    assert len(said) == 1, ended.err
    assert "the same command resumes" in said[0]
    assert {row["status"] for row in ended.rows.values()} <= {"interrupted"}


def check_reused(ended: Ended) -> None:
    """Check that what was committed before the fault was found by the next attempt."""
    assert ended.code == 0, ended.err
    assert {task: row["status"] for task, row in ended.rows.items()} == dict.fromkeys(TASKS, "reused")


def artifact_files(store: Store) -> dict[str, bytes]:
    """Return every artifact's every file by its name below the store."""
    files = [path for path in store.artifacts.rglob("*") if path.is_file()]
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files}


class Matrix:
    """Runs the cells that were asked for, LANES at a time."""

    def __init__(self, bench: Any, script: Path) -> None:
        self._bench, self._lanes = bench, [Lane(script) for _ in range(LANES)]
        plans = [{"name": name, "method": "rtn", "bits": bits} for name, bits in (("px", 4), ("q", 8))]
        models = [bench.model("ax"), bench.model("b", "plain", 4, checkpoint=self._small())]
        resources = {"devices": "cpu", "threads": 1, "stuck_after": STUCK_S}
        self._job = bench.job(models, plans, resources=resources)
        self._free: queue.Queue[Lane] = queue.Queue()
        self._pool = ThreadPoolExecutor(LANES)
        self._undisturbed = self._run_undisturbed()
        for lane in self._lanes:
            self._free.put(lane)

    def _small(self) -> str:
        return str(self._bench.checkpoint("b", self._bench.state("plain", 4)))

    def _run_undisturbed(self) -> dict[str, bytes]:
        folder = self._bench.folder / "undisturbed"
        folder.mkdir()
        ended = Cell(folder, self._job, self._lanes[0], {}, cold=True).run()
        assert ended.code == 0, ended.err
        files = artifact_files(Store(folder / "store"))
        assert len({Path(name).parent for name in files}) == len(TASKS)
        return files

    def start(self, mode: str, point: str, kind: str) -> Future[None]:
        return self._pool.submit(self._try, mode, point, kind)

    def _try(self, mode: str, point: str, kind: str) -> None:
        folder = self._bench.folder / f"{mode}-{point}-{kind}"
        folder.mkdir()
        lane = self._free.get()
        try:
            cell = Cell(folder, self._job, lane, self._undisturbed, cold=mode == "cold")
            {"once": cell.once, "scheduler": cell.scheduler}.get(mode, cell.always)(point, kind)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for lane in self._lanes:
            lane.close()


CELLS = [
    *(("always", *cell) for cell in ALWAYS),
    *(("once", *cell) for cell in ONCE),
    *(("scheduler", "mid-ledger-line", kind) for kind in ("kill", "raise", "enospc")),
    *(("cold", *cell) for cell in COLD),
]


@pytest.fixture(scope="module")
def cells(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    project: Path,
    make_bench: Callable[[Path], Any],
) -> Iterator[dict[tuple[str, str, str], Future[None]]]:
    """Return the future result of every cell that is to be tried, all begun."""
    wanted = [item.callspec.params["cell"] for item in request.session.items if item.path == request.node.path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFMPC_ALLOW_CODE", str(project / "tests" / "networks"))
        bench = make_bench(tmp_path_factory.mktemp("matrix"))
        matrix = Matrix(bench, project / "tests" / "run" / "warm_commands.py")
        yield {cell: matrix.start(*cell) for cell in wanted}
        matrix.close()


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_fault_costs_nothing_but_its_attempt(
    cell: tuple[str, str, str], cells: dict[tuple[str, str, str], Future[None]]
) -> None:
    cells[cell].result(LIMIT_S)
