"""Times on a GPU: our kernels, the eager chain, torch.compile and peers, each as a fraction of the card's copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_kernels_chain import ABSENT, CHAINS, peers
from bench_kernels_check import Operation, difference, grouped_operations, operations_on, tensors_of
from bench_kernels_launches import catching, poisoned
from bench_kernels_shapes import GROUPED, SINGLE, Shapes
from torch import Tensor

ROTATED = 256 << 20
"""Bytes of inputs that a timing walks through, so that a cache of 50 MB serves none of them."""
ASKED = {9: 0.70, 25: 0.70}
"""Of the copy, for these lengths; 0.90 for all from 64 on."""


@dataclass(frozen=True)
class Row:
    """One timing; ``fraction`` is bytes read and written a second over the copy's."""

    shape: str
    operation: str
    milliseconds: float
    gigabytes_a_second: float
    fraction: float
    call_milliseconds: float | None = None
    """A whole call of the operation by the clock: table, launch, results on the host."""
    note: str = ""


class Bench:
    """Everything on one card within a budget of seconds."""

    def __init__(self, budget: float) -> None:
        self.until = time.monotonic() + budget
        self.copy = copy_rate()
        self.rows: list[Row] = []

    def left(self) -> bool:
        """Tell whether there is time for another one."""
        return time.monotonic() < self.until

    def add(self, shape: str, operation: str, seconds: float, moved: int, **more: float | str | None) -> Row:
        """Keep and print a timing of ``moved`` bytes in ``seconds``."""
        row = Row(shape, operation, seconds * 1e3, moved / seconds / 1e9, moved / seconds / self.copy, **more)
        self.rows.append(row)
        print_row(row)
        return row

    def refuse(self, shape: str, operation: str, why: str) -> None:
        """Say why there is no timing."""
        self.rows.append(Row(shape, operation, 0.0, 0.0, 0.0, None, why))
        print(f"{shape:<28}{operation:<26}{why}", flush=True)


def print_row(row: Row) -> None:
    call = "" if row.call_milliseconds is None else f"{row.call_milliseconds:>10.2f}"
    rate = f"{row.milliseconds:>10.4f}{row.gigabytes_a_second:>9.0f}{row.fraction:>7.2f}"
    print(f"{row.shape:<28}{row.operation:<26}{rate}{call:>10}  {row.note}", flush=True)


def copy_rate(size: int = 2 << 30) -> float:
    """Return the bytes a second, read and written, of a large copy on this card."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds_of([lambda: target.copy_(source)])


def seconds_of(calls: Sequence[Callable[[], object]], graph: bool = False, repeats: int = 15) -> float:
    """Return the median seconds of one call; all are done one after the other between two events."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = 1
    if graph:
        once = _timed(lambda: [call() for call in calls])
        rounds = max(1, min(50, int(2e-3 / once)))
    run = _captured(calls, rounds) if graph else lambda: [call() for call in calls]
    _timed(run)
    return statistics.median(_timed(run) for _ in range(repeats)) / len(calls) / rounds


def _timed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _captured(calls: Sequence[Callable[[], object]], rounds: int) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph.replay


