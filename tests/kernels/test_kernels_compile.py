"""Every kernel compiles for GPUs that are not here: no spills, loads as wide as they can be, and counts that add up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this system")

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0040*/                   DFMA R10, R12, R14, R16 ;
        /*0050*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   F2F.F64.F32 R12, R4 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00a0*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_rn_f64_full:
        /*00b0*/                   DMUL R10, R12, R14 ;
"""


@pytest.fixture
def scripts(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the scripts' modules be imported."""
    monkeypatch.syspath_prepend(project / "scripts")
    return project / "scripts"


@pytest.fixture
def kernel_cost(scripts: Path) -> ModuleType:
    import kernel_cost  # noqa: PLC0415

    return kernel_cost


def compile_kernels(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script; TRITON_INTERPRET stays set here, the script must drop it."""
    command = [sys.executable, project / "scripts" / "compile_kernels.py", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def rows_of(done: subprocess.CompletedProcess[str]) -> Iterator[dict[str, Any]]:
    """Yield the numbers of the table, by the names of the columns from the registers on."""
    header, *lines, _ = done.stdout.splitlines()
    columns = header.split()[5:]
    for line in lines:
        target = next(name for name in ("sm_80", "sm_90", "sm_100", "gfx942") if f" {name} " in line)
        yield {"target": target} | dict(zip(columns, line.split(target)[1].split(), strict=False))


def test_statistics_compile_for_both_makers_with_loads_of_16_bytes(project: Path) -> None:
    done = compile_kernels(project, "--only", "statistics", "--lengths", "64", "--targets", "sm_90", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(rows_of(done))
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    for row in rows:
        assert 0 < int(row["regs"]) <= 128
        assert int(row["spill"]) == 0
        assert int(row["shared"]) <= 1024
        assert int(row["load"]) == 16
        assert int(row["programs"]) >= 4


def test_segments_are_sorted_in_registers(project: Path) -> None:
    """The longest takes all registers that a program of its threads can have, and none beyond."""
    done = compile_kernels(project, "--only", "optimum", "--lengths", "64", "8192", "9000", "--targets", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    short, longest = rows_of(done)  # of 9000 there is none
    assert 0 < int(short["regs"]) <= 96
    assert 96 < int(longest["regs"]) <= 65536 // 512
    assert (int(short["spill"]), int(longest["spill"])) == (0, 0)
    assert int(longest["shared"]) <= 48 * 1024


def test_factors_are_loaded_by_16_bytes(project: Path) -> None:
    command = ("--only", "factored statistics", "--lengths", "64", "--targets", "sm_90", "--weights", "fp32", "bf16")
    done = compile_kernels(project, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {int(row["load"]) for row in rows_of(done)} == {16}


def test_what_an_element_takes_is_counted_by_pipe(project: Path) -> None:
    done = compile_kernels(project, "--only", "statistics", "--lengths", "64", "--targets", "sm_90")
    (row, *_) = rows_of(done)
    # two products and two sums in float64 and one conversion, beside some of a row
    assert 2 <= float(row["fp64"]) < 6
    assert 1 <= float(row["convert"]) < 2
    assert float(row["alu"]) + float(row["fp64"]) + float(row["convert"]) < float(row["issue"]) < 41


def test_instructions_are_counted_with_loops_and_without_routines(kernel_cost: ModuleType) -> None:
    cost = kernel_cost.cost_of_sass(SASS, trips=5)
    assert cost.pipes == {"issue": 7 + 4 * 5, "lsu": 4 + 1 + 5 + 2, "fp64": 5, "alu": 5, "convert": 1}
    assert cost.loads == {16: 1, 4: 1, 2: 1}
    assert (cost.wide_bytes(16), cost.wide_bytes(4), cost.wide_bytes(1)) == (16, 20, 22)


def test_the_busiest_pipe_bounds_the_part_of_the_copy(kernel_cost: ModuleType) -> None:
    pipes = kernel_cost.Counter({"issue": 40, "alu": 30, "convert": 5})
    fraction, pipe = kernel_cost.copy_fraction(pipes, threads=128, elements=128, bytes_an_element=4.25)
    # 30/64 of a clock against 40/128 and 5/16
    assert pipe == "alu"
    assert fraction == pytest.approx(132 * 1.755e9 * 64 / 30 * 4.25 / 3.02e12)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, []),
        ({"spilled": 8}, ["spills"]),
        ({"shared": 228 * 1024}, ["shared memory above the limit"]),
        ({"loads": {8: 8}}, ["loads narrower than 16 bytes"]),
        ({"loads": {16: 3, 8: 8}}, ["loads narrower than 16 bytes"]),
    ],
)
def test_spills_shared_memory_and_narrow_loads_are_faults(
    scripts: Path, kernel_cost: ModuleType, change: dict[str, Any], fault: list[str]
) -> None:
    from compile_kernels_cases import Shape, faults  # noqa: PLC0415

    shape = Shape("4×4×4", {}, 4, 128, 2048, 32, 1, load_bytes=16, thread_bytes=64)
    good: dict[str, Any] = {"registers": 64, "spilled": 0, "shared": 0, "loads": {16: 4}}
    cost = kernel_cost.Cost(**(good | change))
    cost.loads = kernel_cost.Counter(cost.loads)
    assert list(faults(cost, shape, "sm_90")) == fault


SPILLING = """
import os, sys
os.environ.pop("TRITON_INTERPRET")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compile_kernels_cases import cases, shapes_of
from kernel_cost import cost_of
case = next(case for case in cases("fp32") if case.name == "statistics")
_, shape = next(shapes_of(case, [576], "fp32", 32))
constants = case.constants | shape.constants
names = case.kernel.arg_names
signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
constexprs = {(names.index(name),): value for name, value in constants.items()}
source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs)
options = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": int(sys.argv[1])}
print(cost_of(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)).spilled)
"""


def test_a_kernel_with_too_few_registers_is_seen_to_spill(scripts: Path) -> None:
    command = [sys.executable, "-c", SPILLING, "32"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(scripts)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


EVERYWHERE = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("weight", "targets"), [("fp32", EVERYWHERE), ("bf16", ("sm_90",))])
def test_all_kernels_compile(project: Path, weight: str, targets: tuple[str, ...]) -> None:
    """At rows of a depthwise and an ordinary layer; the script compiles every kind of tile where it is asked to."""
    done = compile_kernels(project, "--lengths", "9", "576", "--weights", weight, "--targets", *targets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of the compiled kernels spill" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_launch_over_different_tensors_compiles(project: Path) -> None:
    options = ("--together", "--only", "ternary", "--lengths", "64", "--targets", "sm_90")
    done = compile_kernels(project, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kinds" in done.stdout
