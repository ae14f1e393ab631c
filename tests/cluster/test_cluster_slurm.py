"""Arrays on a real Slurm of this machine: elements that are interrupted, requeued or lose their node, and odd paths.

scripts/test_cluster installs what is needed and runs this. The jobs ask for CPUs although Slurm lends them a GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.status import read_status
from dfmpc.run.store import RunFolder, Store
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
RIG = Path(os.environ.get("DFMPC_SHARED", ROOT.parent / "shared")) / "tools" / "slurm_rig.sh"
PATIENCE_S = 100.0
PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "mp2-6", "method": "dfmpc", "low": 2, "high": 6},
]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def _missing() -> str:
    if os.environ.get("DFMPC_CLUSTER") != "1":
        return "scripts/test_cluster runs it"
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=_path()) is None]
    if absent or os.geteuid() != 0:
        return f"needs root and {', '.join(absent) or 'nothing else'}"
    return "" if RIG.is_file() else f"needs {RIG} (set DFMPC_SHARED)"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(_missing()), reason=_missing())]


@dataclass(frozen=True)
class Element:
    """An element of an array: its state, how often it was requeued, its exit code and its node."""

    state: str
    restarts: int
    code: int
    node: str


def _call(*words: str) -> str:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def _until(what: str, done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}"
        threading.Event().wait(0.2)


def _start_now(element: str) -> None:
    subprocess.run(
        ["scontrol", "update", f"JobId={element}", "StartTime=now"],
        capture_output=True,
        check=False,
    )


@dataclass(frozen=True)
class Slurm:
    """Two nodes of two fake GPUs each."""

    folder: Path

    def submit(self, job: Path, *options: str) -> str:
        """Hand the script for ``job`` to sbatch from its folder; return the array's number."""
        from dfmpc.cli import app  # noqa: PLC0415

        words = ["submit", str(job), "--slurm", "--cpus", "1", "--memory", "900M", "--time", "00:10:00", *options]
        written = CliRunner().invoke(app, words)
        assert written.exit_code == 0, written.output
        script = job.with_name("submit.sh")
        script.write_text(written.stdout)
        _call("sbatch", "--test-only", str(script))
        return _call("sbatch", "--parsable", str(script)).strip()

    def element(self, array: str, number: int) -> Element:
        """Return what Slurm says of one element."""
        text = _call("scontrol", "show", "job", f"{array}_{number}")
        state, restarts, code = (
            re.search(rf"\b{name}=(\w+)", text)[1]  # type: ignore[index]
            for name in ("JobState", "Restarts", "ExitCode")
        )
        node = re.search(r"\bBatchHost=(\w+)", text)
        return Element(state, int(restarts), int(code), node[1] if node else "")

    def wait(self, array: str, count: int) -> list[Element]:
        """Return the elements once all have ended; a requeued one need not wait until its credentials expire.

        But for two seconds: those of the start before are revoked by whole seconds, and a start in the same one fails.
        """
        requeued: dict[tuple[int, int], float] = {}

        def ended() -> bool:
            for number in range(count):
                found = self.element(array, number)
                if found.state == "PENDING" and found.restarts:
                    since = requeued.setdefault((number, found.restarts), time.monotonic())
                    if time.monotonic() >= since + 2:
                        _start_now(f"{array}_{number}")
                if found.state not in ENDED:
                    return False
            return True

        _until(f"array {array}", ended)
        return [self.element(array, number) for number in range(count)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", _path())
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        subprocess.run(["bash", str(RIG), "start", str(folder)], timeout=60, check=True)
        try:
            yield Slurm(folder)
        finally:
            subprocess.run(["scancel", "--state=RUNNING"], timeout=60, check=False)
            subprocess.run(["bash", str(RIG), "stop", str(folder)], timeout=60, check=False)


def _job(bench: Any) -> Path:
    """Write a job whose second model stops at the fifo of its folder, where there is one."""
    models = [bench.model("a"), bench.model("b", "blocks_while", "fifo"), bench.model("c")]
    return bench.job(models, PLANS, resources={"devices": "cpu"})


def _artifacts(store: Path) -> dict[str, bytes]:
    files = (path for path in (store / "artifacts").rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


_UNDISTURBED: dict[str, bytes] = {}


@pytest.fixture
def undisturbed(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job leaves when this machine does it alone, which is the same for every test."""
    if not _UNDISTURBED:
        alone = type(bench)(tmp_path_factory.mktemp("undisturbed"))
        with contextlib.chdir(alone.folder):
            assert run_job(load_job(_job(alone)), RunOptions(progress=False)).exit_code == 0
        _UNDISTURBED.update(_artifacts(alone.store))
    return _UNDISTURBED


def _assert_whole(job: Path, undisturbed: dict[str, bytes]) -> RunFolder:
    """Check that one run did everything once, with the bytes of an undisturbed run; return the run."""
    store = Store(load_job(job).store)
    (run,) = store.run_folders()
    status = read_status(run.path)
    assert (status.total, status.done, status.finished) == (6, 6, True)
    keys = [path.parent for path in store.artifacts.rglob("manifest.json")]
    assert len({key.parent for key in keys}) == len(keys) == 6, "one artifact a task"
    assert list(store.attempts.iterdir()) == []
    assert _artifacts(store.root) == undisturbed
    return run


def _logs(job: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(job.parent.glob("*.log")))


@pytest.fixture
def here(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench, as the folder that jobs are submitted from."""
    monkeypatch.chdir(bench.folder)
    return bench


def _blocked(bench: Any) -> tuple[Path, Path]:
    """Return the job and the fifo that its second model stops at."""
    fifo = bench.folder / "fifo"
    os.mkfifo(fifo)
    return _job(bench), fifo


def _pass(fifo: Path) -> int:
    """Wait until a worker is at the fifo, return its number, and let the next one pass."""
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text(encoding="ascii")), daemon=True)
    reader.start()
    reader.join(PATIENCE_S)
    assert got, "no worker came to the fifo"
    fifo.unlink()
    return int(got[0])


def test_an_array_does_one_run_with_a_gpu_lent_to_each_element(slurm: Slurm, undisturbed: Any, here: Any) -> None:
    job = _job(here)
    array = slurm.submit(job, "--shards", "3")
    elements = slurm.wait(array, 3)
    assert [(element.state, element.code) for element in elements] == [("COMPLETED", 0)] * 3, _logs(job)
    assert "gres:gpu:1" in _call("scontrol", "show", "job", f"{array}_0")
    run = _assert_whole(job, undisturbed)
    starts = [event.process for event in read_events(run) if event.kind is Kind.RUN_STARTED]
    assert len(set(starts)) == len(starts) == 3


@pytest.mark.parametrize(("name", "to"), [("USR1", "--batch"), ("TERM", "--full")])
def test_an_interrupted_element_is_requeued_alone_and_finishes(
    slurm: Slurm, undisturbed: Any, here: Any, name: str, to: str
) -> None:
    job, fifo = _blocked(here)
    array = slurm.submit(job, "--shards", "2", "--grace", "1")
    _pass(fifo)
    _call("scancel", f"--signal={name}", to, f"{array}_1")
    elements = slurm.wait(array, 2)
    assert [(element.state, element.restarts) for element in elements] == [("COMPLETED", 0), ("COMPLETED", 1)], _logs(
        job
    )
    assert f"interrupted; requeued as {array}_1" in _logs(job)
    _assert_whole(job, undisturbed)


def test_a_cancelled_element_stays_cancelled_and_a_later_array_finishes(
    slurm: Slurm, undisturbed: Any, here: Any
) -> None:
    job, fifo = _blocked(here)
    array = slurm.submit(job, "--shards", "2", "--grace", "1")
    _pass(fifo)
    _call("scancel", f"{array}_1")
    assert [(element.state, element.restarts) for element in slurm.wait(array, 2)] == [
        ("COMPLETED", 0),
        ("CANCELLED", 0),
    ]
    assert "requeued" not in _logs(job)
    again = slurm.submit(job, "--shards", "2")
    assert {element.state for element in slurm.wait(again, 2)} == {"COMPLETED"}, _logs(job)
    _assert_whole(job, undisturbed)


def test_an_element_whose_node_dies_is_done_by_another_node(slurm: Slurm, undisturbed: Any, here: Any) -> None:
    job, fifo = _blocked(here)
    array = slurm.submit(job, "--shards", "2")
    _pass(fifo)
    node = slurm.element(array, 1).node
    try:
        for process in _processes_of(slurm, array, node):
            os.kill(process, signal.SIGKILL)
        _call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")
        elements = slurm.wait(array, 2)
        assert (elements[1].state, elements[1].restarts) == ("COMPLETED", 1), _logs(job)
        assert elements[1].node != node
        _assert_whole(job, undisturbed)
    finally:
        _call("slurmd", "-N", node)
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
        _until(f"{node} is back", lambda: "idle" in _call("sinfo", "-h", "-n", node, "-o", "%T"))


def _processes_of(slurm: Slurm, array: str, node: str) -> list[int]:
    """Return the node's daemon and what it runs of the array."""
    daemon = int((slurm.folder / "run" / f"slurmd-{node}.pid").read_text())
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURMD_NODENAME={node}"}
    found = [daemon]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_text(errors="replace").split("\0"))
        except OSError:
            continue
        if wanted <= variables:
            found.append(int(folder.name))
    return found


def test_an_array_runs_in_a_folder_with_an_odd_name(
    slurm: Slurm, undisturbed: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.folder / 'it\'s a "night"\nof $HOME #1'
    folder.mkdir()
    monkeypatch.chdir(folder)
    job = _job(type(bench)(folder))
    array = slurm.submit(job, "--shards", "2")
    assert {element.state for element in slurm.wait(array, 2)} == {"COMPLETED"}, _logs(job)
    _assert_whole(job, undisturbed)
