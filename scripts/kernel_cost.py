"""What a compiled kernel takes of a processor, read from its machine code: no GPU is needed and nothing is timed.

NVIDIA: Triton ships nvdisasm and cuobjdump beside ptxas. AMD: the assembly says it in its notes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

LANES = {"issue": 128, "alu": 64, "imad": 64, "fp64": 64, "lsu": 32, "convert": 16}
"""Lane-instructions an H100's multiprocessor does in a clock (CUDA programming guide, throughput of compute capability
9.0): issued at all; integer and logic, comparisons and selections; integer products; float64; loads, stores and
shuffles (128 bytes a clock); conversions from and to 64-bit types and other special functions."""
PROCESSORS, CLOCK, COPY = 132, 1.755e9, 3.02e12
"""Multiprocessors, clocks a second and the bytes a second of a copy (read + written) of an H100 80GB HBM3."""
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\S+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP"}
_CONVERT = {"F2F", "F2I", "I2F", "FRND", "MUFU", "POPC", "FLO", "BREV"}
_IMAD = {"IMAD", "IMUL"}
_FP32 = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "ATOMG", "ATOMS", "RED"}
_CONTROL = {
    "BRA",
    "EXIT",
    "BSSY",
    "BSYNC",
    "BAR",
    "NOP",
    "CALL",
    "RET",
    "WARPSYNC",
    "DEPBAR",
    "S2R",
    "S2UR",
    "CS2R",
    "LDC",
}


@dataclass
class Cost:
    """What one compiled kernel takes; ``pipes`` and ``loads`` are lane-instructions and loads of one thread."""

    registers: int
    spilled: int
    """Bytes of stack, or on AMD of scratch memory and vector registers spilled to it."""
    shared: int
    """Bytes of shared memory."""
    loads: Counter[int] = field(default_factory=Counter)
    """How many global loads the code has, by their width in bytes."""
    pipes: Counter[str] = field(default_factory=Counter)
    """By pipe (``LANES``); empty where they are not counted (AMD)."""

    def wide_bytes(self, width: int) -> int:
        """Bytes that a thread fetches by loads of at least ``width`` bytes."""
        return sum(size * count for size, count in self.loads.items() if size >= width)


def cost_of(compiled: Any, trips: int = 1) -> Cost:
    """Return the cost of what triton.compile returned; loops are taken to run ``trips`` times."""
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        return cost_of_amdgcn(compiled.asm["amdgcn"], shared)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file)
        code = _tool("nvdisasm", "-c", file)
    cost = cost_of_sass(code, trips)
    cost.shared, cost.registers = shared, int(_found(r"REG:(\d+)", usage))
    cost.spilled = int(_found(r"STACK:(\d+)", usage)) + int(_found(r"LOCAL:(\d+)", usage))
    return cost


def _tool(name: str, *arguments: object) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in what the disassembler said: {text[:200]!r}")
    return match[1]


def cost_of_sass(code: str, trips: int = 1) -> Cost:
    """Count instructions by pipe and loads by width.

    What lies between a label and a jump back to it runs ``trips`` times. Every instruction counts as executed, also
    behind a branch; division's slow path, a routine behind the kernel's own code, does not.
    """
    cost = Cost(0, 0, 0)
    for times, name, _ in _weighted(_own_lines(code), trips):
        base, *modifiers = name.split(".")
        width = next((int(m) // 8 for m in modifiers if m in ("64", "128")), _narrow(modifiers))
        cost.pipes["issue"] += times
        pipe = pipe_of(base)
        if pipe:
            cost.pipes[pipe] += times * (max(1, width // 4) if pipe == "lsu" and base != "SHFL" else 1)
        cost.loads[width] += base == "LDG"
    cost.loads = +cost.loads
    return cost


def _narrow(modifiers: list[str]) -> int:
    return next((int(m[1:]) // 8 for m in modifiers if m in ("U8", "S8", "U16", "S16")), 4)


def pipe_of(base: str) -> str | None:
    """Return the pipe of an instruction's first name, None where only its issue counts."""
    if base in _CONTROL or base in _FP32 or base.startswith("U"):
        return None
    for names, pipe in ((_FP64, "fp64"), (_CONVERT, "convert"), (_IMAD, "imad"), (_MEMORY, "lsu")):
        if base in names:
            return pipe
    return "alu"


def _own_lines(code: str) -> list[str]:
    """Return the kernel's own lines: up to the first routine that is called, or to the padding."""
    lines: list[str] = []
    for line in code.splitlines():
        if line.startswith("$__internal") or line.startswith("\t.type\t\t$__internal"):
            break
        lines.append(line)
    return lines


def _weighted(lines: list[str], trips: int) -> list[tuple[int, str, str]]:
    """Return (how often, name, operands) of every instruction."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif (match := _INSTRUCTION.match(line)) and not match[1].startswith("NOP"):
            found.append((match[1], match[2]))
    inside = [False] * len(found)
    for end, (name, operands) in enumerate(found):
        target = _TARGET.search(operands) if name.split(".")[0] == "BRA" else None
        start = labels.get(target[1], end) if target else end
        if start < end:
            inside[start : end + 1] = [True] * (end + 1 - start)
    return [(trips if loop else 1, *instruction) for loop, instruction in zip(inside, found, strict=True)]


def cost_of_amdgcn(text: str, shared: int) -> Cost:
    """Read registers and spills from the notes and widths from the loads of AMD's assembly."""
    count = {key: int(value) for key, value in re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", text)}
    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
    loads = re.findall(r"\b(?:global|buffer|flat)_load_(dwordx\d|[a-z]+)", text)
    return Cost(
        registers=count["vgpr_count"],
        # spilled scalar registers go to lanes of vector registers, not to memory
        spilled=count["vgpr_spill_count"] + int(_found(r"\.private_segment_fixed_size:\s+(\d+)", text)),
        shared=shared,
        loads=Counter(widths.get(load, 4) for load in loads),
    )


def clocks(pipes: Counter[str], threads: int, elements: int) -> dict[str, float]:
    """Return the clocks that each pipe needs an element, where a program has ``threads`` and ``elements``."""
    return {pipe: pipes[pipe] * threads / elements / lanes for pipe, lanes in LANES.items()}


def copy_fraction(pipes: Counter[str], threads: int, elements: int, bytes_an_element: float) -> tuple[float, str]:
    """Return which part of an H100's copy rate the busiest pipe allows, at most 1 or above, and that pipe.

    A bound from counting instructions: latency, occupancy and the memory's own inefficiency are not in it.
    """
    needed = clocks(pipes, threads, elements)
    slowest = max(needed, key=lambda pipe: needed[pipe])
    rate = PROCESSORS * CLOCK / needed[slowest] * bytes_an_element
    return rate / COPY, slowest
