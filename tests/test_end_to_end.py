"""Whole runs over tiny networks: a job file in, artifacts and report out, and what bad models do to the others."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import pydoc
import resource
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import dfmpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dfmpc.artifact.verify import find_artifacts, verify
from dfmpc.evaluate.scores import evaluate_artifact
from dfmpc.evaluate.settings import settings_for
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.report.parts import read_layers, read_models
from dfmpc.report.rows import ModelRow
from dfmpc.run.begin import RunOptions, RunSummary, run_job
from PIL import Image
from torch import nn

IMAGES: dict[str, object] = {"name": "synthetic", "images": 32}
MP: dict[str, object] = {"name": "mp", "method": "dfmpc", "low": 2, "high": 6, "calibrator": IMAGES}
PUBLISHED: dict[str, object] = {"name": "published", "method": "dfmpc", "recipe": "published"}
R4: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}
R2: dict[str, object] = {"name": "r2", "method": "rtn", "bits": 2}


def _run(job: Path, devices: str = "cpu") -> RunSummary:
    return run_job(load_job(job), RunOptions(progress=False, devices=devices, explain=True))


def _digests(store: Path) -> dict[str, str]:
    files = sorted(file for file in (store / "artifacts").rglob("*") if file.is_file())
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _network(bench: Any, seed: int = 0) -> nn.Module:
    units = [
        part
        for inputs in (3, 8, 8)
        for part in (nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    ]
    network = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    network.load_state_dict(bench.state(seed=seed))
    return network


def _good_models(bench: Any) -> list[dict[str, object]]:
    """Return one model of every kind of source."""
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in bench.state(seed=1).items()}}
    torch.save(wrapped, bench.folder / "wrapped.pth")
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in bench.state().items()}
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in bench.state().items()}
    silent = bench.state(seed=2)
    silent["3.weight"][1] = 0
    program = torch.export.export(_network(bench, seed=3), (torch.zeros(1, 3, 16, 16),))
    (bench.folder / "registry").mkdir()
    torch.export.save(program, bench.folder / "registry" / "exported.pt2")
    return [
        bench.model("plain"),
        bench.model("wrapped", checkpoint="wrapped.pth"),
        bench.model("half", checkpoint=bench.checkpoint("half", halved)),
        bench.model("double", checkpoint=bench.checkpoint("double", double)),
        bench.model("sharded", checkpoint=_sharded(bench)),
        bench.model("zero-channel", checkpoint=bench.checkpoint("zero-channel", silent)),
        {"glob": "registry/**/*.pt2"},
    ]


def _sharded(bench: Any) -> str:
    """Write a checkpoint in two shards and return the name of its index."""
    state = bench.state(seed=4)
    shards = {"one": list(state)[:5], "two": list(state)[5:]}
    for shard, names in shards.items():
        bench.checkpoint(shard, {name: state[name] for name in names})
    weight_map = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    (bench.folder / "net.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "net.safetensors.index.json"


def _images(folder: Path) -> str:
    """Write eight labelled 16 x 16 photographs of noise."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(8):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        content = io.BytesIO()
        Image.frombytes("RGB", (16, 16), bytes(pixels.flatten().tolist())).save(content, "PNG")
        rows.append({"image": {"bytes": content.getvalue(), "path": f"{index}.png"}, "label": index % 5})
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return "images.parquet"


def test_a_job_leaves_artifacts_and_rows_a_second_one_reuses_all_and_a_third_only_evaluates(bench: Any) -> None:
    models = _good_models(bench)
    first = _run(bench.job(models, [MP, R4]))
    assert [row.error for row in first.rows if row.error] == []
    assert first.exit_code == 0
    assert {row.status for row in first.rows} == {"done"}
    assert len(first.rows) == 14
    assert read_models(first.run) == sorted(first.rows, key=lambda row: row.task)
    artifacts = find_artifacts(bench.store)
    assert [verify(folder).findings for folder in artifacts] == [[]] * 14
    _check_figures(bench, first)
    _check_what_loads_is_what_was_evaluated(bench, first)
    _check_two_workers_write_the_same_bytes(bench, first)

    written = {file: file.stat().st_mtime_ns for file in bench.store.glob("artifacts/**/*")}
    second = _run(bench.job(models, [MP, R4]))
    assert second.run != first.run
    assert (second.exit_code, {row.status for row in second.rows}) == (0, {"reused"})
    assert second.explanations == []
    assert {row.task: row.agreement for row in second.rows} == {row.task: row.agreement for row in first.rows}

    evaluate = {"data": _images(bench.folder)}
    third = _run(bench.job(models, [MP, R4], evaluate=evaluate, gates={"min_agreement": 1.0}))
    assert {row.status for row in third.rows} == {"reused"}
    assert {(row.measured_on, row.images) for row in third.rows} == {("images", 8)}
    assert all(row.top1_before is not None and row.top1_after is not None for row in third.rows)
    assert {file: file.stat().st_mtime_ns for file in bench.store.glob("artifacts/**/*")} == written
    closed = [row for row in third.rows if row.agreement is not None and row.agreement < 1]
    assert {row.gate for row in closed} <= {"fail"}
    assert third.exit_code == (3 if closed else 0)


