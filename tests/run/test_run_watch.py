"""``dfmpc status`` and its ``--watch``: figures of progress, and a run followed by another process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dfmpc.artifact.owner import Owner
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.run import ledger as ledger_module
from dfmpc.run import status as status_module
from dfmpc.run.claims import start_run
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.status import read_status
from dfmpc.run.store import RunFolder, Store, freeze
from dfmpc.run.watch import duration, progress_line, screen_text

MIB = 2**20
SIZES = {"a": 1 * MIB, "b": 3 * MIB, "c": 4 * MIB}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of a/r4, b/r4 and c/r4 that nobody has begun."""
    for name, size in SIZES.items():
        with (tmp_path / f"{name}.pt2").open("wb") as file:
            file.truncate(size)
    file = tmp_path / "job.yaml"
    models = ", ".join(f"{{program: {name}.pt2}}" for name in SIZES)
    file.write_text(
        f"{{version: 1, name: nightly, output: {tmp_path / 'store'}, models: [{models}], "
        "bit_plans: [{name: r4, method: rtn, bits: 4}]}"
    )
    loaded = load_job(file)
    store = Store(loaded.store)
    store.prepare()
    return start_run(store, freeze(loaded, expand(loaded))).run


@pytest.fixture
def ledger(run: RunFolder) -> Iterator[Ledger]:
    written = Ledger(run)
    yield written
    written.close()


def start(ledger: Ledger, model: str, attempt: str = "a1") -> None:
    ledger.append(Event(Kind.TASK_STARTED, task=f"{model}/r4", attempt=attempt, device="cpu"))


def finish(ledger: Ledger, model: str, status: str = "done", **fields: str) -> None:
    kind = Kind.TASK_FAILED if status == "failed" else Kind.TASK_FINISHED
    ledger.append(Event(kind, task=f"{model}/r4", attempt="a1", status=status, **fields))


def test_progress_is_by_bytes_and_the_rate_since_the_newest_command(run: RunFolder, ledger: Ledger) -> None:
    before = read_status(run.path)
    assert (before.bytes_total, before.bytes_settled, before.bytes_per_s, before.eta_s) == (8 * MIB, 0, None, None)
    ledger.append(Event(Kind.RUN_STARTED))
    start(ledger, "a")
    finish(ledger, "a")
    state = read_status(run.path)
    assert (state.bytes_settled, state.retries) == (MIB, 0)
    assert state.bytes_per_s is not None
    assert state.eta_s == pytest.approx(7 * MIB / state.bytes_per_s)
    ledger.append(Event(Kind.RUN_STARTED))  # a command that resumes has settled nothing yet
    assert read_status(run.path).bytes_per_s is None
    for attempt in ("a1", "a2"):
        start(ledger, "c", attempt)
    finish(ledger, "b", "reused")
    assert read_status(run.path).retries == 1
    finish(ledger, "c", "failed", error_class="DataError", error="torn")
    state = read_status(run.path)
    assert (state.finished, state.bytes_settled, state.eta_s) == (True, 8 * MIB, 0)
    assert read_status(run.path).bytes_per_s == state.bytes_per_s  # the end stands still


