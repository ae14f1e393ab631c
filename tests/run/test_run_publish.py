"""Models out of a real MLflow registry, compressed, and registered there as new versions."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dfmpc
import pytest
import torch
import yaml
from dfmpc import cli
from dfmpc.job import mlflow_client
from dfmpc.job.expand import expand
from dfmpc.job.gates import SAFE_AGREEMENT
from dfmpc.job.loader import load_job
from dfmpc.job.task import Task
from dfmpc.report.rows import ModelRow
from dfmpc.run.latest import publish
from dfmpc.run.publish import Published, alias_of, publish_versions
from dfmpc.run.store import Store
from typer.testing import CliRunner

pytest.importorskip("mlflow", reason="needs MLflow: pip install 'dfmpc[mlflow]'")
pytest.importorskip("sqlalchemy", reason="needs MLflow's store: pip install 'dfmpc[mlflow]'")

R4: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}
R8: dict[str, object] = {"name": "r8", "method": "rtn", "bits": 8}
CPU = {"devices": "cpu"}


class Registry:
    """A registry in ``<folder>/mlflow.db`` with its files in ``<folder>/files``."""

    def __init__(self, bench: Any) -> None:
        self.bench, self.folder = bench, bench.folder
        self.client = mlflow_client.connect("sqlite:///mlflow.db", bench.folder)
        self._experiment = self.client.get_experiment_by_name("training").experiment_id

    def register(self, name: str, /, seed: int = 0, **sidecar: object) -> str:
        """Log a state dict with its sidecar, register it, and return the version."""
        folder = self.folder / "training"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.bench.checkpoint("weights", self.bench.state(seed=seed))
        shutil.move(self.bench.folder / "weights.safetensors", folder / "weights.safetensors")
        described = {"factory": "tiny_networks:plain", "checkpoint": "weights.safetensors", "input": [1, 3, 16, 16]}
        (folder / "dfmpc.yaml").write_text(yaml.safe_dump({**described, **sidecar}))
        return self.log(name, folder)

    def log(self, name: str, folder: Path) -> str:
        run = self.client.create_run(self._experiment)
        self.client.log_artifacts(run.info.run_id, str(folder), "model")
        return self.version(name, f"{run.info.artifact_uri}/model", run.info.run_id)

    def version(self, name: str, source: str, run_id: str | None = None) -> str:
        if name not in self.names():
            self.client.create_registered_model(name)
        return str(self.client.create_model_version(name, source, run_id).version)

    def names(self) -> list[str]:
        return sorted(model.name for model in self.client.search_registered_models())

    def versions(self, name: str) -> list[Any]:
        return sorted(self.client.search_model_versions(f"name='{name}'"), key=lambda one: int(one.version))

    def aliases(self, name: str) -> dict[str, str]:
        return {alias: str(one) for alias, one in self.client.get_registered_model(name).aliases.items()}

    def job(self, *plans: dict[str, object], models: object = ("*",), **fields: Any) -> Path:
        entry = {"uri": "sqlite:///mlflow.db", "models": list(models), "publish": True}  # type: ignore[call-overload]
        entry |= fields.pop("mlflow", {})
        job: Path = self.bench.job([{"mlflow": entry}], list(plans or (R4,)), resources=CPU, **fields)
        return job


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty registry's database; making its tables takes seconds, copying none."""
    mlflow = pytest.importorskip("mlflow")
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{file}").search_registered_models()
    return file


@pytest.fixture
def registry(bench: Any, database: Path) -> Registry:
    shutil.copy(database, bench.folder / "mlflow.db")
    client = mlflow_client.connect("sqlite:///mlflow.db", bench.folder)
    client.create_experiment("training", (bench.folder / "files").as_uri())
    return Registry(bench)


def run(job: Path) -> Any:
    return dfmpc.run(job, progress=False)


