#!/usr/bin/env python3
"""Time the kernels: as a fraction of the card's own copy on a GPU, the references on a CPU.

    python scripts/bench_kernels.py [--json FILE] [--budget 480]

On a GPU: the copy's rate first; then every kernel on the shapes of docs/kernels.md, grouped launches over ResNet-50,
MobileNetV2 and a Llama-8B layer beside one tensor of the same bytes; then the same work in eager PyTorch and
torch.compile, and HQQ and torchao where they are installed. Bytes are what is read and written. Inputs rotate, so that
no cache serves them; outputs are poisoned; a kernel whose sampled rows are not the reference's to the last bit gets no
speed. A checkout with torch and Triton is enough. On a CPU: the references beside the same mathematics channel by
channel and a copy of the input.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from kernel_checkout import ensure_dfmpc

ensure_dfmpc()

import torch  # noqa: E402 - dfmpc's place comes first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench_kernels.json"), help="also write the rows here")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which comparisons are left out")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU's references")
    parser.add_argument("--repeats", type=int, default=5, help="of every timing on the CPU")
    options = parser.parse_args()
    found = on_gpu(options.budget) if torch.cuda.is_available() else on_cpu(options.threads, options.repeats)
    options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 1 if any("no speed" in str(row.get("note", "")) for row in found["rows"]) else 0


def on_gpu(budget: float) -> dict[str, object]:
    from bench_kernels_gpu import measure, verdicts  # noqa: PLC0415 - each side needs what the other machine may lack

    bench = measure(budget)
    asked = verdicts(bench.rows)
    print("\n".join(["", f"{'asked':<62}{'reached':>8}{'asked':>8}", *asked]))
    rows = [asdict(row) for row in bench.rows]
    return {**machine(), "copy_bytes_per_s": bench.copy, "rows": rows, "asked": asked}


def on_cpu(threads: int, repeats: int) -> dict[str, object]:
    from bench_kernels_cpu import measure  # noqa: PLC0415

    torch.set_num_threads(threads)
    print(f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}")
    return {**machine(), "threads": threads, "rows": [asdict(row) for row in measure(repeats)]}


def machine() -> dict[str, object]:
    import triton  # noqa: PLC0415

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": card, "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    sys.exit(main())
