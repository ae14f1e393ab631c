"""The job file, version 1, as pydantic models; ``dfmpc schema`` prints their JSON Schema."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .fields import Bits, Granularity, Name, Strict
from .gates import Gates
from .methods import BitPlan
from .mlflow_fields import MlflowModels

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|B)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)")
_FACTORS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "s": 1, "m": 60, "h": 3600}


def _quantity(pattern: re.Pattern[str], example: str) -> BeforeValidator:
    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        match = pattern.fullmatch(value.strip())
        if not match:
            raise ValueError(f"expected a number with a unit, such as {example}")
        return float(match.group(1)) * _FACTORS[match.group(2)]

    return BeforeValidator(parse, json_schema_input_type=str | float)


def _pattern(pattern: str, expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    return AfterValidator(check)


Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Factory = Annotated[str, _pattern(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", "module:callable, such as timm:create_model")]
Location = Annotated[
    str,
    _pattern(r"(?s)(?!.*://).+|package://\w[\w.-]*/(?!.*\.\.)[^/].*", "a path, or package://NAME/PATH without '..'"),
]
ByteSize = Annotated[float, _quantity(_SIZE, "16GiB"), Field(gt=0)]
Seconds = Annotated[float, _quantity(_DURATION, "30m"), Field(gt=0)]


class Preprocess(Strict):
    """How an image becomes a network's input; ``mean`` and ``std`` act on pixels in 0-1."""

    mean: tuple[float, float, float] | None = Field(None, description="Per-channel mean that is subtracted.")
    std: tuple[Positive, Positive, Positive] | None = Field(None, description="Per-channel divisor.")
    resize: int | None = Field(None, gt=0, description="Short side after bicubic resizing, in pixels.")
    crop: int | None = Field(None, gt=0, description="Side of the centre crop, in pixels.")

    @model_validator(mode="after")
    def _mean_with_std(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together, or neither")
        return self


class Evaluate(Preprocess):
    """Accuracy on labelled images; without this block, agreement on images made from no data is reported."""

    data: Text = Field(description="Parquet file with columns image{bytes,path} and label.")
    metrics: list[Literal["top1", "top5"]] = Field(default=["top1"], min_length=1, description="What to report.")
    limit: int | None = Field(None, gt=0, description="Use only the first N images.")
    hold_out: int | None = Field(
        None, ge=2, description="Leave out images 0, N, 2N, … of the file, such as those that a choice was made on."
    )


class Resources(Strict):
    """What the run may use."""

    devices: Literal["auto", "cpu", "cuda"] | list[str] = Field(
        "auto", description="auto: every CUDA device, else the CPU; cpu; cuda; or a list such as [cuda:0, cuda:2]."
    )
    threads: int = Field(
        1, ge=1, le=256, description="Threads a worker computes with; published recipes compress with one."
    )
    workers_per_device: int | None = Field(
        None, ge=1, le=256, description="Workers a device; default: up to four a GPU, on a CPU what its cores can feed."
    )
    reader_threads: int = Field(2, ge=1, le=64, description="Threads a worker reads and hashes inputs with.")
    host_memory: ByteSize | None = Field(
        None,
        description="Predicted memory that tasks at work may have together, such as 16GiB; a model above is refused. "
        "Default: nine tenths of what is free, and what is larger runs alone.",
    )
    task_timeout: Seconds | None = Field(None, description="Longest time for one task, such as 30m.")
    stuck_after: Seconds = Field(
        300, description="A worker that neither computes nor reads for so long is killed and its task tried once more."
    )
    cpu_fallback: bool = Field(
        False, description="Whether a task that no GPU has the memory for may be tried on the CPU in the end."
    )


class LayerRule(Strict):
    """An override for the layers whose qualified name matches; the first match wins."""

    match: Text = Field(description="fnmatch pattern over qualified layer names, such as 'features.*.conv1'.")
    bits: Bits | None = Field(None, description="Bits of these layers.")
    granularity: Granularity | None = Field(None, description="Granularity of these layers.")
    keep: bool = Field(False, description="true leaves these layers unquantized.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.bits is None and self.granularity is None) != self.keep:
            raise ValueError("expected bits, granularity or both, or keep: true alone")
        return self


class ModelFields(Strict):
    """What a job file and a registry's sidecar say of a model."""

    name: Name | None = Field(None, description="Name of the model; default: the file's name without its suffix.")
    factory: Factory | None = Field(None, description="module:callable that builds the network (allow-list).")
    args: list[str | int | float | bool | None] = Field(default=[], description="Positional arguments of the factory.")
    kwargs: dict[str, str | int | float | bool | None] = Field(default={}, description="Its keyword arguments.")
    checkpoint: Location | None = Field(
        None, description="File with the weights (.safetensors, its index.json, .pt, .pth, .th) or package://NAME/PATH."
    )
    program: Text | None = Field(None, description="A torch.export program (.pt2).")
    input: list[Annotated[int, Field(gt=0)]] | None = Field(
        None, min_length=2, description="Shape of one example input, batch first."
    )
    preprocess: Preprocess | None = Field(None, description="Overrides evaluate's preprocessing for this model.")
    gates: Gates | None = Field(
        None, description="Bounds of this model in the place of the job's, one by one; null switches one off."
    )

    def check_factory(self, *needed: str) -> None:
        """Raise ValueError where ``needed`` fields are missing beside a factory, or a factory's are there without."""
        missing = [field for field in needed if getattr(self, field) is None]
        if self.factory and missing:
            raise ValueError(f"expected {', '.join(missing)} beside factory")
        extra = [field for field in ("checkpoint", "args", "kwargs", "input") if getattr(self, field)]
        if not self.factory and extra:
            raise ValueError(f"expected no {', '.join(extra)} without a factory")


_MANY = {"glob": "their paths", "registry": "their paths", "mlflow": "their registry"}
_SOURCES = ("factory", "program", *_MANY)


class ModelSpec(ModelFields):
    """A model: a factory with a checkpoint, or a .pt2 program; or many: a glob of programs, a registry, or MLflow's."""

    glob: Text | None = Field(
        None,
        description="Pattern of .pt2 programs, relative to the job file; ** allowed. Names are paths with '__'.",
    )
    registry: Text | None = Field(
        None,
        description="Folder tree of models with sidecars (dfmpc.yaml) or .pt2 programs, docs/nightly.md; one that "
        "cannot be used fails alone. Names are paths below it with '__'.",
    )
    mlflow: MlflowModels | None = Field(
        None, description="Models of an MLflow registry, by their names there, docs/nightly.md."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [field for field in _SOURCES if getattr(self, field) is not None]
        if len(sources) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_SOURCES)}; got {', '.join(sources) or 'none'}")
        self.check_factory("name", "checkpoint", "input")
        if self.name and sources[0] in _MANY:
            raise ValueError(f"expected no name beside {sources[0]}: such models are named by {_MANY[sources[0]]}")
        return self


class Selector(Strict):
    """Names (fnmatch patterns) that narrow models x bit_plans."""

    model: str = Field("*", description="Pattern of model names.")
    plan: str = Field("*", description="Pattern of bit-plan names.")


class Job(Strict):
    """A job file: models x bit-plans, and what to do with the results."""

    version: Literal[1] = Field(description="Version of the job file's format.")
    name: Text = Field(description="Name of the job, for people.")
    output: Text = Field(description="The store: artifacts, evaluations and runs; relative to the current folder.")
    seed: int = Field(0, ge=0, description="Seed of the images that stand in for labelled ones.")
    models: list[ModelSpec] = Field(min_length=1, description="The models.")
    bit_plans: list[BitPlan] = Field(min_length=1, description="The bit-plans.")
    layers: list[LayerRule] = Field(default=[], description="Overrides by layer name, first match wins.")
    include: list[Selector] = Field(default=[], description="Only these combinations; empty means all.")
    exclude: list[Selector] = Field(default=[], description="Not these combinations.")
    evaluate: Evaluate | None = Field(None, description="Accuracy on labelled images.")
    gates: Gates = Field(default=Gates(), description="Bounds that finished tasks must keep.")
    resources: Resources = Field(default=Resources(), description="Devices, threads, memory and time.")