def test_a_round_trip_registers_a_version_that_loads(registry: Registry, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    registry.register("net")
    assert registry.register("net", seed=1) == "2"
    ended = run(registry.job(R4, R8))
    rows = {row.bit_plan: row for row in ended.rows}
    assert (ended.exit_code, ended.registered, ended.unpublished) == (0, ["net-dfmpc/1", "net-dfmpc/2"], "")
    assert registry.aliases("net-dfmpc") == {"r4": "1", "r8": "2"}

    version = registry.versions("net-dfmpc")[0]
    tags = {name.removeprefix("dfmpc."): value for name, value in version.tags.items()}
    assert tags == {
        "key": rows["r4"].key,
        "plan": "r4",
        "method": "rtn",
        "gate": rows["r4"].gate,
        "bits_per_weight": f"{rows['r4'].bits_per_weight:.6g}",
        "ratio": f"{rows['r4'].ratio:.6g}",
        "agreement": f"{rows['r4'].agreement:.6g}",
        "measured_on": "synthetic",
        "source": "net/2",
        "run": ended.run.name,
        "dfmpc_version": dfmpc.__version__,
    }
    assert rows["r4"].gate == ("pass" if rows["r4"].agreement >= SAFE_AGREEMENT else "warn")
    logged = registry.client.get_run(version.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["kl"] == pytest.approx(rows["r4"].kl)
    assert logged.data.metrics["bits_per_weight"] == pytest.approx(rows["r4"].bits_per_weight)
    [report] = json.loads((registry.folder / "mlartifacts" / version.run_id / "artifacts/report.json").read_text())
    assert (report["task"], report["key"], report["ratio"]) == ("net/r4", rows["r4"].key, rows["r4"].ratio)

    uri = f"sqlite:///{registry.folder / 'mlflow.db'}"
    location = registry.client.get_model_version_download_uri("net-dfmpc", version.version)
    fetched = Path(mlflow.artifacts.download_artifacts(location, dst_path=str(tmp_path / "f"), tracking_uri=uri))
    assert dfmpc.verify(fetched).findings == []
    original = dfmpc.load(registry.bench.store / str(rows["r4"].artifact))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dfmpc.load(fetched)(images), original(images))


@pytest.mark.slow
def test_nights_register_what_changed_and_no_gate_holds_back(registry: Registry) -> None:
    registry.register("net")
    registry.register("other")
    assert run(registry.job()).registered == ["net-dfmpc/1", "other-dfmpc/1"]
    again = run(registry.job())
    assert [row.status for row in again.rows] == ["reused"] * 2, "what was published is no source"
    assert (again.registered, again.exit_code) == ([], 0)

    registry.register("net", seed=1)
    held = run(registry.job(gates={"max_bits_per_weight": 1}))
    assert [(row.task, row.status, row.gate) for row in held.rows] == [
        ("net/r4", "done", "fail"),
        ("other/r4", "reused", "fail"),
    ]
    assert (held.exit_code, held.registered, held.unpublished) == (3, [], "")
    assert (len(registry.versions("net-dfmpc")), registry.aliases("net-dfmpc")) == (1, {"r4": "1"})

    warned = run(registry.job(gates={"max_bits_per_weight": {"warn": 1}}))
    assert (warned.registered, warned.exit_code) == (["net-dfmpc/2"], 0)
    assert registry.aliases("net-dfmpc") == {"r4": "2"}
    assert registry.versions("net-dfmpc")[1].tags["dfmpc.gate"] == "warn"

    registry.register("net")
    assert run(registry.job()).registered == [], "the first version's bytes again"
    assert registry.aliases("net-dfmpc") == {"r4": "1"}
    assert [one.tags["dfmpc.source"] for one in registry.versions("net-dfmpc")] == ["net/1", "net/2"]


def test_an_alias_chooses_the_version_of_models_that_have_it(registry: Registry) -> None:
    for name, seed in (("net", 0), ("net", 1), ("draft", 0)):
        registry.register(name, seed)
    assert taken(registry.job()) == {"draft": "draft/1", "net": "net/2"}
    registry.client.set_registered_model_alias("net", "champion", "1")
    assert taken(registry.job(mlflow={"alias": "champion"})) == {"net": "net/1"}
    named = expand(load_job(registry.job(models=["net", "draft"], mlflow={"alias": "champion"})))
    assert [task.model.name for task in named] == ["draft", "net"]
    assert "draft: has no version with the alias 'champion': register one" in str(named[0].model.problem)


def taken(job: Path) -> dict[str, str]:
    """Return the versions that a job takes by the names of its models."""
    origins = {task.model.name: task.model.registered for task in expand(load_job(job))}
    return {name: f"{one.name}/{one.version}" for name, one in origins.items() if one is not None}


def test_programs_are_taken_as_they_are_and_what_holds_no_model_has_a_problem(registry: Registry) -> None:
    folder = registry.folder / "program"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "model.pt2").write_bytes(b"")
    registry.log("my program", folder)
    (folder / "data" / "again.pt2").write_bytes(b"")
    registry.log("two", folder)
    registry.register("broken", checkpoint="../../elsewhere.pt", colour="red")
    registry.register("net", name="other-name", layers=[{"match": "conv*", "bits": 8}], gates={"max_seconds": 9})
    tasks = {
        task.model.registered.name if task.model.registered else task.model.name: task for task in expand_of(registry)
    }
    program = tasks["my program"].model
    assert (program.name[:11], Path(str(program.program)).name, program.problem) == ("my-program-", "model.pt2", None)
    assert "two version 1: holds 2 models" in str(tasks["two"].model.problem)
    assert "expected one .pt2 program" in str(tasks["two"].model.problem)
    assert "colour: got " in str(tasks["broken"].model.problem)
    assert "a file of the registry" in str(tasks["broken"].model.problem)
    assert tasks["net"].model.name == "net", "its registered name, whatever the sidecar says"
    assert [rule.bits for rule in tasks["net"].layers] == [8]
    assert tasks["net"].gates is not None