def _check_figures(bench: Any, summary: RunSummary) -> None:
    row = next(row for row in summary.rows if row.task == "plain/mp")
    folder = bench.store / str(row.artifact)
    assert row.bytes_before == (bench.folder / "plain.safetensors").stat().st_size
    assert row.bytes_after == sum(file.stat().st_size for file in folder.iterdir())
    assert (row.method, row.tier, row.pairs, row.device) == ("dfmpc", "synthetic", 1, "cpu")
    assert row.measured_on == "synthetic"
    assert row.agreement is not None
    assert 0 <= row.agreement <= 1
    layers = {layer.name: layer for layer in read_layers(summary.run) if layer.task == "plain/mp"}
    assert {name: (layer.role, layer.bits) for name, layer in layers.items()} == {
        "0": ("unpaired", 6),
        "3": ("low", 2),
        "6": ("high", 6),
        "11": ("unpaired", 6),
    }
    assert layers["3"].c_mean is None  # the re-solve of the HIGH layer stands in the place of c
    assert layers["3"].clipped_fraction is not None
    assert layers["3"].clipped_fraction > 0
    loaded = dfmpc.load(folder)
    state = dfmpc.load_state_dict(folder)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    direct = _network(bench)
    direct.load_state_dict(state)
    assert torch.equal(loaded(image), direct(image))


def _check_what_loads_is_what_was_evaluated(bench: Any, summary: RunSummary) -> None:
    """Evaluate every loaded artifact again, in this process: the figures of the report must come out to the bit."""
    tasks = {task.id: task for task in expand(load_job(bench.folder / "job.yaml"))}
    for row in summary.rows:
        folder, model = bench.store / str(row.artifact), tasks[row.task].model
        original = load_model(model, AllowList.default()).module
        scores = evaluate_artifact(
            artifact=lambda folder=folder: dfmpc.load(folder),
            original=lambda original=original: original,
            settings=settings_for(None, model, (1, 3, 16, 16)),
            store=bench.folder / "again",
            artifact_key=str(row.key),
            model_key=row.model,
        )
        assert (row.task, row.agreement, row.logit_sqnr_db) == (row.task, scores.agreement, scores.logit_sqnr_db)


def _check_two_workers_write_the_same_bytes(bench: Any, first: RunSummary) -> None:
    expected = _digests(bench.store)
    shutil.move(bench.store, bench.folder / "one-worker")
    two = run_job(load_job(bench.folder / "job.yaml"), RunOptions(progress=False, devices="cpu,cpu"))
    assert two.exit_code == 0
    assert _digests(bench.store) == expected
    shutil.rmtree(bench.store)
    shutil.move(bench.folder / "one-worker", bench.store)
    assert first.run.is_dir()


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def _with_pickle(program: Path, marker: Path, target: Path) -> None:
    """Copy a .pt2 and put a pickle that runs code in the place of its sample inputs."""
    evil = io.BytesIO()
    torch.save({"inputs": _RunsCode(marker)}, evil)
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(target, "w") as copy:
        for item in source.infolist():
            pickled = item.filename.endswith("data/sample_inputs/model.pt")
            copy.writestr(item, evil.getvalue() if pickled else source.read(item))


