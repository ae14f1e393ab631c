"""Budgets before anything runs: the bits they come to, their sizes, and what is out of reach."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dfmpc import cli
from dfmpc.compress.budget.choose import choose_bits
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.run.bit_choices import choose_all_bits
from dfmpc.run.predict import predicted_artifact_bytes
from typer.testing import CliRunner

BUDGET: dict[str, object] = {"name": "b5", "method": "dfmpc", "budget": {"bits_per_weight": 5}, "pareto": 3}
TIGHT: dict[str, object] = {"name": "b2", "method": "dfmpc", "budget": {"bits_per_weight": 2}}
FIXED: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}


def test_the_choice_is_the_one_that_a_run_would_make(bench: Any) -> None:
    job = load_job(bench.job([bench.model("net")], [FIXED, BUDGET], layers=[{"match": "0", "bits": 8}]))
    before = sorted(bench.folder.rglob("*"))
    (row,) = choose_all_bits(job).rows
    assert sorted(bench.folder.rglob("*")) == before
    task = expand(job)[1]
    assert (row.task, row.budget) == ("net/b5", "5 bits a weight")
    assert row.choice == choose_bits(load_model(task.model, AllowList.default()), task.plan, task.layers)
    assert row.choice.bits["0"] == 8
    assert row.choice.bits_per_weight <= 5
    assert len(row.choice.pareto) == 3


def test_what_cannot_be_chosen_is_a_problem_of_its_task_or_model(bench: Any) -> None:
    missing = {**bench.model("gone"), "checkpoint": "absent.safetensors"}
    found = choose_all_bits(load_job(bench.job([bench.model("net"), missing], [TIGHT, BUDGET])))
    assert [row.task for row in found.rows] == ["net/b5"]
    assert [problem.split(": ")[0] for problem in found.problems] == ["net/b2", "gone"]
    assert "out of reach" in found.problems[0]
    assert "absent.safetensors" in found.problems[1]


def test_plan_shows_layers_by_bits_and_the_curve(bench: Any) -> None:
    job = str(bench.job([bench.model("net")], [FIXED, BUDGET]))
    shown = CliRunner().invoke(cli.app, ["plan", job, "--bits"])
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["net/b5", "5", "bits", "a", "weight"] in [line[:5] for line in lines]
    curve = [line for line in lines if line[:1] == ["curve"]]
    assert [line[1:4] for line in curve] == [["1", "of", "3"], ["2", "of", "3"], ["3", "of", "3"]]
    assert curve[0][-1] == "2:4"
    assert curve[2][-1] == "8:4"
    document = json.loads(CliRunner().invoke(cli.app, ["plan", job, "--bits", "--json"]).stdout)
    (found,) = document["bits"]
    assert set(found["bits"]) == {"0", "3", "6", "11"}
    assert [point["bits_per_weight"] for point in found["pareto"]] == sorted(
        point["bits_per_weight"] for point in found["pareto"]
    )


def test_a_model_that_does_not_load_is_told_once(bench: Any) -> None:
    job = bench.job([{**bench.model("gone"), "checkpoint": "absent.safetensors"}], [BUDGET])
    shown = CliRunner().invoke(cli.app, ["plan", str(job), "--bits"])
    assert shown.exit_code == 3
    assert shown.stdout.count("problem: ") == 1
    assert "no bit-plan has a budget that could be looked at" in shown.stdout


@pytest.mark.parametrize(
    ("plan", "like"),
    [
        ({"method": "omse", "low": 2, "high": 6}, {"method": "rtn", "bits": 6}),
        ({"method": "hqq", "bits": 3}, {"method": "rtn", "bits": 3}),
        ({"method": "dfmpc", "low": 4, "high": 3}, {"method": "rtn", "bits": 4}),
        ({"method": "dfmpc", "budget": {"bits_per_weight": 2.5}}, {"method": "rtn", "bits": 3}),
        ({"method": "dfmpc", "budget": {"bits_per_weight": 9}}, {"method": "rtn", "bits": 8}),
    ],
    ids=["neighbour-2-6", "neighbour-3", "low-above-high", "budget-2.5", "budget-9"],
)
def test_sizes_are_foretold_from_the_widest_bits(bench: Any, plan: dict[str, object], like: dict[str, object]) -> None:
    job = load_job(bench.job([bench.model("net")], [{"name": "a", **plan}, {"name": "b", **like}]))
    sizes = [predicted_artifact_bytes(task) for task in expand(job)]
    assert sizes[0] == sizes[1]


def test_budgets_in_bytes_say_their_own_size(bench: Any) -> None:
    plans = [
        {"name": "bytes", "method": "dfmpc", "budget": {"bytes": "2kB"}},
        {"name": "ratio", "method": "dfmpc", "budget": {"ratio": 2}},
    ]
    job = load_job(bench.job([bench.model("net")], plans))
    checkpoint = (bench.folder / "net.safetensors").stat().st_size
    assert [predicted_artifact_bytes(task) for task in expand(job)] == [2000, checkpoint // 2]