def expand_of(registry: Registry) -> list[Task]:
    return expand(load_job(registry.job()))


def left(registry: Registry, key: str = "a", plan: str = "r4", **fields: Any) -> ModelRow:
    """Leave in the store what a task of net would, its pointer too, and return its row."""
    store = Store(registry.bench.store)
    folder = store.artifact_folder("net", plan, key * 64)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    made: dict[str, Any] = {"key": key * 64, "artifact": folder.relative_to(store.root).as_posix(), "gate": "pass"}
    made |= {"finished_at": datetime.now(UTC), "status": "done", "method": "rtn", **fields}
    row = ModelRow(run=f"run-{key}", task=f"net/{plan}", model="net", bit_plan=plan, **made)
    publish(store, row)
    return row


def published(registry: Registry, *rows: ModelRow, **fields: Any) -> Published:
    loaded = load_job(registry.job(R4, R8, **fields))
    return publish_versions(loaded, Store(registry.bench.store), expand(loaded), rows)


def test_names_and_experiment_are_the_jobs(registry: Registry) -> None:
    registry.register("net")
    names = {"model": "small {plan} {model}", "alias": "best", "experiment": "night"}
    made = published(registry, left(registry), left(registry, plan="r8"), mlflow={"publish": names})
    assert made.versions == ["small r4 net/1", "small r8 net/1"]
    assert registry.aliases("small r8 net") == {"best": "1"}
    assert len(registry.client.search_runs([registry.client.get_experiment_by_name("night").experiment_id])) == 2
    silent = published(registry, left(registry, "b"), mlflow={"publish": {"alias": None}})
    assert (silent.versions, registry.aliases("net-dfmpc")) == (["net-dfmpc/1"], {})
    assert published(registry, left(registry, "c"), mlflow={"publish": False}).versions == []


def test_an_older_run_that_ends_late_moves_no_alias(registry: Registry) -> None:
    registry.register("net")
    older, newer = left(registry, "a"), left(registry, "b")
    assert published(registry, newer).versions == ["net-dfmpc/1"]
    assert published(registry, older).versions == ["net-dfmpc/2"]
    assert registry.aliases("net-dfmpc") == {"r4": "1"}


@pytest.mark.parametrize(
    "fields", [{"gate": "fail"}, {"status": "failed"}, {"status": "interrupted"}, {"artifact": None}], ids=str
)
def test_what_is_not_to_be_used_is_not_registered(registry: Registry, fields: Any) -> None:
    registry.register("net")
    assert published(registry, left(registry, **fields)) == Published([])
    assert registry.names() == ["net"]


def test_somebody_elses_model_of_that_name_is_left_alone(registry: Registry) -> None:
    registry.register("net")
    registry.register("net-dfmpc")
    made = published(registry, left(registry), models=["net"])
    assert made.versions == []
    assert "'net-dfmpc' is a registered model that dfmpc did not make: choose another publish.model" in made.problem
    assert len(registry.versions("net-dfmpc")) == 1