class _TwoInputs(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first @ second


def _bad_models(bench: Any) -> dict[str, tuple[dict[str, object], str, str]]:
    """Return by name: the model, the class of its error, and what the error's text must say."""
    folder = bench.folder
    state = bench.state()
    whole = (folder / bench.checkpoint("whole", state)).read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": _RunsCode(folder / "code-ran")}, folder / "evil.pth")
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["3.weight"][0, 0, 0, 0] = float("nan")
    program = torch.export.export(_network(bench), (torch.zeros(1, 3, 16, 16),))
    torch.export.save(program, folder / "fine.pt2")
    _with_pickle(folder / "fine.pt2", folder / "code-ran", folder / "evil.pt2")
    two = torch.export.export(_TwoInputs(), (torch.zeros(2, 2), torch.zeros(2, 2)))
    torch.export.save(two, folder / "two.pt2")
    batch, side = torch.export.Dim("batch"), torch.export.Dim("side", min=4, max=64)
    dynamic = torch.export.export(
        _network(bench), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch, 2: side, 3: side},)
    )
    torch.export.save(dynamic, folder / "dynamic.pt2")
    return {
        "absent": ({**bench.model("absent"), "checkpoint": "no.safetensors"}, "CheckpointError", "no.safetensors"),
        "torn": (bench.model("torn", checkpoint="torn.safetensors"), "CheckpointError", "truncated or corrupt"),
        "evil": (bench.model("evil", checkpoint="evil.pth"), "UnsafeCheckpointError", "evil.pth"),
        "other": (bench.model("other", "plain", 16, checkpoint="whole.safetensors"), "MismatchError", "3.weight"),
        "nan": (bench.model("nan", checkpoint=bench.checkpoint("nan", broken)), "NonFiniteError", "3.weight"),
        "bug": (bench.model("bug", "raises_a_bug"), "FactoryError", "ZeroDivisionError: unforeseen"),
        "evil-program": ({"name": "evil-program", "program": "evil.pt2"}, "UnsafeCheckpointError", "evil.pt2"),
        "two-inputs": ({"name": "two-inputs", "program": "two.pt2"}, "UnsupportedModelError", "input"),
        "dynamic": ({"name": "dynamic", "program": "dynamic.pt2"}, "UnsupportedModelError", "dynamic"),
    }


def test_bad_models_fail_by_name_and_the_others_finish(bench: Any) -> None:
    bad = _bad_models(bench)
    models = [model for model, _, _ in bad.values()]
    normless = bench.model("normless", "without_norm", checkpoint=bench.checkpoint("n", bench.state("without_norm")))
    summary = _run(bench.job([*models[:5], bench.model("good"), normless, *models[5:]], [PUBLISHED]))
    rows = {row.model: row for row in summary.rows}
    assert summary.exit_code == 3
    assert [(rows[name].status, rows[name].tier) for name in ("good", "normless")] == [("done", "closed-form")] * 2
    layers = {(layer.model, layer.name): layer for layer in read_layers(summary.run)}
    assert [layers[name].c_mean is None for name in (("good", "3"), ("normless", "2"))] == [False, True]
    assert {name: row.error_class for name, row in rows.items() if row.status == "failed"} == {
        name: error_class for name, (_, error_class, _) in bad.items()
    }
    for name, (_, _, text) in bad.items():
        assert text in str(rows[name].error), name
        assert _log(summary, rows[name]).is_file()
    assert "ZeroDivisionError" in _log(summary, rows["bug"]).read_text()
    assert not (bench.folder / "code-ran").exists()
    assert sorted(folder.parent.parent.name for folder in find_artifacts(bench.store)) == ["good", "normless"]
    assert list((bench.store / ".attempts").iterdir()) == []
    assert {row.task: row.error for row in read_models(summary.run)} == {row.task: row.error for row in summary.rows}


def _log(summary: RunSummary, row: ModelRow) -> Path:
    return summary.run / "logs" / row.model / row.bit_plan / f"{row.attempt}.log"


