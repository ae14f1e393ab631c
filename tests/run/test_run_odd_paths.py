"""A store, a job file and a checkpoint whose names hold spaces, quotes, a backslash, `$` and a line break."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dfmpc.run.store import Store

pytestmark = pytest.mark.slow
ODD = 'it\'s "one" $(of\\our)\nfolders'
PLANS: list[dict[str, object]] = [{"name": "r4", "method": "rtn", "bits": 4}]


def dfmpc(*words: object) -> str:
    """Return what a command that must end with 0 says, without what it says on stderr."""
    line = [sys.executable, "-m", "dfmpc.cli", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def odd(bench: Any, make_bench: Callable[[Path], Any]) -> Any:
    folder: Path = bench.folder / ODD
    folder.mkdir()
    return make_bench(folder)


def test_every_command_works_where_the_names_are_odd(odd: Any) -> None:
    checkpoint = odd.checkpoint(f"{ODD} ", odd.state())
    job = odd.job([odd.model("net", "plain", checkpoint=checkpoint)], PLANS, resources={"devices": "cpu"})
    job = job.rename(odd.folder / f"{ODD}.yaml")
    metrics, told = odd.folder / f"{ODD}.prom", odd.folder / "told"
    first = dfmpc("run", job, "--json", "--metrics", metrics, "--on-finish", f"cat > {shlex.quote(str(told))}")
    run = Path(json.loads(first)["run"])
    assert run.parent.parent == odd.store
    assert [row["status"] for row in json.loads(first)["models"]] == ["done"]
    assert json.loads(told.read_text())["run"] == str(run)
    assert 'dfmpc_tasks{status="done"} 1' in metrics.read_text()
    (artifact,) = Store(odd.store).artifacts.glob("*/*/*")
    second = dfmpc("run", job, "--json")
    assert [row["status"] for row in json.loads(second)["models"]] == ["reused"]

    state = json.loads(dfmpc("status", run, "--json"))
    assert (state["run"], state["done"], state["finished"]) == (str(run), 1, True)
    assert dfmpc("status", odd.store, "--watch").endswith("; 1 reused\n")
    page = odd.folder / f"{ODD}.html"
    dfmpc("report", odd.store, "--html", page)
    assert "net" in page.read_text()
    assert json.loads(dfmpc("report", run, "--json"))["models"][0]["task"] == "net/r4"
    assert "net/r4" in dfmpc("report", run, "--markdown", "-")
    assert json.loads(dfmpc("diff", odd.store, "--json"))["before"] == str(run)
    assert f"good  {artifact}" in dfmpc("verify", odd.store)
    exported = odd.folder / f"{ODD}.safetensors"
    dfmpc("export", odd.store / "latest" / "net" / "r4", "--format", "state-dict", "--output", exported)
    assert exported.stat().st_size > 0
    gone = json.loads(dfmpc("gc", odd.store, "--runs-older-than", "0s", "--delete", "--json"))
    assert [(item["kind"], item["path"]) for item in gone["items"][:1]] == [("run", f"runs/{run.name}")]
    assert not run.exists()
    assert artifact.is_dir()
    assert list(Store(odd.store).attempts.iterdir()) == []
