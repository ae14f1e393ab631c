"""Writes docs/job_file.md from the job file's schema: ``python scripts/render_docs.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfmpc.job.registry import Sidecar
from dfmpc.job.schema import Job

TARGET = Path(__file__).resolve().parent.parent / "docs" / "job_file.md"
HEAD = """# The job file

Generated from the schema by `python scripts/render_docs.py`; `dfmpc schema` prints the same as JSON Schema, and
`jobs/template.yaml` is an example with every field. Unknown fields are errors, and all errors of a file are reported
at once with file, line and field. Paths of inputs count from the job file's folder, `output` from the current folder.
`${NAME}` in a text takes an environment variable. Names become folders: letters, digits, `.`, `_`, `-`, `+`. Sizes are
written like `16GiB`, durations like `30m`. A file has at most 1 MiB and 50 aliases.
"""


def render() -> str:
    """Return the whole reference as Markdown."""
    root = Job.model_json_schema()
    sections = ["\n".join(_section("Job", root))]
    sections += ["\n".join(_section(name, root["$defs"][name])) for name in _reached(root, root, [])]
    sections.append("\n".join(_section("Sidecar", Sidecar.model_json_schema())))
    return HEAD + "\n" + "\n\n".join(sections) + "\n"


def _reached(node: Any, root: dict[str, Any], seen: list[str]) -> list[str]:
    """Return the names of the definitions that ``node`` leads to, in the order of the fields."""
    if isinstance(node, dict):
        name = str(node.get("$ref", "")).rsplit("/", 1)[-1]
        if name and name not in seen:
            seen.append(name)
            _reached(root["$defs"][name], root, seen)
        for key, value in node.items():
            if key not in ("$defs", "discriminator"):
                _reached(value, root, seen)
    elif isinstance(node, list):
        for value in node:
            _reached(value, root, seen)
    return seen


def _section(name: str, node: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}\n\n{node['description']}\n\n| field | type | default | meaning |\n| --- | --- | --- | --- |"
    required = node.get("required", [])
    for field, detail in node["properties"].items():
        default = "required" if field in required else _default(detail)
        meaning = str(detail.get("description", "")).replace("|", "\\|")
        yield f"| `{field}` | {_type(detail)} | {default} | {meaning} |"


def _default(detail: dict[str, Any]) -> str:
    if "default" not in detail:
        return "see meaning"
    value = detail["default"]
    if value is None or "$ref" in detail:
        return "none" if value is None else "its defaults"
    return f"`{json.dumps(value)}`"


def _type(detail: dict[str, Any]) -> str:
    if "$ref" in detail:
        name = detail["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in detail:
            return " or ".join(dict.fromkeys(_type(branch) for branch in detail[key] if branch.get("type") != "null"))
    if "enum" in detail or "const" in detail:
        return ", ".join(f"`{value}`" for value in detail.get("enum", [detail.get("const")]))
    if detail.get("type") == "array":
        return _array(detail)
    if detail.get("type") == "object":
        return "mapping"
    return _plain(detail)


def _array(detail: dict[str, Any]) -> str:
    if "prefixItems" in detail:
        return f"{len(detail['prefixItems'])} x {_type(detail['prefixItems'][0])}"
    return f"list of {_type(detail['items'])}"


def _plain(detail: dict[str, Any]) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {detail[key]:g}" for key, sign in bounds.items() if key in detail]
    name = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
    return " ".join([name[detail["type"]], ", ".join(limits)]).strip()


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
