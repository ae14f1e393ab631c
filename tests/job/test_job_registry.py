"""A registry as a source of models: what is found, how it is named, and that what is wrong fails alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dfmpc import cli
from dfmpc.errors import JobFileError, SidecarError
from dfmpc.job import registry_walk
from dfmpc.job.expand import expand
from dfmpc.job.gates import Gates
from dfmpc.job.loader import load_job
from dfmpc.job.schema import Preprocess
from dfmpc.job.task import Task
from dfmpc.models.locate import input_files
from typer.testing import CliRunner

GOOD = {"factory": "timm:create_model", "checkpoint": "w.safetensors", "input": [1, 3, 8, 8]}


class Tree:
    """A registry beside a job file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "registry"
        self.root.mkdir()

    def program(self, path: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        return file

    def sidecar(self, path: str, content: object) -> Path:
        file = self.root / path / "dfmpc.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return file

    def job(self, models: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
        content = {
            "version": 1,
            "name": "t",
            "output": str(self.folder / "store"),
            "models": models or [{"registry": "registry"}],
            "bit_plans": [{"name": name, "method": "rtn", "bits": 4} for name in ("r4", "m4")],
        }
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump({**content, **fields}))
        return file

    def tasks(self, models: list[dict[str, Any]] | None = None, **fields: Any) -> dict[str, Task]:
        return {task.id: task for task in expand(load_job(self.job(models, **fields)))}

    def names(self, models: list[dict[str, Any]] | None = None) -> list[str]:
        return list(dict.fromkeys(task.model.name for task in self.tasks(models).values()))

    def problem(self, name: str) -> str:
        return self.tasks()[f"{name}/r4"].model.problem or ""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_models_are_named_by_their_paths_or_their_sidecars(tree: Tree) -> None:
    tree.program("b.pt2")
    tree.program("cnn/a.pt2")
    tree.sidecar("vit/small", {**GOOD, "name": "vit-s"})
    tree.sidecar("vit/large", GOOD)
    tree.sidecar("one", {})
    tree.program("one/net.pt2")
    tasks = tree.tasks()
    assert list(dict.fromkeys(task.model.name for task in tasks.values())) == [
        "b",
        "cnn__a",
        "one",
        "vit__large",
        "vit-s",
    ]
    assert tasks["one/r4"].model.program == str(tree.root / "one" / "net.pt2"), "the only program of its folder"
    assert tasks["cnn__a/m4"].model.program == str(tree.root / "cnn" / "a.pt2")
    small = tasks["vit-s/r4"].model
    assert (small.factory, small.input) == ("timm:create_model", [1, 3, 8, 8])
    assert small.checkpoint == str(tree.root / "vit" / "small" / "w.safetensors"), "from the sidecar's folder"
    assert all(task.model.problem is None and task.gates is None for task in tasks.values())


def test_a_sidecar_owns_the_programs_below_it_but_not_other_sidecars(tree: Tree) -> None:
    tree.sidecar("net", {"program": "export/v2.pt2"})
    tree.program("net/export/v2.pt2")
    tree.program("net/old.pt2")
    tree.sidecar("net/student", {**GOOD})
    assert tree.names() == ["net", "net__student"]


def test_hidden_folders_and_loops_are_left_out_and_each_folder_counts_once(tree: Tree, tmp_path: Path) -> None:
    tree.program("real/a.pt2")
    tree.program(".trash/b.pt2")
    (tree.root / "alias").symlink_to("real")
    (tree.root / "real" / "loop").symlink_to("..")
    (tree.root / "nowhere").symlink_to("absent")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "c.pt2").write_bytes(b"")
    (outside / "back").symlink_to(tree.root)
    (tree.root / "elsewhere").symlink_to(outside)
    assert tree.names() == ["elsewhere__c", "real__a"]


def test_a_program_that_is_a_link_to_nothing_is_a_model_that_fails(tree: Tree) -> None:
    (tree.root / "gone.pt2").symlink_to("absent.pt2")
    assert tree.names() == ["gone"]


def test_what_a_sidecar_says_comes_on_top_of_the_entry_and_the_job(tree: Tree) -> None:
    own = {"crop": 8}, {"min_agreement": 0.5, "max_seconds": None}, [{"match": "fc", "bits": 8}]
    tree.sidecar("net", {**GOOD, "preprocess": own[0], "gates": own[1], "layers": own[2], "bit_plans": ["r*"]})
    tree.program("plain.pt2")
    entry = {"registry": "registry", "preprocess": {"resize": 12}, "gates": {"max_top1_drop": {"warn": 1}}}
    tasks = tree.tasks(
        [entry],
        gates={"min_agreement": 0.9, "max_seconds": 60, "max_top1_drop": 5},
        layers=[{"match": "stem", "keep": True}],
    )
    assert sorted(tasks) == ["net/r4", "plain/m4", "plain/r4"]
    net, plain = tasks["net/r4"], tasks["plain/r4"]
    assert net.model.preprocess == Preprocess(resize=12, crop=8)
    assert net.gates == Gates(max_top1_drop={"warn": 1}, min_agreement=0.5)
    assert [rule.match for rule in net.layers] == ["fc", "stem"]
    assert plain.model.preprocess == Preprocess(resize=12)
    assert plain.gates == Gates(max_top1_drop={"warn": 1}, min_agreement=0.9, max_seconds=60)
    assert [rule.match for rule in plain.layers] == ["stem"]


