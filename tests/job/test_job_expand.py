"""Jobs as tasks: names, order, paths, round trips, and the files that ship."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import JobFileError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.job.schema import Job
from dfmpc.job.task import Task

HEAD = "version: 1\nname: test\noutput: store\n"
PLANS = "bit_plans:\n  - {name: b, method: rtn, bits: 4}\n  - {name: a, method: dfmpc}\n"


def tasks(folder: Path, text: str) -> list[Task]:
    file = folder / "job.yaml"
    file.write_text(HEAD + text)
    return expand(load_job(file))


def test_tasks_are_models_times_plans_in_the_order_of_the_file(tmp_path: Path):
    found = tasks(tmp_path, "models: [{program: z.pt2}, {name: y, program: /abs/x.pt2}]\n" + PLANS)
    assert [task.id for task in found] == ["z/b", "z/a", "y/b", "y/a"]
    assert found[0].model.program == str(tmp_path / "z.pt2")
    assert found[2].model.program == "/abs/x.pt2"


def test_models_of_a_glob_are_named_by_their_paths(tmp_path: Path):
    for name in ("reg/z.pt2", "reg/a/b.v1.pt2", "reg/a/readme.txt", "reg/a/c.pt2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    plans = "bit_plans: [{name: p, method: rtn, bits: 4}]\n"
    assert [task.id for task in tasks(tmp_path, "models: [{glob: 'reg/**/*'}]\n" + plans)] == [
        "reg__a__b.v1/p",
        "reg__a__c/p",
        "reg__z/p",
    ]
    absolute = tasks(tmp_path, f"models: [{{glob: '{tmp_path}/reg/*/*.pt2'}}]\n" + plans)
    assert [task.model.name for task in absolute] == ["a__b.v1", "a__c"]
    (tmp_path / "jobs").mkdir()
    above = tasks(tmp_path / "jobs", "models: [{glob: '../reg/z*.pt2'}]\n" + plans)
    assert [(task.model.name, task.model.program) for task in above] == [("reg__z", str(tmp_path / "reg/z.pt2"))]


def test_include_and_exclude_narrow_the_tasks(tmp_path: Path):
    models = "models: [{program: m1.pt2}, {program: m2.pt2}]\n"
    narrowed = tasks(tmp_path, models + PLANS + "include: [{model: m1}, {plan: a}]\nexclude: [{model: m1, plan: b}]\n")
    assert [task.id for task in narrowed] == ["m1/a", "m2/a"]


def test_a_clash_that_appears_after_loading_is_an_error(tmp_path: Path):
    (tmp_path / "a__b.pt2").touch()
    file = tmp_path / "job.yaml"
    file.write_text(HEAD + "models: [{glob: '**/*.pt2'}]\n" + PLANS)
    loaded = load_job(file)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pt2").touch()
    with pytest.raises(JobFileError, match="a__b"):
        expand(loaded)


def test_preprocessing_is_evaluates_with_the_models_on_top(tmp_path: Path):
    (tmp_path / "d.parquet").touch()
    base = "evaluate: {data: d.parquet, mean: [0, 0, 0], std: [1, 1, 1], resize: 256, crop: 224}\n"
    models = "models: [{program: a.pt2}, {program: b.pt2, preprocess: {crop: 200, resize: null}}]\n"
    plain, own = tasks(tmp_path, models + "bit_plans: [{name: p, method: rtn, bits: 4}]\n" + base)
    assert plain.model.preprocess is not None
    assert own.model.preprocess is not None
    assert (plain.model.preprocess.resize, plain.model.preprocess.crop) == (256, 224)
    assert (own.model.preprocess.resize, own.model.preprocess.crop) == (None, 200)
    assert own.model.preprocess.std == (1, 1, 1)


def test_a_task_survives_json_exactly(tmp_path: Path):
    found = tasks(
        tmp_path,
        """\
models:
  - {name: f, factory: m:c, checkpoint: package://n/c.pt, input: [1, 3, 4, 4], args: [1, 1.0, true, null, "1"],
     kwargs: {width: 0.1, depth: 3}, preprocess: {mean: [0.485, 0.1, 0.3], std: [1, 1, 1]}}
bit_plans:
  - {name: p, method: dfmpc, granularity: {low: tensor}, calibrator: {name: analytic, rho: 0.3, tau: null}}
  - {name: q, method: rtn, bits: 3, granularity: group:64, symmetric: false}
layers: [{match: conv1, bits: 8}, {match: "fc*", keep: true}]
""",
    )
    for task in found:
        again = Task.model_validate_json(task.model_dump_json())
        assert again == task
        assert again.model_dump_json() == task.model_dump_json()
        assert [type(value) for value in again.model.args] == [int, float, bool, type(None), str]
    assert found[0].model.checkpoint == "package://n/c.pt"


def test_the_quickstart_has_its_five_plans(project: Path):
    found = expand(load_job(project / "jobs" / "quickstart.yaml"))
    assert [task.id.split("/")[1] for task in found] == ["dfmpc-4-8", "closed-4-8", "published-4-8", "rtn-8", "rtn-4"]
    preprocess = found[0].model.preprocess
    assert preprocess is not None
    assert preprocess.mean is not None
    assert preprocess.std is not None
    assert preprocess.mean[0] == pytest.approx(127 / 255, abs=1e-15)
    assert preprocess.std[2] == pytest.approx(128 / 255, abs=1e-15)


def test_the_template_loads_and_shows_every_field(project: Path):
    template = project / "jobs" / "template.yaml"
    assert len(expand(load_job(template))) == 9
    schema = Job.model_json_schema()
    fields = {name for part in (schema, *schema["$defs"].values()) for name in part["properties"]}
    text = template.read_text()
    assert [name for name in sorted(fields) if f"{name}:" not in text] == []


def test_every_field_of_the_schema_is_described():
    schema = Job.model_json_schema()
    parts = {"Job": schema, **schema["$defs"]}
    bare = [
        f"{name}.{field}"
        for name, part in parts.items()
        for field, detail in part["properties"].items()
        if not detail.get("description")
    ]
    assert bare == []


def test_the_reference_of_the_job_file_is_up_to_date(project: Path):
    space: dict[str, Any] = {"__file__": str(project / "scripts" / "render_docs.py"), "__name__": "render_docs"}
    exec((project / "scripts" / "render_docs.py").read_text(), space)
    assert (project / "docs" / "job_file.md").read_text() == space["render"](), "run python scripts/render_docs.py"


def test_loading_and_expanding_need_no_torch(project: Path):
    code = """
import json, sys
from pathlib import Path
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
print(json.dumps([len(expand(load_job(Path(sys.argv[1])))), sorted({"torch", "pyarrow", "numpy"} & set(sys.modules))]))
"""
    command = [sys.executable, "-c", code, str(project / "jobs" / "quickstart.yaml")]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == [5, []]
