"""Runs on a real Ray cluster of this machine, two nodes of two CPUs: lost nodes and processes, signals, odd paths.

scripts/test_cluster installs what is needed and runs this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.ledger import Kind, fold, read_events
from dfmpc.run.status import read_status
from dfmpc.run.store import RunFolder, Store

PATIENCE_S = 250.0
PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "mp2-6", "method": "dfmpc", "low": 2, "high": 6},
]
NETWORKS = Path(__file__).resolve().parents[1] / "networks"
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_timeout_ms": 2000}
QUICK |= {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
SIZES = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
ONE_A_NODE: dict[str, object] = {"devices": "cpu", "threads": 2}
"""Resources of a job of which each node has room for one task."""
VARIES = {"run", "attempt", "finished_at", "gb_per_s", "peak_host_bytes"}
"""Beside what counts seconds."""


def _missing() -> str:
    if os.environ.get("DFMPC_CLUSTER") != "1":
        return "scripts/test_cluster runs it"
    return "" if importlib.util.find_spec("ray") else "needs Ray: pip install 'dfmpc[ray]'"


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # processes of Ray take ten seconds to start here, and several times as many elsewhere
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes whose environment says nothing of the tests' code."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - an extra

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("DFMPC_ALLOW_CODE", raising=False)
        made = Cluster(initialize_head=True, head_node_args={**SIZES, "_system_config": QUICK})
        try:
            made.add_node(**SIZES)
            yield made
        finally:
            made.shutdown()


def _start(job: Path, cluster: Any, *options: str) -> subprocess.Popen[str]:
    words = ["run", str(job), "--json", "--executor", "ray", "--ray-address", cluster.address, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "dfmpc.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _run(job: Path, cluster: Any, *options: str) -> tuple[int, dict[str, Any], str]:
    command = _start(job, cluster, *options)
    out, err = command.communicate(timeout=PATIENCE_S)
    return command.returncode, json.loads(out or "{}"), err


def _job(bench: Any, **resources: object) -> Path:
    """Write a job whose second model stops at the fifo of its folder, where there is one."""
    models = [bench.model("a"), bench.model("b", "blocks_while", "fifo"), bench.model("c")]
    return bench.job(models, PLANS, resources={"devices": "cpu", **resources})


def _artifacts(store: Path) -> dict[str, bytes]:
    files = (path for path in (store / "artifacts").rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def _assert_whole(store: Path, bytes_of: dict[str, bytes]) -> RunFolder:
    """Check that one run did everything, with the bytes of a local run and one artifact a task; return the run."""
    (run,) = Store(store).run_folders()
    status = read_status(run.path)
    assert (status.done, status.finished) == (status.total, True)
    keys = [path.parent for path in (store / "artifacts").rglob("manifest.json")]
    assert len({key.parent for key in keys}) == len(keys) == status.total, "one artifact a task"
    assert _artifacts(store) == bytes_of
    return run


_LOCAL: dict[str, Any] = {}


@pytest.fixture
def local(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The artifacts and the rows that workers of this machine make of the job, which are the same for every test."""
    if not _LOCAL:
        alone = type(bench)(tmp_path_factory.mktemp("local"))
        with contextlib.chdir(alone.folder):
            summary = run_job(load_job(_job(alone)), RunOptions(progress=False))
        assert summary.exit_code == 0
        _LOCAL.update(bytes=_artifacts(alone.store), rows={row.task: row for row in summary.rows})
    return _LOCAL


