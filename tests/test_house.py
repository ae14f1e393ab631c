"""The walls of the house: imports run downwards, files stay small, nothing knows the machine it was written on."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import dfmpc
import pytest

PACKAGES = ("faults", "errors", "job", "models", "compress", "artifact", "evaluate", "report", "run")
"""From the bottom up; kernels is beside job, below models."""
TOP = ("doctor", "api", "show", "commands", "cli")
LEVELS = {name: level for level, name in enumerate((*PACKAGES, *TOP))}
LEVELS["kernels"] = LEVELS["job"]
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_parts(file: Path) -> list[str]:
    """Return a file's place below dfmpc: ["run", "store"], ["kernels", "ternary"], ["cli"]."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    return list(inside[1:] if inside[0] == "engine" else inside)


def imported_parts(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield what a file imports of dfmpc, as places below dfmpc."""
    here = module_parts(file)
    package = here if here[-1] == "__init__" else here[:-1]
    package = [part for part in package if part != "__init__"]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                target = [*base, *(node.module or "").split(".")]
            else:
                target = (node.module or "").split(".")
                if target[0] != "dfmpc":
                    continue
                target = target[1:]
            target = [part for part in target if part]
            yield from ([tuple(target)] if target else [(alias.name,) for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "dfmpc")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path):
    here = module_parts(file)
    if here == ["__init__"]:  # the public API: names its homes, loads none of them
        return
    for parts in imported_parts(file):
        if not parts or parts[0].startswith("__"):
            continue
        assert parts[0] in LEVELS, f"{'.'.join(parts)} has no place in docs/design.md"
        inside = parts[0] == here[0]
        assert inside or LEVELS[parts[0]] < LEVELS[here[0]], f"{'.'.join(here)} imports {'.'.join(parts)} above it"


def test_files_do_not_import_in_circles():
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    modules = {tuple(part for part in module_parts(file) if part != "__init__"): file for file in SOURCES}
    for name, file in modules.items():
        graph[name] = {parts for parts in imported_parts(file) if parts in modules and parts != name}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> None:
        assert name not in above, " -> ".join(".".join(part) for part in (*above, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        if name:
            visit(name, ())


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_small(file: Path):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def test_every_folder_of_code_is_packaged():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {file.parent for file in SOURCES}
    expected = {".".join(["dfmpc", *(part for part in module_parts(folder / "x.py")[:-1])]) for folder in folders}
    assert expected == listed


def test_the_tree_knows_no_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode:
        pytest.skip("not a git checkout, so what belongs to the tree is not known")
    patterns = [f"/{name}/" for name in ("home", "root", "Users", "work", "opt")]
    found = []
    for name in known.stdout.splitlines():
        file = ROOT / name
        if not file.is_file() or file == Path(__file__).resolve():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {pattern}" for pattern in patterns if f" {pattern}" in text or f'"{pattern}' in text]
        found += [f"{name}: {ROOT}"] * (str(ROOT) in text)
    assert found == []


def test_importing_dfmpc_is_light():
    code = """
import json, sys
import dfmpc
print(json.dumps([dfmpc.__version__, sorted(set(sys.modules) & {"torch", "pydantic", "pyarrow", "numpy", "triton"})]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, heavy = json.loads(ended.stdout)
    assert heavy == []
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_names_of_the_public_api_are_listed_and_others_are_errors():
    assert set(dfmpc._HOMES) | {"__version__"} == set(dfmpc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dfmpc.nothing  # noqa: B018 - the access is what is tested
