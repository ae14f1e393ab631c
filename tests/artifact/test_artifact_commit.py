from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from dfmpc.artifact.commit import commit, discard, new_attempt, sweep
from dfmpc.artifact.manifest import MANIFEST, TENSORS, inspect, is_complete, read_manifest
from dfmpc.artifact.manifest import damage as artifact_damage
from dfmpc.artifact.owner import Owner
from dfmpc.errors import StorageError

KEY = "0123456789ab" + "c" * 52
WEEK = 7 * 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def target_in(store: Path) -> Path:
    return store / "artifacts" / "net" / "plan" / KEY[:12]


def leftovers(store: Path) -> list[str]:
    return sorted(path.name for path in (store / ".attempts").iterdir())


def filled(store: Path, make: Callable[..., Any]) -> Path:
    attempt = new_attempt(store, KEY)
    make().write(attempt)
    return attempt


def write_owner(attempt: Path, owner: Owner) -> Path:
    path = attempt.with_name(attempt.name + ".owner.json")
    path.write_text(json.dumps(owner.to_dict()), encoding="utf-8")
    return path


def test_an_attempt_has_an_owner_beside_it(store: Path) -> None:
    attempt = new_attempt(store, KEY)
    assert attempt.parent == store / ".attempts"
    assert attempt.name.startswith("0123456789ab-")
    assert list(attempt.iterdir()) == []
    assert leftovers(store) == [attempt.name, f"{attempt.name}.owner.json"]
    owner = json.loads((store / ".attempts" / f"{attempt.name}.owner.json").read_text(encoding="utf-8"))
    assert owner["pid"] == os.getpid()
    assert owner["started"]
    discard(attempt)
    discard(attempt)
    assert leftovers(store) == []


def test_commit_renames_and_leaves_nothing(store: Path, make: Callable[..., Any]) -> None:
    attempt = filled(store, make)
    names = sorted(path.name for path in attempt.iterdir())
    assert commit(attempt, target_in(store)) is True
    assert sorted(path.name for path in target_in(store).iterdir()) == names == [MANIFEST, TENSORS]
    assert leftovers(store) == []


def test_the_second_committer_drops_its_own(store: Path, make: Callable[..., Any]) -> None:
    assert commit(filled(store, make), target_in(store))
    inode = target_in(store).stat().st_ino
    assert commit(filled(store, make), target_in(store)) is False
    assert target_in(store).stat().st_ino == inode
    assert leftovers(store) == []


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


READABLE = ("short_file", "flipped_byte", "missing_file")
"""Damages that leave the manifest."""
DAMAGES = (*READABLE, "no_manifest", "a_file", "empty_folder")


def break_artifact(target: Path, damage: str) -> None:
    if damage == "short_file":
        os.truncate(target / TENSORS, 10)
    elif damage == "flipped_byte":
        flip_last_byte(target / TENSORS)
    else:
        (target / (TENSORS if damage == "missing_file" else MANIFEST)).unlink()
    if damage in ("a_file", "empty_folder"):
        (target / TENSORS).unlink()
    if damage == "a_file":
        target.rmdir()
        target.write_bytes(b"x")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_what_can_be_read_of_the_manifest(
    store: Path, make: Callable[..., Any], damage: str
) -> None:
    target = target_in(store)
    commit(filled(store, make), target)
    whole = inspect(target)
    assert (whole.manifest, whole.findings) == (read_manifest(target), ())
    break_artifact(target, damage)
    found = inspect(target)
    assert list(found.findings) == artifact_damage(target) != []
    assert found.manifest == (whole.manifest if damage in READABLE else None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_target_is_replaced(store: Path, make: Callable[..., Any], damage: str) -> None:
    target = target_in(store)
    commit(filled(store, make), target)
    break_artifact(target, damage)
    assert artifact_damage(target)
    assert commit(filled(store, make), target) is True
    assert artifact_damage(target) == []
    aside = [] if damage == "empty_folder" else [KEY[:12] + "-broken-"]  # rename replaces an empty folder itself
    assert [name[: len(KEY[:12] + "-broken-")] for name in leftovers(store)] == aside


RACER = """
import sys
from pathlib import Path
from dfmpc.artifact.commit import commit
print("ready", flush=True)
for line in sys.stdin:
    attempt, target = line.rstrip("\\n").split("\\t")
    print(commit(Path(attempt), Path(target)), flush=True)
"""


def ask(process: subprocess.Popen[str], line: str) -> None:
    stdin: IO[str] | None = process.stdin
    assert stdin is not None
    stdin.write(line + "\n")
    stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_racing_processes_one_wins(store: Path, make: Callable[..., Any], tmp_path: Path) -> None:
    racers = [start(RACER) for _ in range(2)]
    written = tmp_path / "written"
    make().write(written)
    try:
        assert [answer(racer) for racer in racers] == ["ready", "ready"]
        for turn in range(24):
            target = target_in(store).with_name(f"{turn:012}")
            if turn % 3 == 0:  # both find a broken target
                target.mkdir(parents=True)
                (target / TENSORS).write_bytes(b"torn")
            attempts = [new_attempt(store, KEY) for _ in racers]
            for attempt in attempts:
                shutil.copytree(written, attempt, dirs_exist_ok=True)
            for racer, attempt in zip(racers, attempts, strict=True):
                ask(racer, f"{attempt}\t{target}")
            assert sorted(answer(racer) for racer in racers) == ["False", "True"]
            assert is_complete(target)
        assert [name for name in leftovers(store) if "-broken-" not in name] == []
    finally:
        for racer in racers:
            racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0]


