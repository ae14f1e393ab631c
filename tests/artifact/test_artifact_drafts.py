"""What is written under another name first, and who removes it when its writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dfmpc.artifact.commit import sweep
from dfmpc.artifact.owner import draft_is_dead, draft_of
from dfmpc.artifact.storage import write_atomically

KILLED = """
import os, signal, sys
from pathlib import Path
from dfmpc.artifact import storage
storage.write_durably = lambda path, data: (path.write_bytes(data[:3]), os.kill(os.getpid(), signal.SIGKILL))
storage.write_atomically(Path(sys.argv[1]), b"content")
"""


def drafts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


@pytest.mark.parametrize("where", ["evaluations/settings", "runs/one/report/models"])
def test_what_a_killed_writer_left_is_swept(tmp_path: Path, where: str) -> None:
    folder = tmp_path / where
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder / "scores.json")], check=False)
    assert killed.returncode == -9
    (left,) = drafts(folder)
    assert left.read_bytes() == b"con"
    mine = draft_of(folder / "scores.json")
    mine.write_bytes(b"")
    sweep(tmp_path)
    assert drafts(folder) == [mine]


@pytest.mark.parametrize("name", [".scores.json.0123abcd-4026531836-1-1-0123456789ab.tmp", ".scores.json.other.tmp"])
def test_what_another_host_or_version_wrote_is_left_for_a_week(tmp_path: Path, name: str) -> None:
    draft = tmp_path / "evaluations" / name
    draft.parent.mkdir()
    draft.write_bytes(b"")
    assert draft_is_dead(draft) is None
    sweep(tmp_path)
    assert draft.exists()
    os.utime(draft, (0, 0))
    sweep(tmp_path)
    assert not draft.exists()


def test_a_draft_is_told_by_its_process_and_gone_when_it_has_its_name(tmp_path: Path) -> None:
    mine = draft_of(tmp_path / "a.json")
    assert mine.name.startswith(".a.json.")
    assert draft_is_dead(mine) is False
    write_atomically(tmp_path / "a.json", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