def _run_with_file_limit(job: Path, limit: int) -> tuple[int, dict[str, Any], str]:
    """Run the command with at most ``limit`` bytes a file; return its exit code, its rows by task and its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "dfmpc.cli", "run", str(job), "--json"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    return done.returncode, {row["task"]: row for row in json.loads(done.stdout)["models"]}, done.stderr


def test_a_disk_that_takes_no_more_fails_the_large_task_only_and_keeps_no_half_artifact(bench: Any) -> None:
    large = bench.checkpoint("large", bench.state("plain", 128))
    models = [bench.model("large", "plain", 128, checkpoint=large), bench.model("small")]
    job = bench.job(models, [R4], resources={"devices": "cpu"})
    # the large artifact does not fit, the report's parts do
    code, rows, said = _run_with_file_limit(job, 100_000)
    assert code == 3, said
    assert (rows["small/r4"]["status"], rows["large/r4"]["error_class"]) == ("done", "StorageError")
    assert "--output" in rows["large/r4"]["error"]
    assert "large/r4 failed: StorageError" in said
    assert [folder.parent.parent.name for folder in find_artifacts(bench.store)] == ["small"]
    assert list((bench.store / ".attempts").iterdir()) == []


def test_a_disk_that_takes_not_even_the_report_is_told_on_stderr(bench: Any) -> None:
    code, rows, said = _run_with_file_limit(bench.job([bench.model("small")], [R4]), 6_000)
    assert code == 3, said
    assert rows["small/r4"]["error_class"] == "StorageError"
    assert "warning: small/r4: " in said
    assert "report/layers: cannot be written" in said
    assert [verify(folder).findings for folder in find_artifacts(bench.store)] == [[]]  # it fitted, and is whole


def test_a_layer_rule_that_matches_nothing_is_said(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rules = [{"match": "0", "bits": 8}, {"match": "features.*", "keep": True}]
    job = bench.job([bench.model("good"), {**bench.model("absent"), "checkpoint": "no.pt"}], [R4], layers=rules)
    for status in ("done", "reused"):
        summary = _run(job)
        assert {row.model: (row.status, row.pairs) for row in summary.rows}["good"] == (status, 0)
        assert len(summary.unmatched) == 1
        for said in (summary.unmatched[0], capfd.readouterr().err):
            assert "layers[1].match: 'features.*' matches no layer of this run" in said
            assert "layers are named 0, 3, 6, 11" in said
            assert "layers[0]" not in said
    assert _run(bench.job([bench.model("good")], [R4], layers=rules[:1])).unmatched == []


def test_an_altered_artifact_is_made_anew(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job = bench.job([bench.model("good")], [R4])
    file = bench.store / str(_run(job).rows[0].artifact) / "model.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    again = _run(job)
    assert ([row.status for row in again.rows], again.exit_code) == (["done"], 0)
    assert file.read_bytes() == right
    assert len(again.explanations) == 1
    for said in (again.explanations[0], capfd.readouterr().err):
        assert "good/r4: the artifact is incomplete or altered, so it is made anew: " in said
        assert "model.safetensors: sha256 " in said


_BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"method": "rtn", "bits": 99}, "bits: got 99; expected less than or equal to 8"),
    ({"method": "dfmpc", "lo": 2}, "lo: got an unknown field; expected 'low' (did you mean that?)"),
    (
        {"low": 2},
        "method: got nothing; expected one of 'daq', 'dfmpc', 'dfq', 'hqq', 'mul2q', 'omse', "
        "'rtn', 'squant', 'twn-exact', 'vecq' (the field is required)",
    ),
]


def test_functions_that_are_packages_too_have_their_help(bench: Any) -> None:
    dfmpc.compress(_network(bench), [1, 3, 16, 16], method="rtn", bits=4)
    assert isinstance(dfmpc.compress, types.ModuleType)
    assert list(inspect.signature(dfmpc.compress).parameters) == ["module", "input_shape", "device", "plan"]
    assert str(inspect.getdoc(dfmpc.compress)).startswith("compress(module: ")
    assert "Compress a network in memory" in pydoc.render_doc(dfmpc.compress)


def test_the_python_functions_run_a_job_and_compress_a_network_in_memory(bench: Any) -> None:
    network = _network(bench)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    compressed = dfmpc.compress(network, [1, 3, 16, 16], method="dfmpc", low=2, high=6)
    assert {layer.layer.name: layer.quantized.format.bits for layer in compressed.layers} == {
        "0": 6,
        "3": 2,
        "6": 6,
        "11": 6,
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    for fields, said in _BAD_PLANS:
        with pytest.raises(dfmpc.errors.UsageError) as caught:
            dfmpc.compress(network, [1, 3, 16, 16], **fields)
        assert str(caught.value) == f"compress() got no valid bit-plan: {said}"
    with pytest.raises(dfmpc.errors.UsageError, match=r"run\(\) got colour; the options are output, only"):
        dfmpc.run("job.yaml", colour="red")
    summary = dfmpc.run(bench.job([bench.model("good")], [R2]), output=str(bench.folder / "else"), progress=False)
    assert [(row.task, row.status) for row in summary.rows] == [("good/r2", "done")]
    assert summary.run.parent == bench.folder / "else" / "runs"
    stored = dfmpc.load_state_dict(bench.folder / "else" / str(summary.rows[0].artifact))
    assert stored["3.weight"].unique().numel() <= 3 * 8
