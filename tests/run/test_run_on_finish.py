"""The operator's command at the end of a run, with real shells."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from dfmpc.run.on_finish import run_on_finish

SUMMARY = json.dumps({"models": [{"task": "netz/ä", "status": "done"}] * 5000})


def test_it_gets_the_summary_and_the_run_and_prints_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, kept = tmp_path / "a run's folder", tmp_path / "kept"
    command = f'cat > {kept}; echo "$DFMPC_EXIT_CODE|$DFMPC_RUN|$HOME"'
    assert run_on_finish(command, SUMMARY, run, 3)
    assert kept.read_text() == SUMMARY
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", f"3|{run}|{os.environ['HOME']}\n")


def test_a_command_that_reads_nothing_is_fine(tmp_path: Path) -> None:
    assert run_on_finish("true", SUMMARY, tmp_path, 0)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("exit 7", "--on-finish 'exit 7' ended with exit code 7"),
        ("no-such-command-here", "ended with exit code 127"),
        ("kill -9 $$", "was ended by SIGKILL"),
        ("a\0b", "could not be started"),
    ],
)
def test_a_failure_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, said: str) -> None:
    assert not run_on_finish(command, SUMMARY, tmp_path, 0)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("dfmpc: warning: ")
    assert said in last


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers"
    command = f"sleep 600 & echo $! $$ > {numbers}; wait"
    started = time.monotonic()
    assert not run_on_finish(command, SUMMARY, tmp_path, 0, timeout_s=3)
    assert time.monotonic() - started < 30
    assert "was ended after 3 s" in capfd.readouterr().err
    child, shell = map(int, numbers.read_text().split())
    assert _ended(shell)
    end = time.monotonic() + 30  # a signal that was sent may still be on its way to a process that gets no turn
    while not _ended(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def _ended(number: int) -> bool:
    """Tell whether a process has ended; one that nobody has waited for yet still has a name."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
