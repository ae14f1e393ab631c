from __future__ import annotations

import dataclasses
import json
import math
from datetime import UTC, datetime

import pytest
from dfmpc.report.rows import LayerRow, ModelRow, columns_of
from dfmpc.report.tables import Table, TableColumn, layers_table, models_table, render, summary, to_json

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=UTC)


def model_row(model="net", plan="mp2-6", **changes):
    task = {"run": "r", "task": f"{model}/{plan}", "model": model, "bit_plan": plan}
    return ModelRow(**(task | {"method": "dfmpc", "status": "done", "finished_at": NOON} | changes))


def layer_row(name="conv1", task="net/mp2-6", **changes):
    fields = {"run": "r", "task": task, "model": "net", "bit_plan": "mp2-6", "name": name, "role": "low"}
    return LayerRow(**(fields | changes))


FULL = model_row(
    bytes_before=3 * 2**20,
    bytes_after=2**19,
    ratio=6.0,
    bits_per_weight=3.456,
    top1_before=91.484,
    top1_after=64.9,
    agreement=0.6789,
    logit_sqnr_db=5.25,
    gate="pass",
    read_s=0.5,
    compress_s=1.25,
    write_s=0.25,
    evaluate_s=10.0,
)


def test_a_table_of_models_as_text():
    failed = model_row(plan="rtn4", status="failed", error_class="NonFiniteError", error="conv1.weight: NaN\nat …")
    assert render(models_table([FULL, failed])).split("\n") == [
        "                                                                             logit",
        "                         MiB    MiB         bits a  top-1 %  top-1 %          SQNR        time",
        "model  plan   status  before  after  ratio  weight   before    after  agree     dB  gate     s",
        "-----  -----  ------  ------  -----  -----  ------  -------  -------  -----  -----  ----  ----",
        "net    mp2-6  done      3.00   0.50   6.00    3.46    91.48    64.90  0.679    5.2  pass  12.0",
        "net    rtn4   failed",
        "",
        "net/rtn4 failed: NonFiniteError: conv1.weight: NaN",
    ]


def test_the_widest_models_fit_120_columns():
    row = dataclasses.replace(
        FULL, model="a" * 90, bit_plan="b" * 60, status="interrupted", top5_before=100.0, top5_after=100.0
    )
    lines = render(models_table([row, FULL])).split("\n")
    assert max(map(len, lines)) == 120
    assert any(line.startswith("aaaa") and "…  bbbb" in line and "100.00" in line for line in lines)


def test_a_closed_gate_and_a_warning_are_explained():
    row = dataclasses.replace(FULL, gate="fail", gate_reason="agreement is 0.6789, min_agreement is 0.9")
    assert models_table([row]).notes == ("net/mp2-6 gate closed: agreement is 0.6789, min_agreement is 0.9",)
    row = dataclasses.replace(row, gate="warn")
    assert models_table([row]).notes == ("net/mp2-6 gate warns: agreement is 0.6789, min_agreement is 0.9",)


def test_a_gate_that_could_not_be_checked_is_said_once():
    reason = "max_top1_drop was not checked: no labelled images, give evaluate.data"
    unchecked = [model_row(plan=plan, gate="none", gate_reason=reason) for plan in "ab"]
    assert models_table([*unchecked, FULL]).notes == (f"gate of 2 tasks: {reason}",)
    half = dataclasses.replace(FULL, gate_reason=reason)
    assert models_table([half]).notes == (f"gate of 1 task: {reason}",)


def test_columns_that_say_nothing_are_left_out():
    titles = [column.title for column in models_table([model_row(gate="none", logit_sqnr_db=math.inf)]).columns]
    assert titles == ["model", "plan", "status"]
    assert render(models_table([])) == ""


def test_a_table_of_layers_as_text():
    low = layer_row(
        shape=(16, 3, 3, 3),
        bits=2,
        grid="ternary",
        granularity="channel",
        sqnr_db=7.5,
        sparsity=0.4567,
        c_min=0.5,
        c_mean=0.9,
        c_max=1.2,
        dead_channels=1,
        folded=True,
        norm_shift=0.1,
        seconds=0.0125,
        partners=("conv2", "conv3"),
    )
    kept = layer_row("fc", role="kept", shape=(10, 64), reason="keep: true")
    lines = render(layers_table([low, kept])).split("\n")
    assert [line[:56] for line in lines] == [
        "                                               weights  ",
        "layer  role  shape     bits  grid     scale a  SQNR dB  ",
        "-----  ----  --------  ----  -------  -------  -------  ",
        "conv1  low   16x3x3x3     2  ternary  channel      7.5  ",
        "fc     kept  10x64                                      ",
    ]
    assert lines[1].split()[-7:] == ["folded", "old", "sd", "ms", "partners", "or", "reason"]
    assert lines[3].split()[7:] == ["45.7", "0.500", "0.900", "1.200", "1", "yes", "0.100", "12.5", "conv2,", "conv3"]
    assert lines[4].endswith(" keep: true")


def test_layers_of_several_tasks_name_them():
    table = layers_table([layer_row(), layer_row(task="net/rtn4")])
    assert [row[0] for row in table.rows] == ["net/mp2-6", "net/rtn4"]
    assert table.columns[0].title == "task"


def test_render_aligns_and_notes_follow():
    table = Table(
        (TableColumn("name", right=False), TableColumn("n\nMiB")), (("a", "1.0"), ("bcdef", "12.0")), ("note",)
    )
    assert render(table) == "          n\nname    MiB\n-----  ----\na       1.0\nbcdef  12.0\n\nnote"


@pytest.mark.parametrize("row", [FULL, layer_row(shape=(1, 2), partners=("x",))], ids=["model", "layer"])
def test_json_has_the_names_of_the_columns(row):
    (record,) = json.loads(to_json([row]))
    assert list(record) == [item.name for item in columns_of(type(row))]


def test_json_values():
    first, second = json.loads(to_json([FULL, dataclasses.replace(FULL, logit_sqnr_db=math.inf)]))
    assert (first["finished_at"], first["top1_before"], first["recipe"]) == ("2025-01-02T12:00:00+00:00", 91.484, None)
    assert (first["logit_sqnr_db"], second["logit_sqnr_db"]) == (5.25, None)
    assert json.loads(to_json([])) == []


def test_summary_counts_tasks_sizes_and_gates():
    rows = [
        FULL,
        dataclasses.replace(FULL, status="reused", task="net/a", gate="fail"),
        model_row(plan="b", status="failed"),
        model_row(plan="c", status="failed"),
    ]
    assert summary(rows).split("\n") == [
        "4 tasks: 1 done, 2 failed, 1 reused",
        "6.00 MiB before, 1.00 MiB after (6.00 times smaller)",
        "gates: 1 pass, 1 fail",
    ]
    assert summary(rows[2:3]) == "1 task: 1 failed"
    assert summary([]) == "0 tasks: none"