HOLDER = """
import sys
from pathlib import Path
from dfmpc.artifact.attempts import new_attempt
attempt = new_attempt(Path(sys.argv[1]), sys.argv[2])
(attempt / "model.safetensors").write_bytes(b"half")
assert "torch" not in sys.modules
print(attempt, flush=True)
sys.stdin.read()
"""


def test_sweep_removes_what_a_killed_process_left(store: Path) -> None:
    holder = start(HOLDER, str(store), KEY)
    attempt = Path(answer(holder))
    assert sweep(store) == []
    assert attempt.is_dir()
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # ended, its parent has not asked for it yet
    assert sweep(store) == [attempt]
    assert leftovers(store) == []
    holder.communicate()


def test_sweep_keeps_this_process_and_tells_it_from_an_older_one_of_its_number(store: Path) -> None:
    ours, older = new_attempt(store, KEY), new_attempt(store, KEY)
    write_owner(older, replace(Owner.current(), started="1"))
    assert sweep(store) == [older]
    assert ours.is_dir()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}], ids=["host", "container"])
def test_sweep_waits_a_week_for_others(store: Path, other: dict[str, str]) -> None:
    attempt = new_attempt(store, KEY)
    write_owner(attempt, replace(Owner.current(), **other))
    assert sweep(store) == []
    old = attempt.stat().st_mtime - WEEK - 60
    os.utime(attempt, (old, old))
    assert sweep(store) == [attempt]
    assert leftovers(store) == []


def test_sweep_of_owners_without_folders(store: Path) -> None:
    alive, dead = new_attempt(store, KEY), new_attempt(store, KEY)
    write_owner(dead, replace(Owner.current(), started="1"))
    alive.rmdir()
    dead.rmdir()
    assert sweep(store) == []
    assert leftovers(store) == [f"{alive.name}.owner.json"]


def test_sweep_of_no_store(store: Path) -> None:
    assert sweep(store) == []
    assert not store.exists()


def test_commit_without_an_attempt_is_a_storage_error(store: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written: No such file or directory \(ENOENT\)"):
        commit(store / ".attempts" / "gone", target_in(store))


def test_a_store_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match=r"store: cannot be written: Not a directory \(ENOTDIR\)"):
        new_attempt(tmp_path / "file" / "store", KEY)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "read-only: remount it or choose another --output"),
        (errno.EACCES, "permission denied: make the folder writable"),
        (errno.EDQUOT, "quota is used up: free some space"),
    ],
    ids=["EROFS", "EACCES", "EDQUOT"],
)
def test_simulated_errors_of_the_system_are_named(
    store: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    attempt = new_attempt(store, KEY)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("dfmpc.artifact.commit.os.rename", refuse)
    with pytest.raises(StorageError, match=rf"{KEY[:12]}: cannot be written: .*{errno.errorcode[code]}.*{remedy}"):
        commit(attempt, target_in(store))
    assert not target_in(store).exists()


def test_a_rename_whose_answer_was_lost_counts(
    store: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, rename = filled(store, make), os.rename

    def lose_the_answer(source: Path, target: Path) -> None:
        rename(source, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr("dfmpc.artifact.commit.os.rename", lose_the_answer)
    assert commit(attempt, target_in(store)) is True
    assert (target_in(store) / MANIFEST).is_file()
    assert leftovers(store) == []


def test_an_artifact_repaired_meanwhile_is_put_back(
    store: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(filled(store, make), target_in(store))
    inode, looks = target_in(store).stat().st_ino, iter(["model.safetensors: missing"])
    monkeypatch.setattr("dfmpc.artifact.commit.damage", lambda _: list(filter(None, [next(looks, None)])))
    assert commit(filled(store, make), target_in(store)) is False
    assert target_in(store).stat().st_ino == inode
    assert leftovers(store) == []
