"""Retention: what goes, what stays, and what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dfmpc import cli
from dfmpc.artifact.attempts import new_attempt, sweep
from dfmpc.errors import UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.report.parts import write_part
from dfmpc.report.rows import ModelRow
from dfmpc.run import gc
from dfmpc.run.claims import start_run
from dfmpc.run.gc import GcResult, GcRules, collect_garbage
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.store import RunFolder, Store, freeze
from typer.testing import CliRunner

DAY = 24 * 3600.0
EVERYTHING = GcRules(unreferenced=True, runs_older_than_s=DAY)


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class Bench:
    """A store with artifacts of a/r4 and b/r4 and runs of both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        self.store.prepare()

    def artifact(self, name: str, task: str = "a/r4", days: float = 0) -> str:
        """Make an artifact of 1,000 bytes that is ``days`` old, with its scores; return its name in the store."""
        folder = self.store.artifacts / task / key(name)[:12]
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 998)
        (folder / "manifest.json").write_bytes(b"{}")
        age(folder / "manifest.json", days)
        (self.store.evaluations / f"{name}.json").write_text(json.dumps({"artifact": key(name), "agreement": 1}))
        return folder.relative_to(self.store.root).as_posix()

    def run(self, *, names: tuple[str, ...] = (), seed: int = 0, days: float = 0, end: str = "done") -> RunFolder:
        """Make a run of a/r4 and b/r4 by a process that has died, ``days`` ago; its report names ``names`` for a/r4."""
        file = self.folder / "job.yaml"
        file.write_text(
            f"{{version: 1, name: t, output: {self.store.root}, seed: {seed}, "
            "models: [{program: a.pt2}, {program: b.pt2}], bit_plans: [{name: r4, method: rtn, bits: 4}]}"
        )
        loaded = load_job(file)
        run = start_run(self.store, freeze(loaded, expand(loaded))).run
        for number, name in enumerate(names):
            row = ModelRow(run.run_id, "a/r4", "a", "r4", "rtn", "done", datetime.now(UTC), artifact=name)
            write_part(run.path, row, [], f"a{number}")
        if end:
            subprocess.run([sys.executable, "-c", DIES, str(run.path), end], check=True)
        for written in (run.tasks_file, *run.ledger.glob("*")):
            age(written, days)
        return run

    def gc(self, delete: bool = True, **rules: object) -> GcResult:
        return collect_garbage(self.store.root, GcRules(**rules), delete=delete)  # type: ignore[arg-type]

    def left(self) -> set[str]:
        return {path.relative_to(self.store.root).as_posix() for path in self.store.artifacts.glob("*/*/*")}


DIES = """
import sys; from pathlib import Path
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.store import RunFolder
ledger = Ledger(RunFolder(Path(sys.argv[1])))
for task in ("a/r4", "b/r4"):
    ledger.append(Event(Kind.TASK_STARTED, task=task, attempt="1"))
    if sys.argv[2] == "done":
        ledger.append(Event(Kind.TASK_FINISHED, task=task, attempt="1", status="done"))
"""


def age(path: Path, days: float) -> None:
    at = time.time() - days * DAY
    os.utime(path, (at, at))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def paths(result: GcResult, kind: str = "artifact") -> list[str]:
    return [item.path for item in result.items if item.kind == kind]


def test_a_dry_run_says_what_would_go_and_removes_nothing(bench: Bench) -> None:
    kept, lost = bench.artifact("kept"), bench.artifact("lost")
    bench.run(names=(kept,))
    before = sorted(bench.store.root.rglob("*"))
    result = bench.gc(delete=False, unreferenced=True)
    assert sorted(bench.store.root.rglob("*")) == before
    assert (paths(result), paths(result, "evaluation")) == ([lost], ["evaluations/lost.json"])
    assert result.bytes == 1000 + (bench.store.evaluations / "lost.json").stat().st_size
    assert "would remove 1 artifact, 1 evaluation: 0.00 MiB; --delete does it" in result.to_text()
    assert bench.gc(unreferenced=True).items == result.items
    assert bench.left() == {kept}
    assert sorted(path.name for path in bench.store.evaluations.iterdir()) == ["kept.json"]
    assert list(bench.store.attempts.iterdir()) == []
    assert bench.gc(unreferenced=True).items == []


