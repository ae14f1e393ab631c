"""Compiled kernels are loaded and run, so nobody else may write where they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dfmpc.run.schedule.process import triton_cache


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder's usual name, in scratch space of this test."""
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch" / f"dfmpc-triton-{os.getuid()}"


def test_the_folder_is_made_for_this_user_alone_and_stays(wanted: Path) -> None:
    assert triton_cache() == triton_cache() == str(wanted)
    assert wanted.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_an_earlier_run_is_taken(wanted: Path) -> None:
    wanted.mkdir(mode=0o755)
    assert triton_cache() == str(wanted)


def _writable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def _file(folder: Path) -> None:
    folder.touch(mode=0o600)


def _foreign(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, -1)


ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")


@pytest.mark.parametrize("plant", [_writable, _link, _file, pytest.param(_foreign, marks=ROOT_ONLY)])
def test_what_somebody_may_have_planted_there_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, wanted: Path, plant: Callable[[Path], None], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plant(wanted)
    found = Path(triton_cache())
    assert found.parent == tmp_path
    assert found.stat().st_mode & 0o777 == 0o700
    assert (found.stat().st_uid, triton_cache()) == (os.getuid(), str(found))
    assert list(wanted.parent.rglob("dfmpc-triton-*")) == [wanted]


def test_without_the_scratch_space_there_is_another_place(
    monkeypatch: pytest.MonkeyPatch, wanted: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted.parent.rmdir()
    wanted.parent.touch()
    assert Path(triton_cache()).parent == tmp_path
