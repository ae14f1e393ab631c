"""Merging a report's parts: what is there afterwards, beside readers and rivals, and after a kill at every step."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from dfmpc.report.compact import compact
from dfmpc.report.parts import read_layers, read_models, write_part, write_parts
from dfmpc.report.rows import LayerRow, ModelRow
from dfmpc.report.schema import SCHEMA_VERSION

NOON = datetime(2025, 1, 2, 12, tzinfo=UTC)


def model_row(number: int, attempt: str = "a1", **changes: object) -> ModelRow:
    row = ModelRow("r", f"net{number}/p", f"net{number}", "p", "rtn", "done", NOON, attempt, params=number)
    return dataclasses.replace(row, **changes)


def layer_rows(number: int, count: int = 3) -> list[LayerRow]:
    rows = [LayerRow("r", f"net{number}/p", f"net{number}", "p", f"layer{9 - place}", "low") for place in range(count)]
    return [dataclasses.replace(row, shape=(number, place), sqnr_db=0.5) for place, row in enumerate(rows)]


def fill(run: Path, numbers: range = range(5)) -> None:
    for number in numbers:
        write_part(run, model_row(number), layer_rows(number), "a1")


def names(run: Path) -> tuple[list[str], list[str]]:
    models, layers = (sorted(os.listdir(run / "report" / kind)) for kind in ("models", "layers"))
    return models, layers


def test_all_parts_become_one_and_no_row_changes(tmp_path: Path) -> None:
    fill(tmp_path)
    write_part(tmp_path, model_row(2, finished_at=NOON - timedelta(hours=1), status="failed"), [], "a0")
    write_part(tmp_path, model_row(9, status="failed", error="NaN"), [], "b1")
    models, layers = read_models(tmp_path), read_layers(tmp_path)
    assert (len(models), len(layers)) == (6, 15)
    assert compact(tmp_path) == 7
    assert (read_models(tmp_path), read_layers(tmp_path)) == (models, layers)
    (one,), (other,) = names(tmp_path)
    assert one == other
    assert compact(tmp_path) == 0
    assert names(tmp_path) == ([one], [one])
    # every attempt is kept, and other tools see one file
    sql = f"select attempt, status from '{tmp_path}/report/models/*.parquet' where task = 'net2/p' order by finished_at"
    assert duckdb.sql(sql).fetchall() == [("a0", "failed"), ("a1", "done")]
    assert (
        pq.read_schema(tmp_path / "report" / "models" / one).metadata[b"dfmpc.schema_version"]
        == str(SCHEMA_VERSION).encode()
    )


def test_a_merged_part_merges_with_later_ones(tmp_path: Path) -> None:
    fill(tmp_path)
    compact(tmp_path)
    fill(tmp_path, range(5, 8))
    assert compact(tmp_path) == 4
    assert [row.params for row in read_models(tmp_path)] == list(range(8))
    assert [row.name for row in read_layers(tmp_path)] == ["layer9", "layer8", "layer7"] * 8
    assert [len(found) for found in names(tmp_path)] == [1, 1]


def test_the_same_rows_give_the_same_file_whatever_parts_they_came_in(tmp_path: Path) -> None:
    batch = [(model_row(number), layer_rows(number)) for number in range(5)]
    fill(tmp_path / "one")
    write_parts(tmp_path / "two", batch[3:])
    write_parts(tmp_path / "two", batch[:3])
    for run in ("one", "two"):
        compact(tmp_path / run)
    assert names(tmp_path / "one") == names(tmp_path / "two")


def test_nothing_to_merge_is_no_error(tmp_path: Path) -> None:
    assert compact(tmp_path) == 0
    file = write_part(tmp_path, model_row(1), layer_rows(1), "a1")
    assert (compact(tmp_path), names(tmp_path)) == (0, ([file.name], [file.name]))


@pytest.mark.parametrize("kind", ["models", "layers"])
def test_a_torn_part_is_left_alone_and_told(tmp_path: Path, kind: str) -> None:
    fill(tmp_path)
    bad = tmp_path / "report" / kind / write_part(tmp_path, model_row(7), layer_rows(7), "a1").name
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-20])
    told: list[str] = []
    assert compact(tmp_path, told.append) == 5
    assert len(told) == 1
    assert f"not merged with the rest of the report: {bad}: torn or unreadable" in told[0]
    assert [len(found) for found in names(tmp_path)] == [2, 2]
    bad.write_bytes(whole)
    assert compact(tmp_path, told.append) == 2
    assert [row.params for row in read_models(tmp_path)] == [0, 1, 2, 3, 4, 7]
    assert len(read_layers(tmp_path)) == 18


def test_a_part_without_its_layers_is_left_alone_and_told(tmp_path: Path) -> None:
    fill(tmp_path)
    lost = tmp_path / "report" / "layers" / write_part(tmp_path, model_row(7), layer_rows(7), "a1").name
    lost.unlink()
    told: list[str] = []
    assert compact(tmp_path, told.append) == 5
    assert told == [f"{lost}: part of the report is missing: its model rows are left as they are"]
    assert lost.name in names(tmp_path)[0]


@pytest.mark.parametrize("rows", [0, 3])
def test_layers_whose_model_rows_are_still_to_come_are_left(tmp_path: Path, rows: int) -> None:
    fill(tmp_path)
    late = write_part(tmp_path, model_row(7), layer_rows(7, rows), "a1")
    row = late.read_bytes()
    late.unlink()
    assert compact(tmp_path) == 5
    assert late.name in names(tmp_path)[1]
    late.write_bytes(row)
    assert [row.params for row in read_models(tmp_path)] == [0, 1, 2, 3, 4, 7]
    assert len(read_layers(tmp_path)) == 15 + rows


def test_layers_of_a_merge_at_work_are_left_until_nobody_can_be_at_it(tmp_path: Path) -> None:
    fill(tmp_path)
    compact(tmp_path)
    (merged,) = names(tmp_path)[0]
    fill(tmp_path, range(5, 8))
    other = tmp_path / "report" / "layers" / "merged-0123.parquet"  # somebody else has not written its model rows yet
    other.write_bytes((other.parent / merged).read_bytes())
    assert compact(tmp_path) == 4
    assert other.exists()
    assert len(read_layers(tmp_path)) == 24
    os.utime(other, (0, 0))
    assert compact(tmp_path) == 1
    assert [len(found) for found in names(tmp_path)] == [1, 1]
    assert len(read_layers(tmp_path)) == 24


KILLED = """
import os, signal, sys
from pathlib import Path
import dfmpc.report.compact as compact
step, run = int(sys.argv[1]), Path(sys.argv[2])
done, write, unlink = 0, compact.write_atomically, Path.unlink
def counted(call):
    def at_most(path, *rest, **options):
        global done
        done += 1
        if done > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(path, *rest, **options)
    return at_most
