from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from dfmpc.errors import StorageError, UsageError
from dfmpc.report import part_files
from dfmpc.report.parts import read_layers, read_models, write_part, write_parts
from dfmpc.report.rows import LayerRow, ModelRow
from dfmpc.report.schema import SCHEMA_VERSION

NOON = datetime(2025, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)
TASK = {"run": "r", "task": "net/mp2-6", "model": "net", "bit_plan": "mp2-6"}


def model_row(**changes):
    fields = TASK | {"method": "dfmpc", "status": "done", "finished_at": NOON} | changes
    return ModelRow(**fields)


def layer_row(name="conv1", **changes):
    return LayerRow(**(TASK | {"name": name, "role": "low"} | changes))


FULL_MODEL = model_row(
    recipe="published",
    tier="closed-form",
    params=270_000,
    bytes_before=555_664,
    bytes_after=60_000,
    ratio=9.26,
    top1_before=91.48,
    agreement=0.75,
    gate="pass",
)
FULL_LAYER = layer_row(
    partners=("conv2", "conv3"),
    shape=(16, 3, 3, 3),
    op="conv",
    bits=2,
    sqnr_db=7.5,
    c_histogram=(0, 3, 13),
    folded=True,
    reason="größer",
)


def test_rows_come_back_as_they_were(tmp_path):
    layers = [FULL_LAYER, layer_row("conv2", role="high", folded=False), layer_row("fc", role="unpaired")]
    file = write_part(tmp_path, FULL_MODEL, layers, "a1")
    assert read_models(tmp_path) == [dataclasses.replace(FULL_MODEL, attempt="a1")]
    assert read_layers(tmp_path) == [dataclasses.replace(row, attempt="a1") for row in layers]
    assert file.parent == tmp_path / "report" / "models"
    assert [path.name for path in (tmp_path / "report" / "layers").iterdir()] == [file.name]


@pytest.mark.parametrize(("rows", "compression"), [(1, "UNCOMPRESSED"), (4000, "ZSTD")])
def test_a_large_part_is_zstd_and_a_small_one_is_plain(tmp_path, rows, compression):
    file = write_part(tmp_path, FULL_MODEL, [FULL_LAYER] * rows, "a1")
    layers = tmp_path / "report" / "layers" / file.name
    assert pq.ParquetFile(layers).metadata.row_group(0).column(0).compression == compression
    assert len(read_layers(tmp_path)) == rows


def test_several_attempts_are_one_part_and_come_back_in_order_of_tasks(tmp_path):
    rows = {name: [layer_row(f"{name}{number}", task=name) for number in (2, 1)] for name in ("net/b", "net/a")}
    batch = [(model_row(task=name, attempt=f"of-{name[-1]}"), layers) for name, layers in rows.items()]
    file = write_parts(tmp_path, batch)
    assert [path.name for path in (tmp_path / "report" / "models").iterdir()] == [file.name]
    assert [path.name for path in (tmp_path / "report" / "layers").iterdir()] == [file.name]
    assert [(row.task, row.attempt) for row in read_models(tmp_path)] == [("net/a", "of-a"), ("net/b", "of-b")]
    found = [(row.name, row.attempt) for row in read_layers(tmp_path)]
    assert found == [("net/a2", "of-a"), ("net/a1", "of-a"), ("net/b2", "of-b"), ("net/b1", "of-b")]
    assert write_parts(tmp_path, batch) != file
    assert [(row.name, row.attempt) for row in read_layers(tmp_path)] == found


def test_a_part_of_no_attempts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one attempt"):
        write_parts(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_layers_without_a_model_row_do_not_count(tmp_path):
    file = write_part(tmp_path, FULL_MODEL, [FULL_LAYER], "a1")
    file.unlink()  # as if killed in between
    assert (read_models(tmp_path), read_layers(tmp_path)) == ([], [])


def test_a_part_that_was_merged_between_listing_and_reading_is_found_where_it_went(tmp_path, monkeypatch):
    one = write_part(tmp_path, FULL_MODEL, [FULL_LAYER], "a1")
    read = part_files.read_part

    def read_late(file, row_type):
        if file == one:  # somebody merges after our listing and before our reading
            two = one.with_name("merged.parquet")
            for kind in ("layers", "models"):
                part = part_files.part_file(tmp_path, kind, one.name)
                part.rename(part.with_name(two.name))
        return read(file, row_type)

    monkeypatch.setattr(part_files, "read_part", read_late)
    assert [row.attempt for row in read_models(tmp_path)] == ["a1"]
    assert [row.name for row in read_layers(tmp_path)] == ["conv1"]


def test_parts_that_never_stop_vanishing_are_told(tmp_path, monkeypatch):
    names = (f"{number}.parquet" for number in range(100))
    monkeypatch.setattr(part_files, "part_names", lambda *_: [next(names)])
    with pytest.raises(UsageError, match="models: parts keep vanishing while they are read: try again"):
        read_models(tmp_path)


def test_many_parts_and_a_large_one_are_read_whole(tmp_path):
    tasks = [f"net{number:04}/p" for number in range(1000)]
    for start in range(0, 40):
        write_part(tmp_path, model_row(task=tasks[start]), [layer_row(task=tasks[start])], "a1")
    write_parts(tmp_path, [(model_row(task=task, attempt="a1"), [layer_row(task=task)]) for task in tasks[40:]])
    assert [row.task for row in read_models(tmp_path)] == tasks
    assert [row.task for row in read_layers(tmp_path)] == tasks


def test_the_newest_attempt_counts_whatever_it_is_called(tmp_path):
    failed = model_row(status="failed", error_class="StorageError", error="disk full")
    write_part(tmp_path, model_row(finished_at=NOON + timedelta(microseconds=1)), [layer_row("new")], "a1")
    write_part(tmp_path, failed, [layer_row("old")], "b2")
    other = model_row(task="net/rtn4", bit_plan="rtn4", method="rtn")
    write_part(tmp_path, other, [], "a1")
    assert [(row.task, row.status, row.attempt) for row in read_models(tmp_path)] == [
        ("net/mp2-6", "done", "a1"),
        ("net/rtn4", "done", "a1"),
    ]
    assert [row.name for row in read_layers(tmp_path)] == ["new"]


def test_infinite_and_undefined_become_null(tmp_path):
    write_part(tmp_path, model_row(logit_sqnr_db=math.inf, agreement=math.nan), [layer_row(sqnr_db=math.inf)], "a1")
    (row,) = read_models(tmp_path)
    assert (row.logit_sqnr_db, row.agreement) == (None, None)
    assert read_layers(tmp_path)[0].sqnr_db is None


def test_a_run_without_parts_is_empty_and_no_run_is_an_error(tmp_path):
    assert read_models(tmp_path) == []
    assert read_layers(tmp_path) == []
    with pytest.raises(UsageError, match="absent: no such run"):
        read_models(tmp_path / "absent")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "models").write_text("a file where the folder belongs")
    with pytest.raises(UsageError, match=r"report/models cannot be read \(Not a directory\)"):
        read_models(tmp_path)


