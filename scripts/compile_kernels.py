#!/usr/bin/env python3
"""Compile every kernel for several GPUs, without one, and fail on a spill or too much shared memory.

Registers and spills come from Triton's own ptxas (NVIDIA) and from the assembly's notes (AMD).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing; must go before triton is imported

import triton
from dfmpc.kernels.dequantize import dequantize_kernel
from dfmpc.kernels.feedback import feedback_kernel, feedback_shape
from dfmpc.kernels.launch import LaunchShape, launch_shape
from dfmpc.kernels.packing import pack_kernel, unpack_kernel
from dfmpc.kernels.statistics import statistics_kernel
from dfmpc.kernels.tap_sums import tap_sums_kernel
from dfmpc.kernels.ternary import ternary_kernel
from dfmpc.kernels.uniform import uniform_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
LENGTHS = (9, 576, 4608)
"""Row lengths of a depthwise, a 3×3 and a deep 3×3 layer: many rows a program, one, and a loop over blocks."""


@dataclass(frozen=True)
class Case:
    """A kernel with its constants and the types of its pointers; every other argument is an int32.

    ``pointers`` may name other arguments that are not an int32.
    """

    name: str
    kernel: object
    constants: dict[str, object]
    pointers: dict[str, str]
    shape: Callable[[int, int], LaunchShape] = launch_shape


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel takes of a processor."""

    registers: int
    spills: int
    shared: int


_SUMS = {"absmax_ptr": "*fp32", "bound_ptr": "*fp32", "square_ptr": "*i64", "zero_ptr": "*i64"}
_CODES = {"codes_ptr": "*u8", "packed_ptr": "*u8"}


def cases(weight: str) -> Iterator[Case]:
    pointers = {"weight_ptr": weight, **_SUMS, **_CODES}
    extremes = {"minimum_ptr": "*fp32", "maximum_ptr": "*fp32", "abs_ptr": "*i64"}
    yield Case("statistics", statistics_kernel, {"FINENESS": 40}, pointers | extremes)
    ternary = {"threshold_ptr": "*fp32", "kept_ptr": "*i64", "count_ptr": "*i64"}
    yield Case("ternary", ternary_kernel, {"FINENESS": 40, "LAYER_WISE": False}, pointers | ternary)
    factors = {"scale_ptr": "*fp32", "zero_point_ptr": "*fp32"}
    uniform = factors | {"extremes_ptr": "*fp32", "dot_ptr": "*i64", "norm_ptr": "*i64"}
    for grid, bits in (("dorefa", 6), ("symmetric", 4), ("asymmetric", 3), ("asymmetric", 8)):
        constants = {"GRID": grid, "BITS": bits, "FINENESS": 40, "LAYER_WISE": False}
        yield Case(f"uniform {grid} {bits}", uniform_kernel, constants, pointers | uniform)
        value = {"GRID": grid, "BITS": bits, "LAYER_WISE": False}
        yield Case(f"dequantize {grid} {bits}", dequantize_kernel, value, _CODES | factors | {"value_ptr": "*fp32"})
    yield Case("pack 6", pack_kernel, {"BITS": 6}, _CODES)
    yield Case("unpack 6", unpack_kernel, {"BITS": 6}, _CODES)
    yield Case(
        "tap_sums 9", tap_sums_kernel, {"TAPS": 9}, {"weight_ptr": weight, "sum_ptr": "*fp64", "square_ptr": "*fp64"}
    )
    floats = ("y_ptr", "now_ptr", "factor_ptr", "inverse_ptr", "offset_ptr", "step_ptr", "lost_ptr")
    sweep = dict.fromkeys(floats, "*fp32") | {"level_ptr": "*u8", "low": "fp32", "high": "fp32"}
    for name, grouped, group in (("feedback", False, "*fp32"), ("feedback grouped", True, "*i64")):
        yield Case(name, feedback_kernel, {"GROUPED": grouped}, sweep | {"group_ptr": group}, feedback_shape)


def compile_case(case: Case, target: str, length: int) -> Cost:
    shape = case.shape(1 << 16, length)
    constants = case.constants | {"ROWS": shape.rows, "BLOCK": shape.block}
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.pointers.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs)
    options = {"num_warps": shape.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in compiled.asm:
        registers, spills = cost_of_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills = cost_of_ptx(compiled.asm["ptx"], target)
    return Cost(registers, spills, compiled.metadata.shared)


def cost_of_ptx(ptx: str, target: str) -> tuple[int, int]:
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / ptxas_name(target)
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            ptxas,
            "-v",
            "--fmad=false",
            "-lineinfo",
            f"--gpu-name={architecture}",
            source,
            "-o",
            Path(folder) / "kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spills


def ptxas_name(target: str) -> str:
    own = "ptxas-blackwell"
    found = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / own).is_file()
    return own if target == "sm_100" and found else "ptxas"


def cost_of_amdgcn(text: str) -> tuple[int, int]:
    count = {key: int(value) for key, value in re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", text)}
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--only", default="", help="compile the kernels whose name begins with this")
    parser.add_argument("--weights", nargs="+", choices=["fp32", "fp16", "bf16"], default=["fp32"])
    options = parser.parse_args()
    print(f"{'kernel':24}{'weight':>8}{'length':>8}{'target':>8}{'registers':>11}{'spilled':>9}{'shared':>8}")
    failures = 0
    for weight, length in product(options.weights, options.lengths):
        chosen = [case for case in cases(f"*{weight}") if case.name.startswith(options.only)]
        for case, target in product(chosen, options.targets):
            cost = compile_case(case, target, length)
            bad = cost.spills > 0 or cost.shared > SHARED_LIMIT[target]
            failures += bad
            numbers = f"{cost.registers:>11}{cost.spills:>9}{cost.shared:>8}"
            print(f"{case.name:24}{weight:>8}{length:>8}{target:>8}{numbers}{'  FAILS' * bad}", flush=True)
    print(f"{failures} of the compiled kernels spill or need too much shared memory")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
