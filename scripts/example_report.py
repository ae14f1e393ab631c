#!/usr/bin/env python
"""Make docs/example_report.png: five trained networks at five bit-plans, a damaged one, and their page.

    scripts/example_report.py --shared ../shared

takes about five minutes on a CPU, and wants dfmpc[html], selenium, Chromium and its driver. The job, the store and the
page stay in --folder, whose path messages show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "report"))

from page_browser import Browser, browser  # noqa: E402 - the tests drive the same browser

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
NETWORKS = ("resnet20", "resnet56", "resnet56_paper", "resnet18", "mobilenetv2")
PUBLISHED = {"method": "dfmpc", "recipe": "published", "calibrator": "analytic"}
PLANS = [
    {"name": "mp2-6", "low": 2, "high": 6, **PUBLISHED},
    {"name": "mp3-6", "low": 3, "high": 6, **PUBLISHED},
    {"name": "mp4-8", "low": 4, "high": 8, **PUBLISHED},
    {"name": "rtn4", "method": "rtn", "bits": 4},
    {"name": "rtn6", "method": "rtn", "bits": 6},
]
HEIGHT = 2060
DESKTOP, PHONE = 1240, 390
GAP = 40


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of networks and images")
    arguments.add_argument("--images", type=int, default=400, help="how many images a network is tried on")
    arguments.add_argument("--folder", type=Path, default=ROOT / "build" / "example_report", help="seen in the picture")
    given = arguments.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    run_job(job_file(folder, given.shared.resolve(), given.images), given.shared.resolve(), folder)
    dfmpc(folder, "report", "store", "--html", page.name)
    with browser() as window:
        pictures = [
            picture(window, page, DESKTOP, "light", "header"),
            picture(window, page, DESKTOP, "light", "#tradeoff"),
            picture(window, page, PHONE, "dark", "header"),
        ]
    save(pictures, ROOT / "docs" / "example_report.png")


def job_file(folder: Path, shared: Path, images: int) -> Path:
    """Write the job, and a checkpoint that was cut short, so that the page has a failure to show."""
    whole = (shared / "models" / "resnet20.safetensors").read_bytes()
    (folder / "cut_short.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
    models = [model(name, str(shared / "models" / f"{name}.safetensors")) for name in NETWORKS]
    job = {
        "version": 1,
        "name": "nightly-cifar",
        "output": "store",
        "models": [*models, model("resnet20-mirror", "cut_short.safetensors", "resnet20")],
        "bit_plans": PLANS,
        "exclude": [{"model": "resnet20-mirror", "plan": plan["name"]} for plan in PLANS[1:]],
        "evaluate": {
            "data": str(shared / "data" / "cifar10_test.parquet"),
            **IMAGENET,
            "metrics": ["top1"],
            "limit": images,
        },
        "gates": {"max_top1_drop": {"warn": 2, "fail": 5}},
        "resources": {"threads": 1, "workers_per_device": 1},
    }
    file = folder / "nightly-cifar.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    return file


def model(name: str, checkpoint: str, network: str = "") -> dict[str, object]:
    found = {
        "name": name,
        "factory": f"cifar_models:{network or name}",
        "checkpoint": checkpoint,
        "input": [1, 3, 32, 32],
    }
    return found | ({"preprocess": CIFAR} if name == "resnet56_paper" else {})


def run_job(job: Path, shared: Path, folder: Path) -> None:
    """Run what is not there yet; exit code 3 is the damaged checkpoint and the closed gates."""
    code = dfmpc(folder, "run", job.name, "--allow-code", str(shared / "models"), "--devices", "cpu", allowed=(0, 3))
    print(json.dumps({"dfmpc run": code}))


def dfmpc(folder: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    command = [sys.executable, "-m", "dfmpc.cli", *arguments]
    code = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if code not in allowed:
        raise SystemExit(f"{' '.join(arguments)} ended with {code}")
    return code


def picture(window: Browser, page: Path, width: int, scheme: str, top: str) -> Image.Image:
    """Return the page from the element ``top`` on, with the plots in view drawn."""
    window.open(page, width=width, height=HEIGHT, scheme=scheme)
    window.run("document.querySelector(arguments[0]).scrollIntoView()", top)
    window.draw_near()
    file = page.with_name(f"{width}_{scheme}_{top.strip('#')}.png")
    window.driver.save_screenshot(str(file))
    return Image.open(file).convert("RGB").crop((0, 0, width, HEIGHT))


def save(pictures: list[Image.Image], file: Path) -> None:
    """Put the pictures side by side on a plain ground, in a palette: a third of the bytes."""
    width = sum(one.width for one in pictures) + GAP * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, max(one.height for one in pictures) + 2 * GAP), "#c9d0da")
    left = GAP
    for one in pictures:
        sheet.paste(one, (left, GAP))
        ImageDraw.Draw(sheet).rectangle((left - 1, GAP - 1, left + one.width, GAP + one.height), outline="#8b96a5")
        left += one.width + GAP
    # an octree keeps the few pixels of a plot's colours, which the default palette gives away
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes, {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    main()