def test_a_model_that_opts_out_has_no_task(tree: Tree) -> None:
    tree.sidecar("out", {**GOOD, "bit_plans": []})
    tree.sidecar("in", GOOD)
    assert tree.names() == ["in"]


def test_all_problems_of_a_sidecar_are_told_with_file_line_and_field(tree: Tree) -> None:
    file = tree.sidecar(
        "net",
        "factory: timm\ncheckpoint: ../../secret.pth\ninput: [1, 0]\nfoo: 1\ngates: {min_agreement: 7}\n",
    )
    tree.program("fine.pt2")
    lines = tree.problem("net").splitlines()
    assert [line.split("; expected ")[0] for line in lines] == [
        f"{file}: line 1: factory: got 'timm'",
        f"{file}: line 2: checkpoint: got '../../secret.pth'",
        f"{file}: line 3: input[1]: got 0",
        f"{file}: line 4: foo: got an unknown field",
        f"{file}: line 5: gates.min_agreement: got 7",
    ]
    assert lines[0].endswith("module:callable, such as timm:create_model")
    assert f"a file of the registry {tree.root}" in lines[1]
    assert lines[4].endswith("numbers from 0 to 1")
    assert tree.problem("fine") == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "got an empty file; expected a mapping with factory, checkpoint and input"),
        ("- a", "got a list; expected a mapping with"),
        ("factory: [", "expected valid YAML"),
        ("!!python/object:os.system {}", "expected YAML without tags"),
        ("name: ../x\nprogram: net.pt2", "name: got '../x'"),
        ("factory: a:b\nprogram: net.pt2", "one of factory and program, got both"),
        ("factory: a:b", "checkpoint, input beside factory"),
        ("args: [1]", "no args without a factory"),
        ("name: x", "program: got nothing, beside no .pt2 file"),
        ("program: /etc/passwd", "program: got '/etc/passwd'; expected a file of the registry"),
        ("program: net.pt2\nbit_plans: [int8]", "bit_plans int8 match none of the job's: r4, m4"),
    ],
)
def test_a_sidecar_that_cannot_be_used_fails_its_own_tasks(tree: Tree, content: str, expected: str) -> None:
    tree.sidecar("net", content)
    task = next(task for task in tree.tasks().values() if task.model.problem)
    assert expected in (task.model.problem or "")
    with pytest.raises(SidecarError, match="net"):
        input_files(task.model)


