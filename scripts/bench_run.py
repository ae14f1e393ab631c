#!/usr/bin/env python
"""What `dfmpc run` of a registry costs: rates beside cat, cp and sha256, phases, overhead a task, speed-up, memory.

    python scripts/make_registry.py /tmp/registry --models 40 && python scripts/bench_run.py /tmp/registry
    python scripts/bench_run.py --make '--models 1000 --mix small' --workers 1,2 --repeat 3 --json bench.json

Every repetition reads, copies and hashes the files and then runs each case (1, 2, … workers on the CPU; on GPUs too
where there are some, from the page cache and with it dropped) in a fresh store, and once more in the same store, where
everything is reused. Cases change their order from one repetition to the next; medians are printed, and the ratio of
two of them where things are compared. A run that fails ends the bench: no figure of it is worth quoting.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from bench_run_table import Bench, CaseRuns, Yardstick, machine_now, render
from dfmpc.errors import DfmpcError
from dfmpc.job.expand import expand
from dfmpc.job.loader import LoadedJob, load_job
from dfmpc.job.task import Task
from file_yardsticks import drop_from_cache, seconds_of
from run_measuring import RunFailedError, RunFigures, measure_run

NO_GPU = "no GPU: not measured"
_DEFAULT_JSON = Path("build/bench_run.json")


@dataclass(frozen=True)
class Case:
    """One way to run the registry: a device a worker; ``dropped``: the files leave the page cache before."""

    devices: tuple[str, ...]
    dropped: bool = False

    @property
    def label(self) -> str:
        """Such as ``2 x cpu``."""
        kind = self.devices[0].partition(":")[0]
        return f"{len(self.devices)} x {kind}{', cache dropped' if self.dropped else ''}"


@dataclass(frozen=True)
class Setting:
    """What every run of the bench has in common."""

    job: Path
    allow_code: tuple[Path, ...]
    files: tuple[Path, ...]
    models: int
    tasks: int
    scratch: Path
    timeout_s: float

    @property
    def bytes(self) -> int:
        """Of all model files together."""
        return sum(file.stat().st_size for file in self.files)


def setting_of(registry: Path, scratch: Path, limit: int | None, timeout_s: float) -> Setting:
    """Return what to run: the job of ``registry`` as it is, or over its first models that come to ``limit`` tasks."""
    job = registry / "job.yaml" if registry.is_dir() else registry
    loaded = load_job(job)
    tasks = expand(loaded)
    if limit is not None and limit < len(tasks):
        tasks = _first(tasks, limit)
        job = _trimmed(loaded, tasks, scratch / "job.yaml")
    sources = {task.model.name: task.model for task in tasks}.values()
    files = tuple(Path(source.program or source.checkpoint or "") for source in sources)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise RunFailedError(f"{registry}: {len(missing)} files are not there, such as {missing[0]}: make it again")
    code = loaded.folder / "code"
    allowed = (code,) if code.is_dir() else ()
    return Setting(job, allowed, files, len(files), len(tasks), scratch, timeout_s)


def _first(tasks: Sequence[Task], limit: int) -> list[Task]:
    """Return the tasks of the first models: whole models, at least one."""
    plans = max(1, sum(task.model.name == tasks[0].model.name for task in tasks))
    names = list(dict.fromkeys(task.model.name for task in tasks))[: max(1, limit // plans)]
    return [task for task in tasks if task.model.name in set(names)]


def _trimmed(loaded: LoadedJob, tasks: Sequence[Task], file: Path) -> Path:
    content = yaml.safe_load(loaded.path.read_text(encoding="utf-8"))
    sources = {task.model.name: task.model for task in tasks}.values()
    models = [source.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for source in sources]
    if "evaluate" in content:
        content["evaluate"]["data"] = str(loaded.folder / content["evaluate"]["data"])
    file.write_text(yaml.safe_dump({**content, "models": models}, sort_keys=False), encoding="utf-8")
    return file


def cases_of(workers: Sequence[int], kinds: Sequence[str], gpus: int) -> list[Case]:
    """Return the CPU's cases, then the GPUs' with and without the page cache."""
    cases = [Case(("cpu",) * count) for count in workers if "cpu" in kinds]
    for dropped in (False, True):
        for count in workers if "cuda" in kinds and gpus else ():
            cases.append(Case(tuple(f"cuda:{index % gpus}" for index in range(count)), dropped))
    return cases


def gpu_count() -> int:
    """Return the number of CUDA devices, asked in a process of its own: torch here would take memory from the runs."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def run_cases(
    setting: Setting, cases: Sequence[Case], options: argparse.Namespace
) -> tuple[list[Yardstick], list[CaseRuns]]:
    """Do all repetitions; see the module's docstring."""
    yardsticks: dict[str, list[float]] = {}
    runs = {case.label: CaseRuns(case.label, len(case.devices), case.dropped, [], []) for case in cases}
    for repetition in range(options.repeat):
        if not options.only_warm:
            for name, seconds in _yardsticks(setting, cases):
                yardsticks.setdefault(name, []).append(seconds)
        for case in cases if repetition % 2 == 0 else reversed(cases):
            cold, warm = _cold_and_warm(setting, case, options)
            runs[case.label] = replace(
                runs[case.label], cold=[*runs[case.label].cold, *cold], warm=[*runs[case.label].warm, warm]
            )
            _say(f"repetition {repetition + 1}, {case.label}: {_said(cold)}all reused in {warm.wall_s:.2f} s")
    return [Yardstick(name, seconds) for name, seconds in yardsticks.items()], list(runs.values())


