#!/usr/bin/env python
"""How well does what is measured without labels foretell the loss of accuracy? The tables of docs/fidelity.md.

    python scripts/calibrate_fidelity.py STORE [--only PATTERN ...] [--kinds KIND ...] [--images 2000] [--json FILE]

STORE holds a run of jobs/fidelity.yaml. Every artifact and its original see labelled images and four kinds of made-up
ones; logits are kept in STORE-logits, so that an interrupted call goes on where it stopped, and several may work at
once on networks of their own. Of resnet20 and mobilenetv2, on which kind and threshold were chosen, the last 1,000 of
the 5,000 shared CIFAR images count, of the other CIFAR networks the first ``--images``, of EfficientNet-Lite0 four
fifths of the photographs. The folder of the images is $DFMPC_SHARED, or ``shared`` beside the project.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import torch
from dfmpc.artifact.loader import load
from dfmpc.artifact.storage import write_atomically
from dfmpc.compress.priors import normalise, synthetic_images
from dfmpc.errors import DfmpcError, UsageError
from dfmpc.evaluate import metrics
from dfmpc.evaluate.forward import logits
from dfmpc.evaluate.images import ImageSet, batches, read_images
from dfmpc.evaluate.noise import noise_images
from dfmpc.evaluate.settings import is_large, synthetic_count
from dfmpc.evaluate.synthetic import fidelity_images
from dfmpc.job.schema import Preprocess
from dfmpc.job.sources import ModelSource
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from dfmpc.run.store import Store, find_run
from safetensors.torch import load_file, save
from torch import Tensor, nn

SHARED = Path(os.environ.get("DFMPC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DEVELOPMENT = ("resnet20", "mobilenetv2")
LABELLED = "photographs"
MADE = ("lit-leaves", "leaves", "fractal", "noise")
"""What ``dfmpc run`` measures on, two priors as a calibrator has them, and what was measured on before."""
MIXTURE = "mixture"
"""A third of each of the last three."""
ORIGINAL = "original"
SEED = 2**40
ALLOWED = (1.0, 3.0)
"""Points of top-1 that may be lost."""
STEP = 0.01
"""Thresholds of the agreement are multiples of it."""


@dataclass(frozen=True)
class Figures:
    """Of one artifact on one kind of images."""

    agreement: float
    kl: float
    sqnr_db: float


@dataclass(frozen=True)
class Point:
    """One artifact: what it lost, and what the kinds of images say."""

    network: str
    plan: str
    drop: float
    """Points of top-1."""
    seen: dict[str, Figures]
    """By kind; of photographs, labels are not used here."""


@dataclass(frozen=True)
class Asked:
    """The command line."""

    only: Sequence[str]
    kinds: Sequence[str]
    images: int
    allow_code: Sequence[str]


class Forwarded:
    """The logits of one network and of its artifacts, made once and kept in files."""

    def __init__(self, source: ModelSource, store: Store, asked: Asked) -> None:
        self.source, self.store, self.kinds, self.allow_code = source, store, asked.kinds, asked.allow_code
        self.shape = tuple(source.input or ())[1:]
        self.preprocess = source.preprocess or Preprocess.model_validate({})
        self.folder = store.root.with_name(f"{store.root.name}-logits") / source.name
        self.labelled = labelled_images(source.name, asked.images)

    def make(self, plan: str) -> None:
        """Forward what is not there yet."""
        missing = [kind for kind in (LABELLED, *self.kinds) if not self._file(plan, kind).is_file()]
        network = self._network(plan) if missing else nn.Identity()
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in missing:
            found = logits(network, self._batches(kind), name=f"{self.source.name}/{plan}")
            write_atomically(self._file(plan, kind), save({"logits": found}))
            print(f"{self.source.name}/{plan}: {len(found)} {kind}", file=sys.stderr, flush=True)

    def of(self, plan: str, kind: str) -> Tensor:
        """Return [N, classes]."""
        if kind == MIXTURE:
            parts = [self.of(plan, part) for part in MADE[1:]]
            return torch.cat([part[: len(part) // len(parts)] for part in parts])
        return load_file(self._file(plan, kind))["logits"]

    def _file(self, plan: str, kind: str) -> Path:
        count = len(self.labelled) if kind == LABELLED else synthetic_count(self.shape)
        return self.folder / f"{plan}.{kind}-{count}.safetensors"

    def _batches(self, kind: str) -> Iterator[Tensor]:
        size = 16 if is_large(self.shape) else 64
        if kind == LABELLED:
            return (batch.images for batch in batches(self.labelled, self.preprocess, size, self.shape))
        return iter(made_images(kind, self.shape, self.preprocess.mean, self.preprocess.std).split(size))

    def _network(self, plan: str) -> nn.Module:
        if plan == ORIGINAL:
            return load_model(self.source, AllowList.default(self.allow_code)).module
        return load(self.store.latest / self.source.name / plan, allow_code=self.allow_code)


def labelled_images(network: str, images: int) -> ImageSet:
    if network == "efficientnet-lite0":
        return read_images(SHARED / "data" / "imagenet_sample.parquet", hold_out=5)
    found = read_images(SHARED / "data" / "cifar10_test.parquet")
    rows = slice(4000, 5000) if network in DEVELOPMENT else slice(0, images)
    return ImageSet(found.path, found.encoded[rows], found.labels[rows])


@lru_cache(maxsize=len(MADE))
def made_images(
    kind: str, shape: tuple[int, ...], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Tensor:
    count = synthetic_count(shape)
    if kind == "lit-leaves":
        return fidelity_images(count, shape, 0, mean, std)
    if kind == "noise":
        return noise_images(count, shape, 0, mean, std)
    return normalise(synthetic_images(kind, count, shape, SEED), mean, std)


def _point(forwarded: Forwarded, plan: str) -> Point:
    labels = forwarded.labelled.labels
    before, after = (metrics.top_k(forwarded.of(one, LABELLED), labels, 1) for one in (ORIGINAL, plan))
    kinds = (LABELLED, *forwarded.kinds, *([MIXTURE] if set(MADE[1:]) <= set(forwarded.kinds) else []))
    seen = {kind: _figures(forwarded.of(ORIGINAL, kind), forwarded.of(plan, kind)) for kind in kinds}
    return Point(forwarded.source.name, plan, before - after, seen)


def _figures(before: Tensor, after: Tensor) -> Figures:
    return Figures(
        metrics.agreement(before, after), metrics.kl_nats(before, after), metrics.logit_sqnr_db(before, after)
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the correlation of ranks; ties share theirs."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    numbers = torch.tensor(values, dtype=torch.float64)
    return (numbers.unsqueeze(1) > numbers).double().sum(1) + (numbers.unsqueeze(1) == numbers).double().sum(1) / 2


def correlations(points: Sequence[Point], kind: str) -> tuple[float, float, float]:
    """Return the rank correlations of the drop with -agreement, KL and -SQNR on a kind of images."""
    drops, seen = [point.drop for point in points], [point.seen[kind] for point in points]
    risks = ([-one.agreement for one in seen], [one.kl for one in seen], [-one.sqnr_db for one in seen])
    return tuple(spearman(drops, risk) for risk in risks)  # type: ignore[return-value]


@dataclass(frozen=True)
class Verdicts:
    """What a threshold of the agreement says of points, against what they lost."""

    threshold: float
    allowed: float
    safe: int
    """Lost no more than allowed."""
    unsafe: int
    false_safe: int
    """Lost more, and agree at least that much."""
    false_alarms: int
    """Lost no more, and agree less."""


def verdicts(points: Sequence[Point], kind: str, threshold: float, allowed: float) -> Verdicts:
    lost = [point.drop > allowed for point in points]
    passed = [point.seen[kind].agreement >= threshold for point in points]
    false_safe = sum(bad and good for bad, good in zip(lost, passed, strict=True))
    false_alarms = sum(not bad and not good for bad, good in zip(lost, passed, strict=True))
    return Verdicts(threshold, allowed, len(lost) - sum(lost), sum(lost), false_safe, false_alarms)


def threshold_of(points: Sequence[Point], kind: str, allowed: float) -> float:
    """Return the least multiple of STEP above the agreement of every point that lost more than ``allowed``."""
    worst = max((point.seen[kind].agreement for point in points if point.drop > allowed), default=0.0)
    return (int(worst / STEP + 1e-9) + 1) * STEP


def tables(points: Sequence[Point]) -> Iterator[str]:
    """Yield the lines of the three tables of docs/fidelity.md."""
    networks, kinds = list(dict.fromkeys(point.network for point in points)), tuple(points[0].seen)
    groups = {name: [point for point in points if point.network == name] for name in networks}
    yield from _head("network", "plans", *kinds)
    for name, own in (*groups.items(), ("all", points)):
        cells = (" / ".join(f"{value:.2f}" for value in correlations(own, kind)) for kind in kinds)
        yield f"| {name} | {len(own)} | {' | '.join(cells)} |"
    yield ""
    yield from _head("images", "lost at most", "threshold", "development", "the others")
    for kind in kinds:
        yield from (_threshold_line(points, kind, allowed) for allowed in ALLOWED)
    yield ""
    yield from _head("plan", *(f"{name}: lost / agreement" for name in networks))
    by_task = {(point.plan, point.network): point for point in points}
    for plan in dict.fromkeys(point.plan for point in points):
        cells = (_cell(by_task.get((plan, name)), kinds[1]) for name in networks)
        yield f"| {plan} | {' | '.join(cells)} |"


def _cell(point: Point | None, kind: str) -> str:
    return "–" if point is None else f"{point.drop:.2f} / {point.seen[kind].agreement:.2f}"


def _head(*titles: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{' --- |' * len(titles)}"


def _threshold_line(points: Sequence[Point], kind: str, allowed: float) -> str:
    own = [point for point in points if point.network in DEVELOPMENT]
    others = [point for point in points if point.network not in DEVELOPMENT]
    threshold = threshold_of(own, kind, allowed)
    told = (_told(verdicts(some, kind, threshold, allowed)) for some in (own, others))
    return f"| {kind} | {allowed:g} | {threshold:.2f} | {' | '.join(told)} |"


def _told(found: Verdicts) -> str:
    return f"{found.false_safe} of {found.unsafe} falsely safe, {found.false_alarms} of {found.safe} false alarms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="store of a run of jobs/fidelity.yaml")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="tasks to look at, as NETWORK/PLAN")
    parser.add_argument(
        "--kinds", nargs="+", choices=MADE, default=MADE, help="made-up images to compare; default: all"
    )
    parser.add_argument("--images", type=int, default=2000, help="CIFAR images of the networks not developed on")
    parser.add_argument("--allow-code", nargs="*", default=[str(SHARED / "models")], help="as of dfmpc run")
    parser.add_argument("--json", type=Path, help="file for the points behind the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        points = measured(given.store, Asked(given.only, given.kinds, given.images, given.allow_code))
    except DfmpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        given.json.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    print("\n".join(tables(points)))
    return 0


def measured(path: Path, asked: Asked) -> list[Point]:
    """Return the points of the tasks of a run that match a pattern of ``asked.only``; UsageError where none does."""
    run = find_run(path)
    tasks = [task for task in run.frozen().tasks if any(fnmatchcase(task.id, pattern) for pattern in asked.only)]
    if not tasks:
        raise UsageError(
            f"--only {' '.join(asked.only)}: matches no task of {run.path}; patterns are such as 'resnet20/*'"
        )
    points = []
    for name, source in {task.model.name: task.model for task in tasks}.items():
        plans = [task.plan.name for task in tasks if task.model.name == name]
        forwarded = Forwarded(source, run.store, asked)
        for plan in (ORIGINAL, *plans):
            forwarded.make(plan)
        points += [_point(forwarded, plan) for plan in plans]
    return points


if __name__ == "__main__":
    sys.exit(main())
