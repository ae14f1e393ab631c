#!/usr/bin/env python3
"""Time launch shapes on this GPU and write the best to kernels/configs/<gpu>.json.

    python scripts/tune_kernels.py [--kernels ternary …] [--lengths 64 576 …] [--jobs 12] [--budget 540]

For each kernel, size of element and row length: every tile that fits, with 2 to 8 warps, and tiles that walk over it.
All are compiled first, by several processes; then each is timed on inputs that no cache serves (bench_kernels.py). A
shape is written where it is at least 3 % faster than the default. A result that is not the reference's to the last bit
ends the tuning: results never depend on a shape. What the file says of other kernels and lengths is kept, so that a
kernel at a time can be tuned where a command may take ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from kernel_checkout import ensure_dfmpc

ensure_dfmpc()

import torch  # noqa: E402 - dfmpc's place comes first
import triton  # noqa: E402
from bench_kernels_check import Operation, difference, operations  # noqa: E402
from bench_kernels_gpu import seconds_of  # noqa: E402
from bench_kernels_launches import catching  # noqa: E402
from bench_kernels_shapes import Shapes  # noqa: E402
from dfmpc.kernels import table  # noqa: E402
from dfmpc.kernels.tuned import FOLDER, Choice, config_name, read_choices, write_choices  # noqa: E402

KERNELS = {
    "ternary": "ternary_kernel",
    "uniform 4": "uniform_kernel",
    "statistics": "statistics_kernel",
}
"""The operation that is timed for each kernel."""
LENGTHS = (64, 256, 576, 1152, 4096, 4608, 14336)
DTYPES = {4: torch.float32, 2: torch.bfloat16}
HELD = 72
"""Elements that a thread may hold: more do not fit its registers."""
WORTH = 0.97
"""A shape is kept where it takes at most this part of the default's time: less is noise."""


def candidates(kernel: str, itemsize: int, length: int) -> Iterator[Choice]:
    """Yield the launch shapes that are worth a try for rows of ``length``."""
    vector = 16 // itemsize
    for threads, chunks, warps in product((2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 3, 4, 5, 6, 8, 9, 12), (2, 4, 8)):
        held = threads * chunks * vector
        if chunks * vector <= HELD and length <= held < 1.5 * length and threads <= 32 * warps:
            yield Choice(kernel, itemsize, length, threads, chunks, False, warps)
    for threads, chunks, warps in product((32, 128, 256), (2, 4), (4, 8)):
        if 2 * threads * chunks * vector <= length and threads <= 32 * warps:
            yield Choice(kernel, itemsize, length, threads, chunks, True, warps)


@contextmanager
def launched_as(choice: Choice | None) -> Iterator[None]:
    """Within this context kernels are launched in this shape, or in the default one."""
    plain = table.choices_for
    table.choices_for = lambda _device: () if choice is None else (choice,)
    try:
        yield
    finally:
        table.choices_for = plain


def operation_of(name: str) -> Operation:
    return next(operation for operation in operations() if operation.name == name)


def rows_for(length: int, itemsize: int, size: int = 256 << 20) -> Shapes:
    """Return a tensor of about ``size`` bytes."""
    return Shapes(f"rows of {length}", ((max(8, size // (length * itemsize)), length),), DTYPES[itemsize])


def compile_one(name: str, choice: Choice) -> str:
    """Compile a shape into the cache on disk by a small launch; return what went wrong, if anything did."""
    weight = rows_for(choice.longest, choice.itemsize, 1 << 20).weights("cuda", 0)[0]
    try:
        with launched_as(choice):
            operation_of(name).run(weight)
    except (RuntimeError, triton.CompilationError, triton.runtime.errors.OutOfResources) as error:
        return f"{choice}: {error}"
    return ""


def timed(name: str, choice: Choice | None, weights: list[torch.Tensor]) -> float:
    """Return the seconds of a launch in a shape, after checking what it gives."""
    operation, runs = operation_of(name), []
    with launched_as(choice):
        for weight in weights:
            with catching() as caught:
                result = operation.run(weight)
            runs.append(caught)
    if wrong := difference(operation, weights[-1:], [result]):
        raise SystemExit(f"error: {choice or 'the default shape'} gives another result: {wrong}")
    return seconds_of([caught.again for caught in runs], graph=True, repeats=9)


def best(name: str, itemsize: int, length: int, usable: list[Choice]) -> Choice | None:
    """Time the default and every usable shape; return the best if it is worth it."""
    weights = [rows_for(length, itemsize).weights("cuda", seed)[0] for seed in range(2)]
    default = timed(name, None, weights)
    seconds = {choice: timed(name, choice, weights) for choice in usable}
    fastest = min(seconds, key=lambda choice: seconds[choice], default=None)
    if fastest is None:
        return None
    kept = seconds[fastest] < WORTH * default
    tile = f"{fastest.threads}×{fastest.chunks}{' loop' * fastest.loop}, {fastest.num_warps} warps"
    times = f"{default * 1e6:>10.1f}{seconds[fastest] * 1e6:>10.1f}"
    print(f"{name:<12}{itemsize:>6}{length:>8}{times}  {tile}{'' if kept else ': default kept'}", flush=True)
    return fastest if kept else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--itemsizes", nargs="+", type=int, choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which the rest is left out")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: launch shapes are tuned on the GPU they are for, and there is none")
    until, gpu = time.monotonic() + options.budget, torch.cuda.get_device_name()
    asked = list(product(options.kernels, options.itemsizes, options.lengths))
    wanted = {key: list(candidates(KERNELS[key[0]], *key[1:])) for key in asked}
    unusable = compiled([(key[0], choice) for key, some in wanted.items() for choice in some], options.jobs)
    print(f"{'kernel':<12}{'bytes':>6}{'length':>8}{'default us':>10}{'best us':>10}")
    file = options.output / config_name(gpu)
    tried = {(KERNELS[name], itemsize, length) for name, itemsize, length in asked}
    found = [old for old in read_choices(file) if (old.kernel, old.itemsize, old.longest) not in tried]
    for key, some in wanted.items():
        if time.monotonic() > until:
            print(f"{key}: left out: the time is up")
            continue
        kept = best(*key, [choice for choice in some if (key[0], choice) not in unusable])
        found += [kept] if kept else []
    made = f"scripts/tune_kernels.py, torch {torch.__version__}, triton {triton.__version__}, {datetime.now(UTC):%F}"
    write_choices(file, gpu, made, found)
    print(f"wrote {file}")
    return 0


def compiled(jobs: list[tuple[str, Choice]], processes: int) -> set[tuple[str, Choice]]:
    """Compile all shapes; return and print those that cannot be launched."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        said = list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))
    bad = {job for job, text in zip(jobs, said, strict=True) if text}
    print("\n".join(text for text in said if text))
    return bad


if __name__ == "__main__":
    sys.exit(main())
