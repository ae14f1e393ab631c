from __future__ import annotations

from dfmpc.report.rows import LayerRow, ModelRow, columns_of, documentation
from dfmpc.report.schema import SCHEMA_VERSION, schema_of

# The columns of schema version 3. A change here without a new SCHEMA_VERSION breaks whoever reads old reports.
MODELS_V3 = """
run string!, task string!, model string!, bit_plan string!, method string!, status string!, finished_at timestamp[us,
tz=UTC]!, attempt string!, recipe string, tier string, calibrator string, key string, artifact string, error_class
string, error string, failure string, attempts int64, params int64, pairs int64, bytes_before int64, bytes_after
int64, ratio double, bits_per_weight double, top1_before double, top1_after double, top5_before double, top5_after
double, agreement double, kl double, logit_sqnr_db double, measured_on string, images int64, gate string, gate_reason
string, read_s double, compress_s double, write_s double, commit_s double, evaluate_s double, gb_per_s double,
peak_host_bytes int64, peak_device_bytes int64, device string, numerics string, dfmpc_version string,
torch_version string
"""
LAYERS_V3 = """
run string!, task string!, model string!, bit_plan string!, name string!, role string!, attempt string!,
partners list<item: string>!, shape list<item: int64>!, op string, params int64, bits int64, grid string,
granularity string, sqnr_db double, sparsity double, c_min double, c_mean double, c_max double,
c_histogram list<item: int64>!, dead_channels int64, folded bool, norm_shift double, clipped_fraction double,
seconds double, reason string!
"""


def described(row_type):
    return [f"{field.name} {field.type}{'' if field.nullable else '!'}" for field in schema_of(row_type)]


def test_the_schema_is_frozen():
    assert SCHEMA_VERSION == 3
    assert ", ".join(described(ModelRow)) == MODELS_V3.strip().replace("\n", " ")
    assert ", ".join(described(LayerRow)) == LAYERS_V3.strip().replace("\n", " ")


def test_every_column_says_what_it_is():
    for row_type in (ModelRow, LayerRow):
        for item in columns_of(row_type):
            assert item.column.text.endswith((".", "…")), item.name
            metadata = schema_of(row_type).field(item.name).metadata
            assert metadata == {b"text": item.column.text.encode(), b"unit": item.column.unit.encode()}


def test_the_documented_columns_are_the_columns(project):
    written = (project / "docs" / "report.md").read_text(encoding="utf-8")
    assert written.endswith(documentation()), "write documentation() of dfmpc.report.rows to the end of docs/report.md"
    assert "| top1_after | float | yes | per cent | Top-1 accuracy of the compressed network. |" in written
    assert "| partners | list of str |" in written