def test_a_torn_part_is_named(tmp_path):
    file = write_part(tmp_path, FULL_MODEL, [FULL_LAYER], "a1")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UsageError) as caught:
        read_models(tmp_path)
    assert str(file) in str(caught.value)
    assert "torn or unreadable" in str(caught.value)


def test_a_missing_part_of_layers_is_named(tmp_path):
    file = write_part(tmp_path, FULL_MODEL, [FULL_LAYER], "a1")
    lost = tmp_path / "report" / "layers" / file.name
    lost.unlink()
    with pytest.raises(UsageError, match="missing") as caught:
        read_layers(tmp_path)
    assert str(lost) in str(caught.value)


@pytest.mark.parametrize(("version", "said"), [(b"1", "version 1"), (b"2", "version 2"), (None, "version none")])
def test_another_schema_version_is_refused_by_name(tmp_path, version, said):
    file = write_part(tmp_path, FULL_MODEL, [], "a1")
    metadata = {} if version is None else {b"dfmpc.schema_version": version}
    pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
    with pytest.raises(UsageError, match=f"{said}, this dfmpc reads {SCHEMA_VERSION}") as caught:
        read_models(tmp_path)
    assert str(file) in str(caught.value)


def test_other_columns_under_our_version_are_refused(tmp_path):
    file = write_part(tmp_path, FULL_MODEL, [], "a1")
    pq.write_table(pq.read_table(file).drop_columns(["ratio"]), file)
    with pytest.raises(UsageError, match=f"columns are not those of report schema {SCHEMA_VERSION}"):
        read_models(tmp_path)


def test_leftovers_of_a_dead_writer_are_not_read(tmp_path):
    file = write_part(tmp_path, FULL_MODEL, [], "a1")
    (file.parent / f".{file.name}.123.tmp").write_bytes(b"half")
    assert len(read_models(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "report").write_text("a file where the folder belongs")
    with pytest.raises(StorageError, match="report"):
        write_part(tmp_path, FULL_MODEL, [], "a1")


def test_an_attempt_that_is_no_file_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\.\./x'"):
        write_part(tmp_path, FULL_MODEL, [], "../x")


@pytest.fixture
def run(tmp_path):
    write_part(tmp_path, FULL_MODEL, [FULL_LAYER], "a1")
    failed = model_row(task="net/rtn4", bit_plan="rtn4", status="failed", error_class="NonFiniteError", error="NaN")
    write_part(tmp_path, failed, [], "a1")
    return tmp_path / "report"


def test_pyarrow_and_pandas_read_the_folder(run):
    assert pq.read_table(run / "models").num_rows == 2
    frame = pd.read_parquet(run / "models").sort_values("bit_plan")
    assert frame["top1_before"].tolist()[0] == 91.48
    assert frame["bytes_before"].tolist()[0] == 555_664
    assert frame["finished_at"].iloc[0] == pd.Timestamp(NOON)
    assert list(pd.read_parquet(run / "layers")["partners"].iloc[0]) == ["conv2", "conv3"]


def test_duckdb_reads_the_parts(run):
    found = duckdb.sql(
        f"select m.model, m.params, l.shape, l.c_histogram, l.folded from '{run}/models/*.parquet' m "
        f"join '{run}/layers/*.parquet' l using (task, attempt) where m.status = 'done'"
    ).fetchall()
    assert found == [("net", 270_000, [16, 3, 3, 3], [0, 3, 13], True)]


def test_polars_reads_the_parts(run):
    frame = pl.read_parquet(run / "models" / "*.parquet").sort("bit_plan")
    assert frame["status"].to_list() == ["done", "failed"]
    assert frame["agreement"].to_list() == [0.75, None]
    assert pl.read_parquet(run / "layers" / "*.parquet")["reason"].to_list() == ["größer"]
