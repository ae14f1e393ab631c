"""scripts/make_registry.py writes registries that dfmpc runs; scripts/bench_run.py measures such runs."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dfmpc import cli
from safetensors import safe_open
from torch.export import load
from typer.testing import CliRunner, Result

SMALL = ("--models", "4", "--size-mib", "0.2", "--seed", "7")


Maker = Callable[..., int]


@pytest.fixture(scope="module")
def maker(project: Path) -> Iterator[Maker]:
    """make_registry.py's main, in this process; torch takes seconds to start."""
    sys.path.insert(0, str(project / "scripts"))
    try:
        main = importlib.import_module("make_registry").main
        yield lambda *arguments: main([str(one) for one in arguments])
    finally:
        sys.path.remove(str(project / "scripts"))


def script(project: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make(maker: Maker, out: Path, *arguments: object) -> Path:
    assert maker(out, *arguments) == 0
    return out


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def registry(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(maker, tmp_path_factory.mktemp("registries") / "four", *SMALL)


def test_a_registry_holds_both_kinds_of_every_family(registry: Path):
    listed = json.loads((registry / "registry.json").read_text())["models"]
    assert [one["family"] for one in listed] == ["resnet", "vgg", "mobilenet", "densenet"]
    assert [one["source"] for one in listed] == ["pt2", "safetensors", "pt2", "safetensors"]
    for one in listed:
        content = (registry / one["file"]).read_bytes()
        assert (one["bytes"], one["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert 0.1 * 2**20 < len(content) < 0.9 * 2**20, "a program carries some 200 KiB beside its weights"
    with safe_open(registry / listed[1]["file"], "pt") as tensors:
        variances = tensors.get_tensor("0.1.running_var")
    assert variances.min() > 0.2
    assert variances.std() > 0.1
    assert load(registry / listed[0]["file"]).example_inputs[0][0].shape == (1, 3, 32, 32)


def test_the_same_seed_gives_the_same_bytes_in_another_process(project: Path, registry: Path, tmp_path: Path):
    ended = script(project, "make_registry.py", tmp_path / "again", *SMALL)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("4 networks, ")
    assert contents(tmp_path / "again") == contents(registry)


def test_another_seed_gives_other_bytes(maker: Maker, registry: Path, tmp_path: Path):
    again = contents(registry)
    other = contents(make(maker, tmp_path / "other", *SMALL[:-1], 8, "--families", "vgg,resnet"))
    models = {name for name in again if name.startswith("models/")}
    assert {hashlib.sha256(again[name]).hexdigest() for name in models}.isdisjoint(
        {hashlib.sha256(content).hexdigest() for name, content in other.items() if name.startswith("models/")}
    )
    assert str(tmp_path).encode() not in b"".join(other.values()), "a file would depend on where it was made"


def test_a_longer_registry_begins_with_the_shorter(maker: Maker, registry: Path, tmp_path: Path):
    longer = contents(make(maker, tmp_path / "longer", "--models", "6", *SMALL[2:]))
    for name, content in contents(registry).items():
        if name.startswith(("models/", "code/")):
            assert longer[name] == content
    assert {"models/resnet-0004.safetensors", "models/vgg-0005.pt2"} <= longer.keys()


def test_the_job_plans_and_runs(registry: Path, tmp_path: Path):
    where = (registry / "job.yaml", "--allow-code", registry / "code", "--output", tmp_path / "store")
    planned = call("plan", *where, "--json")
    assert planned.exit_code == 0, planned.output
    document = json.loads(planned.stdout)
    assert len(document["tasks"]) == 4
    assert document["problems"] == []
    ended = call("run", *where, "--devices", "cpu", "--json")
    assert ended.exit_code == 0, ended.output
    rows = json.loads(ended.stdout)["models"]
    assert [(row["status"], row["calibrator"], row["tier"]) for row in rows] == [
        ("done", "analytic", "closed-form")
    ] * 4
    assert all(row["pairs"] > 0 for row in rows)
    assert all(row["ratio"] > 2 for row in rows if row["model"].startswith(("vgg", "densenet"))), (
        "these hold no program"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "how many networks? give --models N, or --small"),
        (("--models", "0"), "'0': expected a number from 1 to 5000"),
        (("--models", "1", "--sources", "onnx"), "'onnx': expected some of pt2, safetensors"),
        (("--models", "1", "--families", ""), "expected some of resnet, vgg, mobilenet, densenet"),
        (("--models", "1", "--size-mib", "2,0"), "'2,0': expected sizes between 0.1 and 4096 MiB"),
        (("--models", "1", "--side", "20"), "'20': expected a multiple of 16"),
        (("--models", "1", "--plan", "rtn"), "'rtn': expected a mapping such as {name: mp2-6"),
        (("--models", "1", "--plan", "{name: r, method: rtn, bits: 99}"), "bit_plans[0].bits: got 99"),
        (("--models", "5000", "--size-mib", "4096"), "MiB free: make fewer or smaller ones"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_told_and_leave_nothing(
    maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
):
    try:
        code: object = maker(tmp_path / "out", *arguments)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("mine")
    assert maker(tmp_path, *SMALL) == 2
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    assert "exists and is not empty: name a new folder" in capsys.readouterr().err


def test_a_disk_that_refuses_leaves_nothing(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert maker(tmp_path / "out", *SMALL) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "(File too large): choose another folder or free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_bench_measures_everything_it_names(project: Path, registry: Path, tmp_path: Path):
    file, scratch = tmp_path / "bench.json", tmp_path / "scratch"
    scratch.mkdir()
    ended = script(
        project, "bench_run.py", registry, "--repeat", 1, "--kinds", "cpu", "--json", file, "--scratch", scratch
    )
    assert ended.returncode == 0, ended.stderr
    assert list(scratch.iterdir()) == []
    found = json.loads(file.read_text())
    assert found.keys() == {
        *("machine", "registry", "models", "tasks", "checkpoint_bytes", "repeat"),
        *("yardsticks", "runs", "gpu", "medians"),
    }
    assert (found["models"], found["tasks"], found["gpu"]) == (4, 4, "no GPU: not measured")
    assert found["checkpoint_bytes"] == sum(file.stat().st_size for file in (registry / "models").iterdir())
    names = ["cat", "cp", "sha256, 1 thread", "sha256, 2 threads"]
    assert [one["name"] for one in found["yardsticks"]] == names
    assert list(found["medians"]) == [*names, "1 x cpu", "2 x cpu", "1 x cpu, reused", "2 x cpu, reused"]
    for case, workers in zip(found["runs"], (1, 2), strict=True):
        (cold,), (warm,) = case["cold"], case["warm"]
        assert (case["workers"], cold["statuses"], warm["statuses"]) == (workers, {"done": 4}, {"reused": 4})
        assert 0 < cold["startup_s"] < cold["wall_s"]
        assert all(cold["phases"][name] > 0 for name in ("read_s", "compress_s", "write_s", "evaluate_s"))
        assert warm["phases"]["compress_s"] == warm["phases"]["write_s"] == 0
        spent = workers * cold["wall_s"] - cold["slots_startup_s"] - sum(cold["phases"].values())
        assert cold["overhead_ms"] == pytest.approx(1e3 * spent / 4)
        scheduler, worker = cold["memory"]
        assert 20 < scheduler["peak_mib"] < worker["peak_mib"] < 4000, "torch is in the worker alone"
    assert "2 x cpu over 1 x cpu: " in ended.stdout
    assert "GPU: no GPU: not measured" in ended.stdout


@pytest.mark.slow
def test_the_bench_keeps_to_its_limit_and_to_warm_runs(project: Path, registry: Path, tmp_path: Path):
    options = ("--kinds", "cpu", "--workers", 1, "--repeat", 2, "--json", tmp_path / "bench.json")
    store = ("--only-warm", "--store", tmp_path / "store")
    ended = script(project, "bench_run.py", registry, *options, *store, "--tasks-limit", 1)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["tasks"], found["yardsticks"], found["runs"][0]["cold"]) == (1, [], [])
    assert [run["statuses"] for run in found["runs"][0]["warm"]] == [{"reused": 1}] * 2
    assert [path.name for path in (tmp_path / "store" / "artifacts").iterdir()] == ["resnet-0000"]
    assert "all 1 reused, 1 x cpu: " in ended.stdout


@pytest.mark.slow
def test_a_run_that_fails_ends_the_bench(project: Path, maker: Maker, tmp_path: Path):
    made = make(maker, tmp_path / "one", "--models", "1", "--size-mib", "0.2", "--sources", "safetensors")
    (file,) = (made / "models").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    options = ("--kinds", "cpu", "--workers", 1, "--repeat", 1, "--json", tmp_path / "bench.json")
    ended = script(project, "bench_run.py", made, *options)
    assert ended.returncode == 1
    assert "`dfmpc run` ended with 3" in ended.stderr
    assert "CheckpointError" in ended.stderr
    assert not (tmp_path / "bench.json").exists()
    file.unlink()
    assert "1 files are not there" in script(project, "bench_run.py", made, *options).stderr
