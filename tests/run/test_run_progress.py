"""What a run says while nobody watches."""

from __future__ import annotations

import io

import pytest
from dfmpc.run.schedule import progress
from dfmpc.run.schedule.process import describe_exit
from dfmpc.run.schedule.progress import Progress

MIB = 2**20


def test_without_a_terminal_a_line_comes_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress({"a/p": 3 * MIB, "b/p": 5 * MIB}, shown=True)
    shown.finished("a/p")
    now[0] = 129.0
    shown.running(["b/p"])
    assert (shown.wait_s, capsys.readouterr().err) == (1.0, "")
    now[0] = 130.0
    shown.running(["b/p"])
    shown.running(["b/p"])
    assert capsys.readouterr().err == "dfmpc: 1 of 2 tasks, 3 of 8 MiB; at work: b/p\n"
    assert shown.wait_s == 30.0
    shown.close()


def test_a_bar_shows_the_running_task_before_any_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    shown = Progress({"a/p": MIB}, shown=True)
    shown.running(["a/p"])
    said = terminal.getvalue()
    shown.close()
    assert "a/p" in said


def test_switched_off_it_still_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress({"a/p": MIB}, shown=False)
    shown.running(["a/p"])
    shown.note("a/p failed: CheckpointError: torn")
    assert shown.wait_s is None
    assert capsys.readouterr().err == "dfmpc: a/p failed: CheckpointError: torn\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "ended with exit code 1"),
        (-9, "was ended by SIGKILL (often the kernel for want of memory"),
        (-15, "SIGTERM"),
    ],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)
