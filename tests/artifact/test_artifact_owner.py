"""Whether the process behind an attempt lives: judged only where it can be, also by machines that share a host name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dfmpc.artifact import owner as owner_module
from dfmpc.artifact.attempts import new_attempt, owner_file, sweep
from dfmpc.artifact.owner import Owner, read_owner

FIRST = "pid:[4026531836]"
HOLDER = """
import sys
from pathlib import Path
from dfmpc.artifact.attempts import new_attempt
print(new_attempt(Path(sys.argv[1]), "0" * 64), flush=True)
sys.stdin.read()
"""
SWEEPER = """
import sys
from pathlib import Path
from dfmpc.artifact.attempts import sweep
print(*sweep(Path(sys.argv[1])), flush=True)
"""
AS_MACHINE = """
mount --bind "$0" /proc/sys/kernel/random/boot_id && mount --bind "$1" /etc/machine-id && shift && exec "$@"
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Path]:
    """Return an attempt in the store ``tmp_path`` whose process lives."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.communicate()


def _swept_by_a_machine(store: Path, machine: str) -> list[Path]:
    """Return what a process with another boot, on the machine of this identity, removes from the store."""
    boot_file, machine_file = store / "boot_id", store / "machine-id"
    boot_file.write_text("00000000-1111-2222-3333-444444444444\n")
    machine_file.write_text(f"{machine}\n")
    words = ["unshare", "--mount", "bash", "-c", AS_MACHINE, str(boot_file), str(machine_file)]
    done = subprocess.run(
        [*words, sys.executable, "-c", SWEEPER, str(store)], capture_output=True, text=True, check=False
    )
    if any(word in done.stderr for word in ("unshare:", "mount:")):
        pytest.skip(f"needs to mount over /proc: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


def test_a_machine_of_the_same_name_leaves_what_another_one_is_at(tmp_path: Path, holder: Path) -> None:
    assert _swept_by_a_machine(tmp_path, "f" * 32) == []
    assert holder.is_dir()
    old = holder.stat().st_mtime - 8 * 24 * 3600
    os.utime(holder, (old, old))
    assert _swept_by_a_machine(tmp_path, "f" * 32) == [holder], "by age, as of any other host"


@pytest.mark.skipif(
    os.readlink("/proc/self/ns/pid") != FIRST or not Path("/etc/machine-id").is_file(),
    reason="needs to be no container",
)
def test_a_machine_sweeps_what_it_was_at_before_it_started_anew(tmp_path: Path, holder: Path) -> None:
    ours = Path("/etc/machine-id").read_text().strip()
    assert _swept_by_a_machine(tmp_path, ours) == [holder]


@pytest.mark.parametrize(
    ("changed", "dead"),
    [
        ({}, False),
        ({"started": "1"}, True),
        ({"boot": "earlier"}, True),
        ({"boot": "earlier", "machine": "another"}, None),
        ({"boot": "earlier", "machine": ""}, None),
        ({"boot": "", "machine": ""}, None),
        ({"host": "elsewhere"}, None),
        ({"namespace": "pid:[1]"}, None),
    ],
)
def test_it_is_judged_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], dead: bool | None
) -> None:
    monkeypatch.setattr(owner_module, "_machine", lambda: "this")
    monkeypatch.setattr(owner_module, "_namespace", lambda: FIRST)
    assert replace(Owner.current(), **changed).is_dead() is dead


def test_in_a_container_an_earlier_boot_is_not_told_from_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may run one image, with one host name, one machine-id and, by chance, namespaces of one number."""
    monkeypatch.setattr(owner_module, "_machine", lambda: "of the image")
    monkeypatch.setattr(owner_module, "_namespace", lambda: "pid:[4026532201]")
    ours = Owner.current()
    assert (ours.is_dead(), replace(ours, boot="other").is_dead()) == (False, None)


def test_owners_of_other_versions_are_read(tmp_path: Path) -> None:
    fields = Owner.current().to_dict()
    older = {name: value for name, value in fields.items() if name != "machine"}
    file = owner_file(new_attempt(tmp_path, "0" * 64))
    file.write_text(json.dumps(older))
    read = read_owner(file)
    assert read == replace(Owner.current(), machine="")
    assert read.is_dead() is False
    file.write_text(json.dumps({**older, "started": "1"}))
    assert len(sweep(tmp_path)) == 1
    assert Owner.parse({**fields, "rack": "7"}) == Owner.current()
    assert [Owner.parse(content) for content in ("x", {}, {**fields, "pid": "1"}, {**fields, "host": 1})] == [None] * 4