def test_environment_variables_are_not_put_into_a_sidecar(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    tree.sidecar("net", {**GOOD, "args": ["${SECRET}"]})
    assert tree.tasks()["net/r4"].model.args == ["${SECRET}"]


def test_names_that_clash_or_are_none_fail_alone_under_names_of_their_own(tree: Tree) -> None:
    tree.sidecar("a", {**GOOD, "name": "x"})
    tree.sidecar("b", {**GOOD, "name": "x"})
    tree.program("with space.pt2")
    tree.program("taken.pt2")
    tree.program("c__d.pt2")
    tree.program("c/d.pt2")
    tree.program("n" * 140 + ".pt2")
    tasks = tree.tasks([{"registry": "registry"}, {"name": "taken", "program": "p.pt2"}])
    problems = {task.model.name: task.model.problem for task in tasks.values()}
    broken = {name: text for name, text in problems.items() if text}
    assert [name for name in problems if name not in broken] == ["taken", "c__d", "x"]
    assert "b/dfmpc.yaml: the name 'x' is used by another model: give another one in dfmpc.yaml" in (broken["b"] or "")
    assert "'taken' is used by another model" in (broken["taken+2"] or "")
    assert "'c__d' is used by another model" in (broken["c__d+2"] or "")
    spaced = next(name for name in broken if name.startswith("with-space-"))
    assert "the path gives 'with space', which cannot be a model's name" in (broken[spaced] or "")
    assert len(broken) == 5
    assert all(len(name) <= 128 for name in broken)


def test_a_path_that_is_not_utf8_fails_alone(tree: Tree) -> None:
    bad = os.fsencode(tree.root) + b"/net\xff.pt2"
    try:
        Path(os.fsdecode(bad)).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    tree.program("fine.pt2")
    tasks = tree.tasks()
    (problem,) = {task.model.problem for task in tasks.values()} - {None}
    assert "is not UTF-8: rename it" in problem
    assert all(task.model_dump_json() for task in tasks.values())


def test_a_folder_that_cannot_be_listed_is_a_model_that_fails(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.program("closed/a.pt2")
    tree.program("open/b.pt2")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(registry_walk.os, "scandir", refuse)
    assert tree.names() == ["closed", "open__b"]
    assert "closed cannot be listed (Permission denied): make it readable" in tree.problem("closed")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"registry": "absent"}, "cannot be listed (No such file or directory)"),
        ({"registry": "registry"}, "a folder tree with a dfmpc.yaml or a .pt2 file in it"),
        ({"registry": "registry", "glob": "*.pt2"}, "exactly one of factory, program, glob, registry"),
        ({"registry": "registry", "name": "x"}, "no name beside registry"),
        ({"registry": "registry", "input": [1, 3]}, "no input without a factory"),
    ],
)
def test_the_jobs_own_entry_is_the_jobs_error(tree: Tree, entry: dict[str, Any], expected: str) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(tree.job([entry]))
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_tree_beyond_its_bounds_is_refused(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.program("/".join("abcdefgh") + "/net.pt2")
    monkeypatch.setattr(registry_walk, "MAX_DEPTH", 7)
    with pytest.raises(JobFileError, match="more than 100000 folders or 7 levels"):
        load_job(tree.job())
    monkeypatch.setattr(registry_walk, "MAX_DEPTH", 32)
    monkeypatch.setattr(registry_walk, "MAX_FOLDERS", 8)
    with pytest.raises(JobFileError, match="more than 8 folders or 32 levels"):
        load_job(tree.job())


def test_a_night_over_a_registry_fails_what_is_broken_alone_and_does_again_what_changed(bench: Any) -> None:
    tree = Tree(bench.folder)
    network = {"factory": "tiny_networks:plain", "checkpoint": "w.safetensors", "input": [1, 3, 16, 16]}
    for name, seed in (("a", 0), ("b", 1)):
        tree.sidecar(name, network)
        shutil.move(bench.folder / bench.checkpoint("w", bench.state(seed=seed)), tree.root / name / "w.safetensors")
    tree.sidecar("broken", {**network, "input": "large"})
    tree.sidecar("forbidden", {**network, "factory": "os:system"})
    shutil.copy(tree.root / "a" / "w.safetensors", tree.root / "forbidden")
    rows = _night(tree, exit_code=3)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a/r4": "done",
        "a/m4": "done",
        "b/r4": "done",
        "b/m4": "done",
        "broken/r4": "failed",
        "broken/m4": "failed",
        "forbidden/r4": "failed",
        "forbidden/m4": "failed",
    }
    assert rows["broken/r4"]["error_class"] == "SidecarError"
    assert f"{tree.root / 'broken' / 'dfmpc.yaml'}: line" in rows["broken/r4"]["error"]
    assert "input: got 'large'" in rows["broken/r4"]["error"]
    assert rows["forbidden/m4"]["error"].startswith("factory 'os:system' is not on the allow-list")
    planned = CliRunner().invoke(cli.app, ["plan", str(tree.job())])
    assert (planned.exit_code, "problem: broken: " in planned.stdout) == (3, True)

    for name in ("broken", "forbidden"):
        shutil.rmtree(tree.root / name)
    shutil.move(bench.folder / bench.checkpoint("w", bench.state(seed=2)), tree.root / "b" / "w.safetensors")
    rows = _night(tree, exit_code=0)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a/r4": "reused",
        "a/m4": "reused",
        "b/r4": "done",
        "b/m4": "done",
    }


def _night(tree: Tree, exit_code: int) -> dict[str, Any]:
    ended = CliRunner().invoke(cli.app, ["run", str(tree.job(resources={"devices": "cpu"})), "--json"])
    assert ended.exit_code == exit_code, ended.output
    document = json.loads(ended.stdout)
    assert document["vanished"]["models"] == ([] if exit_code else ["broken", "forbidden"])
    return {row["task"]: row for row in document["models"]}


def test_include_and_exclude_know_the_names_that_sidecars_give(tree: Tree) -> None:
    tree.sidecar("a", {**GOOD, "name": "chosen"})
    tree.program("b.pt2")
    assert sorted(tree.tasks(include=[{"model": "chosen", "plan": "r4"}])) == ["chosen/r4"]
    with pytest.raises(JobFileError, match="which matches no task"):
        load_job(tree.job(include=[{"model": "a"}]))