def test_the_screen_says_what_is_at_work_and_what_failed(run: RunFolder, ledger: Ledger) -> None:
    ledger.append(Event(Kind.RUN_STARTED))
    start(ledger, "a")
    finish(ledger, "a", "failed", error_class="NonFiniteError", error="NaN in conv1\nmore of it")
    start(ledger, "b")
    start(ledger, "b", "0123abc")
    state = replace(read_status(run.path), bytes_per_s=0.5 * MIB, eta_s=200.0)
    lines = screen_text(state).splitlines()
    assert lines[:3] == [
        str(run.path),
        "nightly: 1 of 3 tasks, 1.0 of 8.0 MiB (12 %), 0.5 MiB/s, 3 min 20 s left",
        "1 failed, 1 running, 1 waiting, 1 more attempt",
    ]
    cells = [line.split() for line in lines[3:]]
    assert 0 <= int(cells[3].pop(4)) < 60  # seconds since it began, which two lines of the ledger came after
    assert cells == [
        [],
        ["at", "work", "device", "attempt", "for"],
        ["-------", "------", "-----------", "---"],
        ["b/r4", "cpu", "2", "(0123abc)", "s"],
        [],
        ["failed", "class", "error"],
        ["------", "--------------", "------------"],
        ["a/r4", "NonFiniteError", "NaN", "in", "conv1"],
        [],
        ["Ctrl-C", "ends", "the", "watching,", "not", "the", "run"],
    ]
    assert progress_line(state).endswith("1 failed, 1 running, 1 waiting, 1 more attempt; at work: b/r4")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (7, "7 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_process_that_left_many_tasks_is_looked_at_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys; from pathlib import Path
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.store import RunFolder
ledger = Ledger(RunFolder(Path(sys.argv[1])))
for name in "abc": ledger.append(Event(Kind.TASK_STARTED, task=f"{name}/r4", attempt="1"))
"""
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    looked: list[str] = []

    def counted(where: RunFolder, state: ledger_module.TaskState) -> bool:
        looked.append(state.process)
        return ledger_module.is_abandoned(where, state)

    monkeypatch.setattr(status_module, "is_abandoned", counted)
    assert read_status(run.path).interrupted == 3
    assert len(looked) == 1


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "dfmpc.cli", "status", str(path), "--watch", "--interval", "0.1", *more]


def test_without_a_terminal_a_line_a_change_until_the_end(run: RunFolder, ledger: Ledger) -> None:
    ledger.append(Event(Kind.RUN_STARTED))
    with subprocess.Popen(command(run.store.root), stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert "nightly: 0 of 3 tasks, 0.0 of 8.0 MiB (0 %); 3 waiting" in watching.stdout.readline()
        start(ledger, "a")
        assert watching.stdout.readline().endswith("1 running, 2 waiting; at work: a/r4\n")
        for name in SIZES:
            finish(ledger, name)
            # the watcher may see several of these at once, so the last line is what counts
        rest = watching.stdout.read()
        assert watching.wait(30) == 0
    assert "3 of 3 tasks, 8.0 of 8.0 MiB (100 %)" in rest.splitlines()[-1]
    assert rest.splitlines()[-1].endswith("; 3 done")


def test_with_json_a_line_is_a_document(run: RunFolder, ledger: Ledger) -> None:
    for name in SIZES:
        finish(ledger, name)
    said = subprocess.run(command(run.path, "--json"), capture_output=True, text=True, check=True).stdout
    document = json.loads(said)
    assert (document["done"], document["finished"], document["bytes_settled"]) == (3, True, 8 * MIB)
    assert "tasks" not in document


def test_a_terminal_is_redrawn_and_ctrl_c_ends_with_0(run: RunFolder, ledger: Ledger) -> None:
    start(ledger, "a")
    main, other = pty.openpty()
    with subprocess.Popen(
        command(run.path),
        stdout=other,
        stderr=subprocess.PIPE,
        # a test run in the background may have SIGINT ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - one thread
    ) as watching:
        os.close(other)
        text = read_until(main, lambda seen: "a/r4" in seen)
        assert text.startswith("\x1b[2J\x1b[H")
        assert "\x1b[K" in text
        start(ledger, "b")
        again = read_until(main, lambda seen: "b/r4" in seen and seen.endswith("\x1b[J"))
        assert "\x1b[2J" not in again  # drawn over what was there, without a flash
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
        assert watching.stderr is not None
        assert watching.stderr.read() == b""
    os.close(main)


def read_until(terminal: int, enough: Callable[[str], bool]) -> str:
    seen = ""
    while not enough(seen):
        seen += os.read(terminal, 65536).decode()
    return seen


NOBODY = "nobody is at this run: the same `dfmpc run` command resumes it"
BEGUN = """
import sys; from pathlib import Path
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.store import RunFolder
Ledger(RunFolder(Path(sys.argv[1]))).append(Event(Kind.RUN_STARTED))
print("begun", flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["lines", "json"])
def test_a_run_of_which_all_waits_is_watched_until_its_command_is_killed(run: RunFolder, more: list[str]) -> None:
    at_it = subprocess.Popen(
        [sys.executable, "-c", BEGUN, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with at_it, subprocess.Popen(command(run.path, *more), stdout=subprocess.PIPE, text=True) as watching:
        assert at_it.stdout is not None
        assert at_it.stdout.readline() == b"begun\n"
        assert watching.stdout is not None
        first = watching.stdout.readline()
        assert read_status(run.path).live
        at_it.kill()
        (last,) = watching.stdout.readlines()
        assert watching.wait(30) == 0
    if more:
        assert [(json.loads(line)["live"], json.loads(line)["waiting"]) for line in (first, last)] == [
            (True, 3),
            (False, 3),
        ]
    else:
        assert first.endswith("; 3 waiting\n")
        assert last.endswith(f"; 3 waiting; {NOBODY}\n")
    assert screen_text(read_status(run.path)).endswith(
        "\nnobody is at this run: the same `dfmpc run` command resumes it"
    )


def _written_elsewhere(run: RunFolder, *kinds: Kind, days: float = 0.0) -> None:
    """Leave the ledger file of a command on another host, written ``days`` ago."""
    owner = {**Owner.current().to_dict(), "host": "elsewhere"}
    lines = [{"owner": owner}, *({"kind": kind, "at": f"2026-01-01T00:00:0{i}+00:00"} for i, kind in enumerate(kinds))]
    run.ledger.mkdir(exist_ok=True)
    file = run.ledger / f"elsewhere-{len(kinds)}-{days:g}.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    at = time.time() - days * 86400
    os.utime(file, (at, at))


@pytest.mark.parametrize(
    ("kinds", "days", "live"),
    [
        ([Kind.RUN_STARTED], 6.9, True),
        ([Kind.RUN_STARTED], 7.1, False),
        ([Kind.RUN_STARTED, Kind.INTERRUPTED], 0.0, False),
        ([Kind.RUN_STARTED, Kind.PART_FINISHED], 0.0, False),
        ([Kind.RUN_STARTED, Kind.INTERRUPTED, Kind.RUN_STARTED], 0.0, True),
        ([], 0.0, True),
    ],
)
def test_a_command_on_another_host_is_at_a_run_until_it_says_otherwise_or_nothing_for_a_week(
    run: RunFolder, kinds: list[Kind], days: float, live: bool
) -> None:
    _written_elsewhere(run, *kinds, days=days)
    assert read_status(run.path).live is live


def test_a_run_that_was_made_and_not_begun_is_waited_for_an_hour(run: RunFolder) -> None:
    assert read_status(run.path).live
    old = time.time() - 3660
    os.utime(run.tasks_file, (old, old))
    ended = subprocess.run(command(run.path), capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.endswith(f"{NOBODY}\n")


def test_no_run_ends_with_2(tmp_path: Path) -> None:
    ended = subprocess.run(command(tmp_path / "absent"), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "absent is no folder" in ended.stderr