def test_a_registry_that_went_away_is_told(registry: Registry) -> None:
    registry.register("net")
    row, loaded = left(registry), load_job(registry.job())
    tasks = expand(loaded)
    (registry.folder / "mlflow.db").unlink()
    made = publish_versions(loaded, Store(registry.bench.store), tasks, [row])
    assert made.versions == []
    assert made.problem.endswith("mlflow.db: give the database of an MLflow registry")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ["absent"]}, "'absent' matches no registered model; it has net"),
        ({"models": ["a*", "net"]}, "'a*' matches no registered model"),
        ({"alias": "champion"}, "expected models with versions to take"),
        ({"uri": "sqlite:///absent.db"}, "absent.db: give the database of an MLflow registry"),
        ({"uri": "sqlite:///"}, "there is no file"),
        ({"uri": "sqlite:///text.db"}, "file is not a database"),
        ({"uri": "http://127.0.0.1:9"}, "check that it is up"),
        ({"uri": "postgresql://me:secret@127.0.0.1:9/db"}, "MLflow registry postgresql://me:***@127.0.0.1:9/db: No"),
        ({"uri": "mlruns"}, "expected a database or a server"),
        ({"uri": "file:///mlruns"}, "expected a database or a server"),
        ({"publish": {"model": "{model}"}}, "{model} and text of its own in model"),
        ({"publish": {"alias": "champion"}}, "{plan} in model or alias"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read_is_an_error_of_the_job(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, changes: Any, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry.register("net")
    (registry.folder / "text.db").write_text("no database at all, however long the text in it may become")
    ended = call("plan", registry.job(mlflow=changes))
    assert ended.exit_code == 2, ended.output
    assert said in ended.stderr
    assert "secret" not in ended.stderr
    assert not registry.bench.store.exists(), "nothing was started"


def test_without_mlflow_the_extra_is_named(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "find_spec", lambda _: None)
    ended = call("plan", registry.job())
    assert (ended.exit_code, "MLflow needs mlflow, sqlalchemy, alembic" in ended.stderr) == (2, True)
    assert "pip install 'dfmpc[mlflow]'" in ended.stderr


def test_a_job_without_mlflow_does_not_import_it(bench: Any) -> None:
    job = bench.job([bench.model("net")], [R4], resources=CPU)
    code = (
        f"import sys, dfmpc; e = dfmpc.run({str(job)!r}, progress=False); print(e.exit_code, 'mlflow' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "0 False\n"


@pytest.mark.parametrize(
    ("text", "alias"),
    [("mp2-6", "mp2-6"), ("fit_3", "fit_3"), ("a.b+c", "a-b-c-"), ("v2", "v2-"), ("Latest", "Latest-")],
)
def test_aliases_are_what_mlflow_takes(text: str, alias: str) -> None:
    found = alias_of(text)
    assert found.startswith(alias)
    assert len(found) == len(alias) + (8 if alias != text else 0)


_ENDPOINT = "/mlflow-artifacts/artifacts"


class _Files(BaseHTTPRequestHandler):
    """What MLflow asks an HTTP server for artifacts: lists of a folder's entries, and files."""

    def __init__(self, *arguments: Any, root: Path, asked: list[str]) -> None:
        self._root, self._asked = root, asked
        super().__init__(*arguments)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        listed = parse_qs(parts.query).get("path")
        place = self._root / (listed[0] if listed else parts.path.removeprefix(f"{_ENDPOINT}/"))
        self._asked.append(self.path)
        if listed:
            entries = [{"path": one.name, "is_dir": one.is_dir(), "file_size": 1} for one in place.iterdir()]
            content = json.dumps({"files": entries}).encode()
        else:
            content = place.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``tmp_path`` and return where, and what was asked for."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, root=tmp_path, asked=asked)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_remote_artifacts_are_fetched_once_into_the_store(registry: Registry, served: tuple[str, list[str]]) -> None:
    address, asked = served
    registry.register("unused")
    registry.version("net", f"{address}{_ENDPOINT}/training")
    job, store = registry.job(models=["net"]), registry.bench.store
    [task] = expand(load_job(job))
    fetched = sorted(file.relative_to(store) for file in store.glob(".mlflow/*/*/*/*"))
    assert [file.parts[2:] for file in fetched] == [("net", "1", "dfmpc.yaml"), ("net", "1", "weights.safetensors")]
    assert task.model.checkpoint == str(store / fetched[1])
    assert (store / fetched[1]).read_bytes() == (registry.folder / "training" / "weights.safetensors").read_bytes()
    assert asked != []
    asked.clear()
    assert expand(load_job(job)) == [task]
    assert asked == []


def test_two_registrations_of_one_key_at_once_leave_one_version(registry: Registry) -> None:
    registry.register("net")
    published(registry, left(registry, plan="r8"))
    row, made, loaded = left(registry), list[Published](), load_job(registry.job(R4, R8))
    store, tasks = Store(registry.bench.store), expand(loaded)
    threads = [
        threading.Thread(target=lambda: made.append(publish_versions(loaded, store, tasks, [row]))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.problem for one in made] == ["", ""]
    assert [one.tags["dfmpc.plan"] for one in registry.versions("net-dfmpc")] == ["r8", "r4"]
    with sqlite3.connect(registry.folder / "mlflow.db") as database:
        kept = database.execute("select count(*) from runs where lifecycle_stage = 'active' and name = 'net/r4'")
        assert kept.fetchone() == (1,)
