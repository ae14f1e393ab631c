"""docs/tour.md is run: every block in order, in one namespace and one folder, and what it prints is compared."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc import cli
from typer.testing import CliRunner

for extra in ("onnx", "onnxscript", "onnxruntime", "pandas", "duckdb"):
    pytest.importorskip(extra, reason="the tour needs pip install 'dfmpc[onnx]' pandas duckdb")

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXIT_CODES = {"dfmpc diff store": 4}
"""Of the tour's commands that do not end with 0."""


@dataclass
class Step:
    """A block of code, and what it has to print."""

    line: int
    language: str
    code: str
    printed: str = ""


def steps_of(text: str) -> list[Step]:
    found: list[Step] = []
    for match in _BLOCK.finditer(text):
        if match[1] == "text":
            assert not found[-1].printed, f"two outputs behind the block of line {found[-1].line}"
            found[-1].printed = match[2]
        else:
            found.append(Step(text.count("\n", 0, match.start()) + 2, match[1], match[2]))
    return found


def carry_out(step: Step, names: dict[str, Any], file: Path) -> str:
    """Run one block and return what it printed."""
    if step.language == "console":
        return "".join(command(line.removeprefix("$ ")) for line in step.code.splitlines())
    assert step.language == "python"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # the lines of a traceback are those of the file
        exec(compile("\n" * (step.line - 1) + step.code, str(file), "exec"), names)
    return printed.getvalue()


def command(line: str) -> str:
    name, *arguments = shlex.split(line)
    assert name == "dfmpc"
    ended = CliRunner().invoke(cli.app, arguments)
    assert ended.exit_code == EXIT_CODES.get(line, 0), ended.output
    return ended.stdout


def plain(text: str) -> list[str]:
    """Return the lines that are not empty, with one space where there are several."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def fits(expected: str, printed: str) -> bool:
    """Compare, ``…`` standing for anything within a line."""
    wanted, got = plain(expected), plain(printed)
    patterns = [".*".join(re.escape(part) for part in line.split("…")) for line in wanted]
    return len(wanted) == len(got) and all(map(re.fullmatch, patterns, got))


def test_an_output_that_differs_is_seen() -> None:
    assert fits("a  1\n\nb … c", "a 1\nb 2 c\n")
    assert not fits("a 1", "a 2")
    assert not fits("a 1", "a 1\nb")
    assert not fits("a.1", "a 1")
    assert [(one.language, one.printed) for one in steps_of("```python\nx\n```\n\n```text\n1\n```\n")] == [
        ("python", "1\n")
    ]


def test_the_tour_prints_what_it_says(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = project / "docs" / "tour.md"
    steps, names = steps_of(file.read_text(encoding="utf-8")), dict[str, Any]()
    assert len(steps) > 10
    with torch.random.fork_rng(devices=[]):
        for step in steps:
            printed = carry_out(step, names, file)
            assert fits(step.printed, printed), (
                f"{file}, line {step.line}: printed\n{printed}\nexpected\n{step.printed}"
            )