@pytest.fixture
def here(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench, as the folder that commands are given in; the blocking factory looks for its fifo by this path."""
    monkeypatch.chdir(bench.folder)
    return bench


def _until(what: str, done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}"
        threading.Event().wait(0.1)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _pass(fifo: Path) -> int:
    """Wait until a process is at the fifo, return its number, and let the next one pass."""
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready, _, _ = select.select([pipe], [], [], PATIENCE_S)
        assert ready, "no process came to the fifo"
        return int(os.read(pipe, 100))
    finally:
        os.close(pipe)
        fifo.unlink()


def test_the_cluster_makes_the_bytes_and_rows_of_this_machine(cluster: Any, here: Any, local: Any) -> None:
    job = _job(here)
    code, document, err = _run(job, cluster)
    assert code == 0, err
    run = _assert_whole(here.store, local["bytes"])
    ours = {row["task"]: row for row in document["models"]}
    for task, row in local["rows"].items():
        lasting = ours[task].keys() - VARIES - {name for name in ours[task] if name.endswith("_s")}
        theirs = {name: value for name, value in vars(row).items() if name in lasting}
        assert len(theirs) > 20
        assert {name: ours[task][name] for name in theirs} == theirs
    events = read_events(run)
    writers = {event.process for event in events if event.kind is Kind.TASK_FINISHED}
    assert len(writers) > 1, "more than one process was at work"
    assert not writers & {event.process for event in events if event.kind is Kind.RUN_STARTED}
    assert list(here.store.joinpath(".attempts").iterdir()) == []

    code, document, err = _run(job, cluster, "--shard", "0/1")
    assert (code, Counter(row["status"] for row in document["models"])) == (0, {"reused": 6}), err
    assert _artifacts(here.store) == local["bytes"]


def test_what_hangs_or_is_killed_is_tried_again_by_its_class(cluster: Any, bench: Any) -> None:
    models = [
        bench.model("hangs", "blocks_once", str(bench.folder / "hung")),
        bench.model("dies", "dies_once", str(bench.folder / "died")),
        bench.model("bad", "raises_a_bug"),
    ]
    job = bench.job(models, PLANS[:1], resources={**ONE_A_NODE, "stuck_after": "15s"})
    code, document, err = _run(job, cluster)
    assert code == 3, err
    rows = {row["task"]: row for row in document["models"]}
    assert {task: (row["status"], row["failure"], row["attempts"]) for task, row in rows.items() if row["failure"]} == {
        "bad/r4": ("failed", "data", 1)
    }
    assert {row["status"] for task, row in rows.items() if task != "bad/r4"} == {"done"}
    assert "dies/r4: crash, tried again alone: its process on the Ray cluster was lost" in err
    assert "hangs/r4: stuck, tried again once more: no sign of work for 15 s (resources.stuck_after)" in err
    run = RunFolder(Path(document["run"]))
    attempts = {task: state.attempts for task, state in fold(run).items()}
    assert attempts == {"hangs/r4": 2, "dies/r4": 2, "bad/r4": 1}
    assert [event.kind for event in read_events(run)].count(Kind.WORKER_DIED) == 1


def test_what_a_lost_node_was_at_is_done_elsewhere(cluster: Any, here: Any) -> None:
    fifos = [here.folder / name for name in ("one", "two")]
    for fifo in fifos:
        os.mkfifo(fifo)
    models = [here.model(fifo.name, "blocks_while", str(fifo)) for fifo in fifos]
    job = here.job(models, PLANS, resources=ONE_A_NODE)
    command = _start(job, cluster)
    blocked = {fifo.name: _pass(fifo) for fifo in fifos}
    (lost,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    raylet = lost.all_processes["raylet"][0].process.pid
    on_lost = {name for name, process in blocked.items() if _parent(process) == raylet}
    assert len(on_lost) == 1
    cluster.remove_node(lost, allow_graceful=False)
    for name in set(blocked) - on_lost:
        os.kill(blocked[name], signal.SIGKILL)
    try:
        out, err = command.communicate(timeout=PATIENCE_S)
    finally:
        cluster.add_node(**SIZES)
    assert command.returncode == 0, err
    assert {row["status"] for row in json.loads(out)["models"]} == {"done"}
    for name in blocked:
        free = f"{name}/r4: tried again elsewhere at no cost"
        assert (free in err) == (name in on_lost)
        assert (f"{name}/r4: crash, tried again" in err) == (name not in on_lost)
    assert read_status(here.store).finished
    assert len(list((here.store / "artifacts").rglob("manifest.json"))) == 4


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("again", [False, True], ids=["grace", "second signal"])
def test_an_interrupted_command_exits_75_and_a_local_one_resumes(cluster: Any, here: Any, again: bool) -> None:
    fifo = here.folder / "fifo"
    os.mkfifo(fifo)
    job = here.job([here.model("a"), here.model("b", "blocks_while", str(fifo))], PLANS, resources=ONE_A_NODE)
    command = _start(job, cluster, "--grace", "100" if again else "1")
    blocked = _pass(fifo)
    began = time.monotonic()
    command.send_signal(signal.SIGTERM)
    if again:
        assert command.stderr is not None
        line = next(line for line in command.stderr if "a second signal ends at once" in line)
        assert "interrupted by SIGTERM: up to 100 s for" in line
        threading.Event().wait(1.1)  # signals that come together count as one
        command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 75, err
    assert time.monotonic() - began < 90  # not the grace of the second case, and no task that blocks for ever
    assert "the same command resumes" in err
    _until("the blocked process is gone", lambda: not _is_alive(blocked))
    summary = run_job(load_job(job), RunOptions(progress=False, devices="cpu"))
    assert (summary.exit_code, summary.resumed) == (0, True)
    assert read_status(summary.run).finished
    rows = {row.task: row.status for row in summary.rows}
    assert len(rows) == len(list((here.store / "artifacts").rglob("manifest.json"))) == 4
    # an artifact may be in place although its process was killed before it could say so
    assert set(rows.values()) <= {"done", "reused"}
    assert list(here.store.joinpath(".attempts").iterdir()) == []


def test_a_run_in_a_folder_with_an_odd_name(cluster: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.folder / 'it\'s a "night", or:\nof $HOME #1'
    (folder / "my code").mkdir(parents=True)
    shutil.copy(NETWORKS / "tiny_networks.py", folder / "my code" / "tiny_networks.py")
    monkeypatch.delenv("DFMPC_ALLOW_CODE")
    monkeypatch.chdir(folder)
    odd = type(bench)(folder)
    job = odd.job([odd.model("a")], PLANS, resources={"devices": "cpu"})
    code, document, err = _run(Path(job.name), cluster, "--allow-code", "./my code", "--output", "the store")
    assert code == 0, err
    assert {row["status"] for row in document["models"]} == {"done"}
    assert len(list((folder / "the store" / "artifacts").rglob("manifest.json"))) == 2


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_node_without_the_store_is_named_before_anything_starts(cluster: Any, bench: Any) -> None:
    """The third node sees an empty folder where the store is."""
    bench.store.mkdir()
    ray = Path(sys.executable).with_name("ray")
    begin = f'mount -t tmpfs none "$0" && exec "$1" start --address={cluster.address} --num-cpus=1 --block'
    node = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", begin, str(bench.store), str(ray)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code, _, err = _wait_for_refusal(bench.job([bench.model("a")], PLANS[:1]), cluster, node)
        assert code == 2, err
        assert "of the Ray cluster does not see" in err
        assert str(bench.store / "runs") in err
        assert list((bench.store / "artifacts").iterdir()) == []
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(PATIENCE_S)


def _wait_for_refusal(job: Path, cluster: Any, node: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any], str]:
    import ray  # noqa: PLC0415

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        _until("the third node is there", lambda: sum(each["Alive"] for each in ray.nodes()) == 3 or bool(node.poll()))
    finally:
        ray.shutdown()
    return _run(job, cluster)