def rotated(shapes: Shapes) -> list[list[Tensor]]:
    """Draw as many sets of weights as a timing walks through."""
    count = max(1, min(24, -(-ROTATED // shapes.input_bytes)))
    return [shapes.weights("cuda", seed) for seed in range(count)]


def time_operation(bench: Bench, shapes: Shapes, operation: Operation, run: Callable[[list], list]) -> Row | None:
    """Check ``run`` (a list of tensors in one go) against the reference, then time the launches it makes."""
    kept, moved = [], 0
    for number, weights in enumerate(rotated(shapes)):
        inputs = [operation.prepare(weight) for weight in weights]
        with poisoned(), catching() as caught:
            results = run(inputs)
        moved = caught.moved_bytes([tensor for item in inputs for tensor in tensors_of(item).values()])
        wrong = difference(operation, weights, results) if number == 0 else ""
        if wrong or not caught.launches:
            bench.refuse(shapes.name, operation.name, f"no speed: {wrong or 'no kernel ran'}")
            return None
        kept.append((inputs, caught))
    seconds = seconds_of([caught.again for _, caught in kept], graph=True)
    call = call_seconds(run, kept[0][0])
    return bench.add(shapes.name, operation.name, seconds, moved, call_milliseconds=call * 1e3)


def call_seconds(run: Callable[[list], list], inputs: list, repeats: int = 5) -> float:
    """Return the median seconds by the clock of a whole call."""
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(inputs)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compare_chains(bench: Bench, shapes: Shapes, ours: dict[str, Row]) -> None:
    """Time the eager chain and torch.compile's on the same shapes, beside ours."""
    sets = rotated(shapes)[:4]
    for name in ("ternary", "uniform 4"):
        if name not in ours:
            continue
        chains = {"eager": CHAINS[name]}
        if len(shapes.layers) == 1:
            chains["torch.compile"] = torch.compile(CHAINS[name], dynamic=False)
        for kind, chain in chains.items():
            if not bench.left():
                bench.refuse(shapes.name, f"{name}, {kind}", "left out: the time is up")
                continue
            seconds = seconds_of([lambda w=weights, c=chain: [c(t) for t in w] for weights in sets], repeats=5)
            mine = ours[name].milliseconds / 1e3
            moved = round(ours[name].gigabytes_a_second * 1e9 * mine)
            bench.add(shapes.name, f"{name}, {kind}", seconds, moved, note=f"ours {seconds / mine:.1f} times as fast")
        torch.compiler.reset()


def compare_peers(bench: Bench, shapes: Shapes) -> None:
    """Time the installed libraries on one layer; they compute something else than we do, so no ratio is printed."""
    for name in ABSENT:
        print(f"{shapes.name:<28}{name} is not installed: left out", flush=True)
    for name, quantize in peers().items():
        weights = shapes.weights("cuda", 0)
        seconds = seconds_of([lambda q=quantize, w=weights: [q(weight) for weight in w]], repeats=5)
        bench.add(shapes.name, name, seconds, shapes.input_bytes, note="input bytes only")


def measure(budget: float) -> Bench:
    """Time everything: our kernels first, then the others while the time lasts."""
    bench = Bench(budget)
    print(f"copy {bench.copy / 1e9:.0f} GB/s (read + written) on {torch.cuda.get_device_name()}", flush=True)
    print(f"{'shape':<28}{'operation':<26}{'ms':>10}{'GB/s':>9}{'copy':>7}{'call ms':>10}")
    ours: dict[str, dict[str, Row]] = {}
    for shapes in SINGLE:
        singly = {operation.name: (operation, _one_by_one(operation)) for operation in operations_on(shapes)}
        ours[shapes.name] = _time_all(bench, shapes, singly)
    for shapes in GROUPED:
        for kind in (shapes, shapes.as_one()):
            ours[kind.name] = _time_all(bench, kind, grouped_operations())
    for shapes in (*SINGLE, *GROUPED):
        compare_chains(bench, shapes, ours[shapes.name])
    compare_peers(bench, GROUPED[-1])
    return bench


def _one_by_one(operation: Operation) -> Callable[[list], list]:
    return lambda items: [operation.run(item) for item in items]


def _time_all(
    bench: Bench, shapes: Shapes, chosen: dict[str, tuple[Operation, Callable[[list], list]]]
) -> dict[str, Row]:
    timed = {name: time_operation(bench, shapes, *pair) for name, pair in chosen.items() if bench.left()}
    return {name: row for name, row in timed.items() if row is not None}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return what was asked beside what was reached, a line each."""
    found = {(row.shape, row.operation): row for row in rows if row.milliseconds}
    lines = []
    for shapes in SINGLE:
        asked = ASKED.get(shapes.longest, 0.90)
        for name in ("ternary", "uniform 4", "uniform 6"):
            if row := found.get((shapes.name, name)):
                lines.append(_line(f"{shapes.name} {name}, of the copy", row.fraction, asked, row.fraction >= asked))
        one, sweep = found.get((shapes.name, "uniform 4")), found.get((shapes.name, "sweep"))
        if one and sweep:
            ratio = sweep.milliseconds / one.milliseconds
            lines.append(_line(f"{shapes.name} sweep, times one width", ratio, 2.0, ratio <= 2.0))
        lines += _against(found, shapes)
    for shapes, most in zip(GROUPED, (1.3, 1.5, 1.3), strict=True):
        grouped, single = (found.get((each.name, "ternary")) for each in (shapes, shapes.as_one()))
        if grouped and single:
            ratio = grouped.milliseconds / single.milliseconds
            lines.append(_line(f"{shapes.name} grouped ternary, times one tensor", ratio, most, ratio <= most))
    return lines


def _against(found: dict[tuple[str, str], Row], shapes: Shapes) -> list[str]:
    lines = []
    for name in ("ternary", "uniform 4"):
        for kind, least in (("eager", 20.0), ("torch.compile", 2.5)):
            ours, other = found.get((shapes.name, name)), found.get((shapes.name, f"{name}, {kind}"))
            if ours and other and shapes.longest >= 64:
                ratio = other.milliseconds / ours.milliseconds
                lines.append(_line(f"{shapes.name} {name}, times {kind}", ratio, least, ratio >= least))
    return lines


def _line(what: str, reached: float, asked: float, good: bool) -> str:
    return f"{what:<62}{reached:>8.2f}{asked:>8.2f}  {'reached' if good else 'MISSED'}"
