"""The columns of a report, each once: name, type, unit and meaning for Parquet, tables and docs/report.md."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Status = Literal["done", "reused", "failed", "interrupted"]


@dataclass(frozen=True)
class Column:
    """What a column means, and its unit; pure numbers and names have none."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class ModelRow:
    """One task of a run (a model under a bit-plan), as one attempt at it left it. Null: not known or not applicable."""

    run: Annotated[str, Column("Name of the run's folder.")]
    task: Annotated[str, Column("MODEL/PLAN.")]
    model: Annotated[str, Column("Name of the model.")]
    bit_plan: Annotated[str, Column("Name of the bit-plan.")]
    method: Annotated[str, Column("Method of the bit-plan: dfmpc, rtn, …")]
    status: Annotated[Status, Column("done, reused (an earlier artifact was kept), failed or interrupted.")]
    finished_at: Annotated[
        datetime, Column("When the attempt ended; of a task's several rows the newest counts.", "UTC")
    ]
    attempt: Annotated[str, Column("Identifier of the attempt; its log has this name.")] = ""
    recipe: Annotated[str | None, Column("Recipe that was used, after `auto` was resolved.")] = None
    tier: Annotated[str | None, Column("What stood in for data: none, closed-form or synthetic.")] = None
    calibrator: Annotated[str | None, Column("Calibrator of the BatchNorm statistics.")] = None
    key: Annotated[str | None, Column("Key of the artifact, 64 hexadecimal digits.")] = None
    artifact: Annotated[str | None, Column("Folder of the artifact, relative to the store.")] = None
    error_class: Annotated[str | None, Column("Class of the error of a failed task.")] = None
    error: Annotated[str | None, Column("Text of the error.")] = None
    failure: Annotated[
        str | None, Column("Class of the failure, which decides whether it is tried again (docs/engine.md).")
    ] = None
    attempts: Annotated[
        int | None, Column("How often a failed task was tried in this command; null elsewhere.", "count")
    ] = None
    params: Annotated[int | None, Column("Weights and other parameters of the model.", "count")] = None
    pairs: Annotated[
        int | None, Column("Pairs of a LOW and a HIGH layer; 0 for rtn, which repairs nothing.", "count")
    ] = None
    bytes_before: Annotated[int | None, Column("Size of the checkpoint's files.", "bytes")] = None
    bytes_after: Annotated[int | None, Column("Size of the artifact's files.", "bytes")] = None
    ratio: Annotated[float | None, Column("bytes_before / bytes_after.")] = None
    bits_per_weight: Annotated[float | None, Column("Codes and scales over the quantized weights.", "bits")] = None
    top1_before: Annotated[float | None, Column("Top-1 accuracy of the original network.", "per cent")] = None
    top1_after: Annotated[float | None, Column("Top-1 accuracy of the compressed network.", "per cent")] = None
    top5_before: Annotated[float | None, Column("Top-5 accuracy of the original network.", "per cent")] = None
    top5_after: Annotated[float | None, Column("Top-5 accuracy of the compressed network.", "per cent")] = None
    agreement: Annotated[
        float | None, Column("Fraction of the images that both networks put into the same class.", "0–1")
    ] = None
    kl: Annotated[
        float | None,
        Column("Mean over the images of KL(softmax of the original's logits ‖ that of the compressed one's).", "nats"),
    ] = None
    logit_sqnr_db: Annotated[
        float | None,
        Column("Power of the original logits over that of their change; null where nothing changed.", "dB"),
    ] = None
    measured_on: Annotated[
        str | None, Column("images (of the job's data set) or synthetic (seeded, made from no data: docs/fidelity.md).")
    ] = None
    images: Annotated[int | None, Column("Images that were evaluated.", "count")] = None
    gate: Annotated[str | None, Column("pass, warn, fail or none (no gate, or none that could be checked).")] = None
    gate_reason: Annotated[str | None, Column("Why the gate failed, warned or could not be checked.")] = None
    read_s: Annotated[float | None, Column("Reading the model and capturing its graph.", "seconds")] = None
    compress_s: Annotated[float | None, Column("Compressing.", "seconds")] = None
    write_s: Annotated[float | None, Column("Writing the artifact.", "seconds")] = None
    commit_s: Annotated[
        float | None,
        Column("Bringing the artifact to the disk and renaming it, while something else computes.", "seconds"),
    ] = None
    evaluate_s: Annotated[float | None, Column("Evaluating.", "seconds")] = None
    gb_per_s: Annotated[
        float | None, Column("bytes_before over read_s + compress_s + write_s.", "10⁹ bytes a second")
    ] = None
    peak_host_bytes: Annotated[
        int | None, Column("Largest resident set of the worker up to the attempt's end.", "bytes")
    ] = None
    peak_device_bytes: Annotated[int | None, Column("Largest allocation on the device.", "bytes")] = None
    device: Annotated[str | None, Column("Device that compressed, such as cpu or cuda:0.")] = None
    numerics: Annotated[
        str | None, Column("cpu or cuda where the recipe cannot promise the same bytes on both, else any.")
    ] = None
    dfmpc_version: Annotated[str | None, Column("Version of dfmpc.")] = None
    torch_version: Annotated[str | None, Column("Version of torch.")] = None


