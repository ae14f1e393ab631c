"""What a store's file system must give; what is missing is played by replacing one call of the system."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dfmpc.errors import UsageError
from dfmpc.run import filesystem
from dfmpc.run.filesystem import check_filesystem, describe


def _refuse(number: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


RENAME = os.rename


def _rename_onto(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    RENAME(source, target)


def _link_anyway(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def test_a_local_disk_will_do_quickly_and_nothing_is_left(tmp_path: Path) -> None:
    check_filesystem(tmp_path)
    started = time.thread_time()  # not what other threads of this process do meanwhile
    check_filesystem(tmp_path)
    assert time.thread_time() - started < 0.1
    assert os.listdir(tmp_path / ".attempts") == []


@pytest.mark.parametrize(
    ("call", "played", "said"),
    [
        ("rename", _rename_onto, r"renaming a folder must move it whole .* \(it does not\)"),
        ("rename", _refuse(errno.EXDEV), r"renaming a folder .* \(Invalid cross-device link\)"),
        ("link", _refuse(errno.EPERM), r"a hard link must be made.* \(Operation not permitted\)"),
        ("link", _link_anyway, r"a hard link must .* \(it does not\)"),
    ],
)
def test_what_is_missing_is_named_with_the_path_and_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, played: Callable[..., None], said: str
) -> None:
    monkeypatch.setattr(os, call, played)
    with pytest.raises(UsageError, match=said) as caught:
        check_filesystem(tmp_path)
    assert f"output {tmp_path} is on {describe(tmp_path)}" in str(caught.value)
    assert "choose another --output" in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(tmp_path / ".attempts") == []


def test_appends_that_overwrite_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **how: opened(path, flags & ~os.O_APPEND, *rest, **how))
    with pytest.raises(UsageError, match=r"O_APPEND must be written at the end \(it does not\)"):
        check_filesystem(tmp_path)


def test_an_fsync_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, iter(range(100))
    monkeypatch.setattr(os, "fsync", lambda file: fsync(file) if next(calls) == 0 else _refuse(errno.EIO)())
    with pytest.raises(UsageError, match=r"fsync must bring files to the disk \(Input/output error\)"):
        check_filesystem(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / ".attempts").write_text("in the way")
    with pytest.raises(UsageError, match="cannot hold a store: "):
        check_filesystem(tmp_path)


MOUNTS = r"""
22 1 0:20 / / rw,relatime - ext4 /dev/sda1 rw
23 22 0:21 / /data rw,relatime shared:1 - xfs /dev/sdb1 rw
24 23 0:22 / /data/shared\040store rw shared:2 - nfs4 server:/export\040one rw,vers=4.2
25 23 0:23 / /data rw - tmpfs tmpfs rw
""".strip().splitlines()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc", "ext4 (/dev/sda1 on /)"),
        ("/data/shared store/nightly", "nfs4 (server:/export one on /data/shared store)"),
        ("/data/shared", "tmpfs (tmpfs on /data)"),
        ("/database", "ext4 (/dev/sda1 on /)"),
    ],
)
def test_the_deepest_and_latest_mount_counts(path: str, expected: str) -> None:
    assert filesystem._describe(MOUNTS, Path(path)) == expected


def test_a_system_without_mountinfo_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_MOUNTS", tmp_path / "absent")
    assert describe(tmp_path) == "a file system of a kind that is not known here"