def _said(cold: Sequence[RunFigures]) -> str:
    return "".join(f"{run.tasks} tasks in {run.wall_s:.2f} s, " for run in cold)


def _yardsticks(setting: Setting, cases: Sequence[Case]) -> Iterator[tuple[str, float]]:
    threads = sorted({1, max(len(case.devices) for case in cases)})
    for name in ("cat", "cp", *(f"sha256, {count} thread{'s' * (count > 1)}" for count in threads)):
        yield name, seconds_of(name, setting.files, setting.scratch)
    if any(case.dropped for case in cases):
        drop_from_cache(setting.files)
        yield "cat, cache dropped", seconds_of("cat", setting.files, setting.scratch)


def _cold_and_warm(setting: Setting, case: Case, options: argparse.Namespace) -> tuple[list[RunFigures], RunFigures]:
    with _store(setting.scratch, options.store) as store:
        if options.only_warm:  # whatever the store lacks is made first
            _measured(setting, case, store)
            return [], _measured(setting, case, store, "reused")
        if case.dropped:
            drop_from_cache(setting.files)
        cold = _measured(setting, case, store, "done")
        return [cold], _measured(setting, case, store, "reused")


def _measured(setting: Setting, case: Case, store: Path, expected: str | None = None) -> RunFigures:
    log = setting.scratch / "run.log"
    figures = measure_run(
        setting.job, store, case.devices, allow_code=setting.allow_code, log=log, timeout_s=setting.timeout_s
    )
    if expected is not None and figures.statuses != {expected: setting.tasks}:
        raise RunFailedError(f"{case.label}: expected {setting.tasks} tasks {expected}, found {figures.statuses}")
    return figures


@contextmanager
def _store(scratch: Path, kept: Path | None) -> Iterator[Path]:
    """A fresh folder that goes away, or ``kept``."""
    if kept is not None:
        yield kept
        return
    store = Path(tempfile.mkdtemp(prefix="store-", dir=scratch))
    try:
        yield store
    finally:
        shutil.rmtree(store)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _workers(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if not all(1 <= count <= 64 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of workers from 1 to 64, separated by commas")
    return tuple(dict.fromkeys(counts))


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(","))
    if set(kinds) - {"cpu", "cuda"}:
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cpu,cuda")
    return kinds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return int(text)


def options_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("registry", nargs="?", type=Path, help="a folder of make_registry.py, or a job file")
    which.add_argument("--make", metavar="ARGUMENTS", help="make a registry first, with these arguments")
    parser.add_argument("--workers", type=_workers, default=(1, 2))
    parser.add_argument(
        "--kinds", type=_kinds, default=("cpu", "cuda"), help="cpu, cuda or both (where there is a GPU)"
    )
    parser.add_argument("--repeat", type=_positive, default=3)
    parser.add_argument("--tasks-limit", type=_positive, help="only the first models that come to this many tasks")
    parser.add_argument("--only-warm", action="store_true", help="measure nothing but the rerun that reuses everything")
    parser.add_argument("--store", type=Path, help="with --only-warm: a store to keep, filled where it lacks something")
    parser.add_argument("--json", type=Path, default=_DEFAULT_JSON, help=f"file for the figures; {_DEFAULT_JSON}")
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure; default: the system's temporary one"
    )
    parser.add_argument("--timeout", type=_positive, default=3600, help="seconds one run may take")
    options = parser.parse_args(given)
    if options.store and not options.only_warm:
        parser.error("--store goes with --only-warm: every other run wants a fresh store")
    return options


def bench(options: argparse.Namespace, scratch: Path) -> Bench:
    """Make the registry where asked for, measure, and return everything that was found."""
    machine = machine_now()
    registry = options.registry
    if registry is None:
        registry = scratch / "registry"
        maker = Path(__file__).with_name("make_registry.py")
        subprocess.run([sys.executable, maker, registry, *shlex.split(options.make)], check=True, stdout=sys.stderr)
    setting = setting_of(registry, scratch, options.tasks_limit, options.timeout)
    gpus = gpu_count() if "cuda" in options.kinds else 0
    cases = cases_of(options.workers, options.kinds, gpus)
    if not cases:
        raise RunFailedError(f"--kinds {','.join(options.kinds)}: {NO_GPU}")
    yardsticks, runs = run_cases(setting, cases, options)
    return Bench(
        machine=machine,
        registry=options.make or str(options.registry),
        models=setting.models,
        tasks=setting.tasks,
        checkpoint_bytes=setting.bytes,
        repeat=options.repeat,
        yardsticks=yardsticks,
        runs=runs,
        gpu="measured" if gpus else NO_GPU,
    )


def main(given: Sequence[str] | None = None) -> int:
    """Print the table, write the JSON; 1 where a run failed, 2 where nothing could start."""
    options = options_of(given)
    scratch = Path(tempfile.mkdtemp(prefix="bench-run-", dir=options.scratch))
    try:
        found = bench(options, scratch)
    except (RunFailedError, DfmpcError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**asdict(found), "medians": found.medians()}, indent=1) + "\n")
    print(render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