@dataclass(frozen=True)
class LayerRow:
    """One weight layer of one attempt. Null: not known or not applicable."""

    run: Annotated[str, Column("Name of the run's folder.")]
    task: Annotated[str, Column("MODEL/PLAN.")]
    model: Annotated[str, Column("Name of the model.")]
    bit_plan: Annotated[str, Column("Name of the bit-plan.")]
    name: Annotated[str, Column("Qualified name of the layer.")]
    role: Annotated[str, Column("low, high (paired), unpaired or kept (left unquantized).")]
    attempt: Annotated[str, Column("Identifier of the attempt; joins with the model row's.")] = ""
    partners: Annotated[tuple[str, ...], Column("The HIGH layers of a LOW one, the LOW layers of a HIGH one.")] = ()
    shape: Annotated[tuple[int, ...], Column("Shape of the weight as stored.")] = ()
    op: Annotated[str | None, Column("conv, conv_transpose or linear.")] = None
    params: Annotated[int | None, Column("Weights of the layer.", "count")] = None
    bits: Annotated[int | None, Column("Bits of a code; null for a kept layer.", "bits")] = None
    grid: Annotated[str | None, Column("Grid of the codes: ternary, dorefa, symmetric or asymmetric.")] = None
    granularity: Annotated[
        str | None,
        Column("What shares a scale: tensor, channel, group:N, or norm: a channel, its scale in the norm behind."),
    ] = None
    sqnr_db: Annotated[
        float | None, Column("Signal over quantization error of the weights before c; null without error.", "dB")
    ] = None
    sparsity: Annotated[float | None, Column("Fraction of the weights that are exactly zero.", "0–1")] = None
    c_min: Annotated[float | None, Column("Least compensation coefficient c of a LOW layer.")] = None
    c_mean: Annotated[float | None, Column("Mean of c.")] = None
    c_max: Annotated[float | None, Column("Largest c.")] = None
    c_histogram: Annotated[
        tuple[int, ...],
        Column("Channels by c in 20 equal bins over 0–2, the last open above; empty without c.", "count"),
    ] = ()
    dead_channels: Annotated[int | None, Column("Channels without a denominator: c = 1.", "count")] = None
    folded: Annotated[bool | None, Column("Whether c went into the norm; null where there is no c.")] = None
    norm_shift: Annotated[
        float | None, Column("RMS change of the running mean behind the layer.", "old standard deviations")
    ] = None
    clipped_fraction: Annotated[float | None, Column("Fraction of the weights beyond the grid's ends.", "0–1")] = None
    seconds: Annotated[float | None, Column("Time spent on the layer.", "seconds")] = None
    reason: Annotated[str, Column("Why the layer is in no pair, not folded or kept.")] = ""


Row = ModelRow | LayerRow


@dataclass(frozen=True)
class ColumnType:
    """A column by name: its Python type without None, whether it may be null, and its description."""

    name: str
    kind: Any
    nullable: bool
    column: Column

    @property
    def type_name(self) -> str:
        """The type as docs/report.md writes it."""
        if get_origin(self.kind) is tuple:
            return f"list of {get_args(self.kind)[0].__name__}"
        return "str" if get_origin(self.kind) is Literal else str(self.kind.__name__)


def columns_of(row_type: type[Row]) -> tuple[ColumnType, ...]:
    """Return the columns of ``row_type`` in the order in which they are stored."""
    hints = get_type_hints(row_type, include_extras=True)
    return tuple(_column_type(item.name, hints[item.name]) for item in fields(row_type))


def _column_type(name: str, hint: Any) -> ColumnType:
    declared, column = get_args(hint)
    choices = get_args(declared) if get_origin(declared) not in (tuple, Literal) else ()
    kinds = [kind for kind in choices if kind is not NoneType] or [declared]
    return ColumnType(name, kinds[0], NoneType in choices, column)


def documentation() -> str:
    """Return docs/report.md's tables of columns as Markdown."""
    parts = []
    for title, row_type in (("report/models", ModelRow), ("report/layers", LayerRow)):
        parts += [f"## {title}", "", *_markdown_table(columns_of(row_type)), ""]
    return "\n".join(parts)


def _markdown_table(columns: tuple[ColumnType, ...]) -> list[str]:
    lines = ["| column | type | null | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for item in columns:
        null = "yes" if item.nullable else ""
        lines.append(f"| {item.name} | {item.type_name} | {null} | {item.column.unit} | {item.column.text} |")
    return lines
