#!/usr/bin/env python3
"""Compile every kernel for several GPUs, without one, and print what each takes of a processor.

    python scripts/compile_kernels.py [--targets sm_90 …] [--weights fp32 bf16] [--only ternary] [--all]

A row a kernel, launch shape and target: registers, spilled bytes, shared memory, the width in bytes of the loads of
weights and, for NVIDIA, lane-instructions an element: in all and by pipe (integer and logic, float64, conversions
from and to 64 bits, loads and stores). "copy" is the part of an H100's copy rate that the busiest pipe allows by that
count: a bound from counting, not a measurement. "programs" is how many fit on a multiprocessor of that target.
One kind of tile is compiled at a time, so that nothing else is in the count. The exit status is 1 where a kernel
spills, needs more shared memory than the target has, or loads weights narrower than its launch shape allows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import product

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing; must go before triton is imported

from kernel_checkout import ensure_dfmpc

ensure_dfmpc()

import triton  # noqa: E402 - after both of the above
from compile_kernels_cases import Case, Shape, cases, every_tile, faults, shapes_of, together  # noqa: E402
from kernel_cost import SHARED_LIMIT, Cost, copy_fraction, cost_of  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = {32: 65536, 64: 131072}
"""Of 32 bits on an NVIDIA multiprocessor, and for vectors on an AMD compute unit, by the threads of a warp."""
LENGTHS = (9, 25, 27, 64, 576, 4608, 14336)
"""Rows of depthwise (3×3, 5×5), first, pointwise, 3×3, deep 3×3 and language model layers."""
HEADER = f"{'kernel':22}{'weight':>7}{'row':>7}{'tile':>16}{'target':>8}{'regs':>6}{'spill':>6}{'shared':>7}{'load':>6}"
COUNTED = ("issue", "alu", "fp64", "convert", "lsu")


def compiled(case: Case, shape: Shape, target: str) -> Cost:
    """Compile one launch shape and read its cost."""
    constants = {name: value for name, value in case.constants.items() if name in case.kernel.arg_names}
    constants |= shape.constants
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": shape.num_warps, "enable_fp_fusion": False}
    if shape.registers and TARGETS[target].backend == "cuda":
        options["maxnreg"] = shape.registers
    return cost_of(triton.compile(source, target=TARGETS[target], options=options), shape.trips)


def line(case: Case, weight: str, length: int, shape: Shape, target: str, cost: Cost) -> str:
    """Return a row of the table."""
    held = shape.thread_bytes
    load = max((width for width in cost.loads if held and cost.wide_bytes(width) >= held), default=0)
    load = min(load, shape.width) or ""
    text = f"{case.name:22}{weight:>7}{length:>7}{shape.label:>16}{target:>8}"
    text += f"{cost.registers:>6}{cost.spilled:>6}{cost.shared:>7}{load:>6}{programs(cost, shape, target):>9}"
    if not cost.pipes or not held:
        return text
    threads = shape.num_warps * TARGETS[target].warp_size
    text += "".join(f"{cost.pipes[pipe] * threads / shape.elements:>8.1f}" for pipe in COUNTED)
    moved = case.bytes_of(weight) * shape.elements + case.segment_bytes * shape.segments
    fraction, pipe = copy_fraction(cost.pipes, threads, shape.elements, moved / shape.elements)
    return text + f"{fraction:>7.2f} {pipe}"


def programs(cost: Cost, shape: Shape, target: str) -> int:
    """Return how many programs a multiprocessor holds at a time: by its registers, threads and shared memory."""
    warp = TARGETS[target].warp_size
    held = -(-max(cost.registers, 1) // 8) * 8 * warp * shape.num_warps
    most = 2048 // (warp * shape.num_warps)
    return min(REGISTERS[warp] // held, most, 32, SHARED_LIMIT[target] // (cost.shared + 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name begins with one of these")
    parser.add_argument("--weights", nargs="+", choices=["fp32", "fp16", "bf16"], default=["fp32"])
    parser.add_argument("--all", action="store_true", help="every kind of tile instead of those of --lengths")
    parser.add_argument(
        "--together", action="store_true", help="also launches over different tensors, all kinds in one"
    )
    options = parser.parse_args()
    print(HEADER + f"{'programs':>9}" + "".join(f"{pipe:>8}" for pipe in COUNTED) + f"{'copy':>7}", flush=True)
    failed = 0
    for weight, target in product(options.weights, options.targets):
        for case, length, shape in chosen(options, weight, TARGETS[target].warp_size):
            cost = compiled(case, shape, target)
            wrong = ", ".join(faults(cost, shape, target))
            failed += bool(wrong)
            print(line(case, weight, length, shape, target, cost) + f"  FAILS: {wrong}" * bool(wrong), flush=True)
    print(f"{failed} of the compiled kernels spill, need too much shared memory or load narrower than they could")
    return 1 if failed else 0


def chosen(options: argparse.Namespace, weight: str, warp: int) -> Iterator[tuple[Case, int, Shape]]:
    """Yield the launch shapes that the command line asks for."""
    for case in cases(weight):
        if not case.name.startswith(tuple(options.only)):
            continue
        every = options.all and case.tabled
        for length, shape in (
            every_tile(case, weight, warp) if every else shapes_of(case, options.lengths, weight, warp)
        ):
            yield case, length, shape
        if case.tabled and options.together:
            yield case, 0, together(case, weight, warp)


if __name__ == "__main__":
    sys.exit(main())