def test_what_an_unfinished_run_may_use_stays_until_an_age_or_a_count_says_so(bench: Bench) -> None:
    names = [bench.artifact(name, days=days) for name, days in (("new", 1), ("middle", 10), ("old", 40))]
    bench.run(end="started")
    assert bench.gc(unreferenced=True).items == []
    assert paths(bench.gc(delete=False, keep_last=1)) == names[1:]
    assert paths(bench.gc(delete=False, older_than_s=30 * DAY)) == names[2:]
    assert paths(bench.gc(delete=False, older_than_s=30 * DAY, unreferenced=True)) == []
    assert paths(bench.gc(keep_last=2, older_than_s=5 * DAY)) == names[2:]
    assert bench.left() == set(names[:2])


def test_counts_are_of_a_model_and_plan(bench: Bench) -> None:
    names = [bench.artifact(f"{task[0]}{days}", task, days) for task in ("a/r4", "b/r4") for days in (1, 2, 3)]
    assert paths(bench.gc(keep_last=1)) == [names[1], names[2], names[4], names[5]]


def test_old_finished_runs_go_and_take_their_references_along(bench: Bench) -> None:
    one, two = bench.artifact("one"), bench.artifact("two")
    old, new = bench.run(names=(one,), days=100), bench.run(names=(two,), seed=1, days=10)
    unfinished = bench.run(seed=2, days=100, end="started")
    assert paths(bench.gc(delete=False, runs_older_than_s=200 * DAY, unreferenced=True), "run") == []
    result = bench.gc(runs_older_than_s=90 * DAY)
    assert [item.path for item in result.items] == [f"runs/{old.run_id}"]
    assert [run.run_id for run in bench.store.run_folders()] == [new.run_id, unfinished.run_id]
    assert bench.left() == {one, two}
    for path in unfinished.ledger.iterdir():
        path.unlink()
    bench.gc(unreferenced=True)
    assert bench.left() == {one, two}  # the unfinished run may still come to reuse them


def test_what_a_run_at_work_uses_stays_whatever_is_asked(bench: Bench) -> None:
    names = {bench.artifact(name, task, 100) for name, task in (("x", "a/r4"), ("y", "a/r4"), ("z", "b/r4"))}
    other = bench.artifact("other", "c/r4", 100)
    run = bench.run(end="")
    ledger = Ledger(run)
    ledger.append(Event(Kind.TASK_STARTED, task="a/r4", attempt="1"))
    result = bench.gc(older_than_s=DAY, keep_last=None)
    ledger.close()
    assert paths(result) == [other]
    assert bench.left() == names
    assert result.notes == [f"{run.path} is at work: what its tasks use stays"]


def test_a_run_that_begins_while_we_look_keeps_what_it_may_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = bench.artifact("own", days=9), bench.artifact("other", "c/r4", 9)
    ledger = Ledger(bench.run())

    def late(_: Path) -> list[Path]:
        ledger.append(Event(Kind.TASK_STARTED, task="a/r4", attempt="2"))
        return []

    monkeypatch.setattr(gc, "abandoned", late)
    result = bench.gc(older_than_s=DAY)
    ledger.close()
    assert [item.path for item in result.items] == [other, "evaluations/other.json"]
    assert bench.left() == {own}
    assert (bench.store.evaluations / "own.json").is_file()


@pytest.mark.parametrize("what", ["tasks.json", "report"])
def test_a_run_that_cannot_be_read_may_use_anything_it_has_tasks_for(bench: Bench, what: str) -> None:
    own, other = bench.artifact("own"), bench.artifact("other", "c/r4")
    run = bench.run()
    if what == "report":
        (run.report / "models").mkdir(parents=True)
    (run.path / ("report/models/torn.parquet" if what == "report" else what)).write_bytes(b"torn")
    assert paths(bench.gc(unreferenced=True)) == ([other] if what == "report" else [])
    assert own in bench.left()


