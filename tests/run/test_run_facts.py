"""What a page tells of a real run: time, logs, the weights of its artifacts and of the originals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from dfmpc import cli
from dfmpc.artifact.loader import load_state_dict
from dfmpc.report.parts import read_models
from dfmpc.run.facts import read_facts, wall_seconds
from dfmpc.run.ledger import Event, Kind
from dfmpc.run.store import RunFolder, find_run
from typer.testing import CliRunner, Result

PLANS = [{"name": "r2", "method": "rtn", "bits": 2}, {"name": "r8", "method": "rtn", "bits": 8}]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def event(process: str, second: float) -> Event:
    return Event(Kind.TASK_STARTED, at=f"2025-01-02T03:04:{second:09.6f}+00:00", process=process)


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ({}, None),
        ({"a": (1, 1)}, 0.0),
        ({"a": (0, 5), "b": (1, 3)}, 5.0),
        ({"a": (0, 5), "b": (4.5, 7.5)}, 7.5),
        ({"a": (0, 5), "b": (20, 22.25)}, 7.25),
    ],
    ids=["none", "one event", "inside", "overlap", "resumed"],
)
def test_wall_time_leaves_out_when_nobody_was_at_it(spans: dict[str, tuple[float, float]], seconds: float | None):
    assert wall_seconds(event(name, at) for name, span in spans.items() for at in span) == seconds


@pytest.fixture
def run(bench) -> RunFolder:
    """A finished run of a network at two bit-plans, and of a checkpoint that is none."""
    (bench.folder / "torn.safetensors").write_bytes(b"no checkpoint")
    models = [bench.model("net"), bench.model("torn", checkpoint="torn.safetensors")]
    assert call("run", bench.job(models, PLANS), "--devices", "cpu").exit_code == 3
    return find_run(bench.store)


def embedded(page: Path) -> list[dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])["models"]


def counts(weight: torch.Tensor, edge: float) -> list[int]:
    edges = torch.linspace(-edge, edge, 65, dtype=torch.float64)
    places = torch.bucketize(weight.double().flatten().clamp(-edge, edge), edges, right=True).clamp(1, 64) - 1
    return torch.bincount(places, minlength=64).tolist()


def test_a_page_counts_the_weights_of_artifacts_and_of_the_original(run: RunFolder, bench, tmp_path: Path):
    pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'dfmpc[html]'")
    page = tmp_path / "page.html"
    ended = call("report", run.path, "--html", page, "--histograms", 2)
    assert (ended.exit_code, ended.stdout.split(": ")[0]) == (0, str(page))
    model = next(found for found in embedded(page) if found["name"] == "net")
    assert list(model["histograms"]) == model["worst"][:2]
    original = bench.state()
    artifacts = {row.bit_plan: run.store.root / row.artifact for row in read_models(run.path) if row.artifact}
    for name, found in model["histograms"].items():
        weight = original[f"{name}.weight"]
        edge = float(weight.abs().max())
        assert found["edge"] == pytest.approx(edge, rel=1e-4)
        assert found["before"] == counts(weight, edge)
        for plan in ("r2", "r8"):
            assert found["after"][plan] == counts(load_state_dict(artifacts[plan])[f"{name}.weight"], edge)

    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in original.items()}
    bench.checkpoint("net", other)
    call("report", run.path, "--html", page, "--only", "net/*")
    (model,) = embedded(page)
    assert [found["before"] for found in model["histograms"].values()] == [[]] * len(model["histograms"])
    assert "net.safetensors has changed since it was compressed" in page.read_text()

    (artifacts["r2"] / "model.safetensors").write_bytes(b"")
    (bench.folder / "net.safetensors").unlink()
    assert call("report", run.path, "--html", page).exit_code == 0
    text = page.read_text()
    assert "weights after r2 are not shown" in text
    assert "net.safetensors: no such file" in text


def test_facts_have_the_ends_of_logs_and_what_has_no_result(run: RunFolder):
    rows = read_models(run.path)
    facts = read_facts(run, rows, {row.task for row in rows})
    assert facts.job == "bench"
    assert facts.store == str(run.store.root)
    assert facts.rest == {}
    assert facts.wall_s is not None
    assert facts.wall_s > 0
    assert set(facts.log_tails) == {"torn/r2", "torn/r8"}
    assert "CheckpointError" in facts.log_tails["torn/r2"][-1]


def test_markdown_goes_to_a_file_or_is_printed(run: RunFolder, tmp_path: Path):
    printed = call("report", run.path, "--markdown", "-")
    assert printed.stdout.startswith("## ❌ bench: 2 tasks failed")
    file = tmp_path / "page.md"
    assert call("report", run.path, "--markdown", file).stdout.startswith(f"{file}: ")
    assert file.read_text() == printed.stdout
    assert json.loads(call("report", run.path, "--markdown", file, "--json").stdout) == {
        "files": [{"path": str(file), "bytes": file.stat().st_size}]
    }


def test_a_page_without_a_folder_is_refused(run: RunFolder, tmp_path: Path):
    ended = call("report", run.path, "--html", tmp_path / "none" / "page.html")
    assert ended.exit_code == 2
    assert "its folder does not exist: make it, or write elsewhere" in ended.stderr
    assert not (tmp_path / "none").exists()


def test_a_page_says_where_weights_after_are_without_the_scales_that_norms_hold(bench, tmp_path: Path):
    pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'dfmpc[html]'")
    how = {"method": "dfmpc", "calibrator": "analytic"}
    plans = [{"name": "beside", **how}, {"name": "folded", **how, "fold_scales": True}]
    assert call("run", bench.job([bench.model("net")], plans), "--devices", "cpu").exit_code == 0
    page = tmp_path / "page.html"
    assert call("report", find_run(bench.store).path, "--html", page, "--histograms", 9).exit_code == 0
    text = page.read_text()
    assert "weights after folded are shown as stored" in text
    assert "weights after beside are shown as stored" not in text