compact.write_atomically = counted(write)
removed = counted(unlink)
Path.unlink = lambda path, **how: (removed if path.suffix == ".parquet" else unlink)(path, **how)
compact.compact(run)
"""


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 7, 8])
def test_a_kill_at_any_step_loses_nothing_and_the_next_one_ends_it(tmp_path: Path, step: int) -> None:
    """Steps are: layers written, models written, then models and layers of a part removed, four parts."""
    fill(tmp_path, range(4))
    models, layers = read_models(tmp_path), read_layers(tmp_path)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(step), str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (read_models(tmp_path), read_layers(tmp_path)) == (models, layers)
    assert len(names(tmp_path)[1]) == {0: 4, 1: 5, 2: 5, 3: 5, 4: 4, 7: 3, 8: 2}[step]
    compact(tmp_path)
    assert (read_models(tmp_path), read_layers(tmp_path)) == (models, layers)
    (one,), (other,) = names(tmp_path)
    assert one == other


WRITES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_report_compact import layer_rows, model_row
from dfmpc.report.compact import compact
from dfmpc.report.parts import write_part
run, first = Path(sys.argv[2]), int(sys.argv[3])
for number in range(first, first + 12):
    write_part(run, model_row(number), layer_rows(number), "a1")
    if number % 4 == 3:
        compact(run)
compact(run)
"""


def test_several_write_and_merge_at_the_same_time_while_others_read(tmp_path: Path) -> None:
    tmp_path.joinpath("report").mkdir()
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", WRITES, here, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(first)]) for first in (0, 12, 24)]
    seen: list[int] = []
    while any(writer.poll() is None for writer in writers):
        models, layers = read_models(tmp_path), read_layers(tmp_path)
        assert len(layers) >= 3 * len(models)
        seen.append(len(models))
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen == sorted(seen)  # a row that was seen once is never missing later
    compact(tmp_path)
    assert [len(found) for found in names(tmp_path)] == [1, 1]
    assert sorted(row.params or 0 for row in read_models(tmp_path)) == list(range(36))
    found = read_layers(tmp_path)
    assert json.dumps([row.shape for row in found if row.task == "net7/p"]) == "[[7, 0], [7, 1], [7, 2]]"
    assert len(found) == 108