def test_leftovers_and_old_claims_go_with_every_criterion(bench: Bench) -> None:
    run = bench.run()
    code = "import sys; from pathlib import Path; from dfmpc.artifact.attempts import new_attempt\n"
    code += "(new_attempt(Path(sys.argv[1]), 'k' * 64) / 'half').write_bytes(b'x' * 10)"
    subprocess.run([sys.executable, "-c", code, str(bench.store.root)], check=True)
    ours = new_attempt(bench.store.root, "o" * 64)
    (claim,) = [path for path in bench.store.claims.iterdir() if path.suffix != ".made"]
    assert paths(bench.gc(runs_older_than_s=DAY), "claim") == []
    for path in bench.store.claims.iterdir():
        age(path, 8)
    assert paths(bench.gc(runs_older_than_s=DAY), "claim") == [
        f"runs/.claims/{claim.name}",
        f"runs/.claims/{claim.name}.made",
    ]
    assert list(bench.store.claims.iterdir()) == []
    assert sorted(path.name for path in bench.store.attempts.iterdir()) == [ours.name, f"{ours.name}.owner.json"]
    assert run.tasks_file.is_file()


def test_logits_and_scores_that_do_not_say_whose_they_are_go_by_age(bench: Bench) -> None:
    for name, days in (("logits.safetensors", 40), ("fresh.safetensors", 1), ("earlier.json", 40)):
        (bench.store.evaluations / name).write_text("{}")
        age(bench.store.evaluations / name, days)
    assert bench.gc(unreferenced=True).items == []
    assert paths(bench.gc(older_than_s=30 * DAY), "evaluation") == [
        "evaluations/earlier.json",
        "evaluations/logits.safetensors",
    ]


KILLED = """
import os, signal, sys; from pathlib import Path
import dfmpc.run.gc as gc
left, rename = int(sys.argv[2]), os.rename
def renamed(source, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = renamed
gc.discard = lambda _: os.kill(os.getpid(), signal.SIGKILL)
gc.collect_garbage(Path(sys.argv[1]), gc.GcRules(keep_last=1), delete=True)
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_leaves_whole_artifacts_or_none(bench: Bench, renames: int) -> None:
    names = [bench.artifact(name, days=days) for days, name in enumerate(("new", "middle", "old"))]
    command = [sys.executable, "-c", KILLED, str(bench.store.root), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert bench.left() == {names[0], *names[1 + renames :]}
    for name in bench.left():
        folder = bench.store.root / name
        assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert len(sweep(bench.store.root)) == 1
    assert list(bench.store.attempts.iterdir()) == []
    bench.gc(keep_last=1)
    assert bench.left() == {names[0]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "gc needs a criterion: --keep-last N, --older-than AGE, --unreferenced or --runs-older-than AGE"),
        (("--keep-last", "0"), "--keep-last 0: give 1 or more"),
        (("--older-than", "30"), "--older-than '30': expected a number and s, m, h, d or w, such as 30d or 12h"),
        (("--runs-older-than", "d"), "--runs-older-than 'd': expected a number"),
    ],
)
def test_a_command_that_asks_for_nothing_or_nonsense_ends_with_2(
    bench: Bench, arguments: tuple[str, ...], said: str
) -> None:
    result = CliRunner().invoke(cli.app, ["gc", str(bench.store.root), *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_command_shows_and_removes(bench: Bench) -> None:
    bench.artifact("new"), bench.artifact("old", days=40)
    shown = CliRunner().invoke(cli.app, ["gc", str(bench.store.root), "--older-than", "30d"])
    assert shown.exit_code == 0
    assert f"artifact    0.00  artifacts/a/r4/{key('old')[:12]}  made 40 days ago" in shown.stdout
    arguments = ["gc", str(bench.store.root), "--older-than", "30d", "--delete", "--json"]
    document = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    assert (document["deleted"], [item["kind"] for item in document["items"]]) == (True, ["artifact", "evaluation"])
    assert len(bench.left()) == 1


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent is no store \(it has no runs or no artifacts folder\)"):
        collect_garbage(tmp_path / "absent", EVERYTHING)
