"""Pydantic's findings as problems of the file: the field's path as written, its line, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import Problem
from .document import Document, FieldPath, path_text
from .schema import Job

_Schema = Mapping[str, Any]


def schema_problems(error: ValidationError, document: Document, model: type[BaseModel] = Job) -> list[Problem]:
    """Return what pydantic found against ``model``, one problem a field; branches of a union are joined by 'or'."""
    schema = _schema_of(model)
    found: dict[FieldPath, tuple[str, list[str]]] = {}
    for detail in error.errors(include_url=False):
        path, value, expected = _finding(dict(detail), document, schema)
        found.setdefault(path, (value, []))[1].append(expected)
    # Where a mapping fits no text but one of its own fields is wrong, the field is what the user wants to hear of.
    inner = [
        path for path in found if not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    ]
    return [_problem(document, path, found[path][0], found[path][1]) for path in inner]


def _problem(document: Document, path: FieldPath, value: str, expected: list[str]) -> Problem:
    joined = " or ".join(dict.fromkeys(expected))
    return Problem(path_text(path) or "(file)", value, joined, document.line(path))


def seen(value: object) -> str:
    """Return a value short enough for one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _finding(detail: dict[str, Any], document: Document, schema: _Schema) -> tuple[FieldPath, str, str]:
    kind, location, context = detail["type"], detail["loc"], detail.get("ctx", {})
    path = _written_path(document.data, location, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "missing":
        return path, "nothing", f"{_description(schema, location)} (the field is required)"
    if kind == "extra_forbidden":
        return path, "an unknown field", _nearest(str(path[-1]), _fields_at(schema, location[:-1]))
    if kind == "union_tag_not_found":
        field = context["discriminator"].strip("'")
        return (*path, field), "nothing", f"one of {', '.join(_tags_at(schema, location))} (the field is required)"
    if kind == "union_tag_invalid":
        field = context["discriminator"].strip("'")
        inside = isinstance(_value_at(document.data, path), dict)
        return (*path, field) if inside else path, repr(context["tag"]), f"one of {context['expected_tags']}"
    if kind in ("model_type", "dict_type"):
        return (
            path,
            seen(detail["input"]),
            f"a mapping with {', '.join(_fields_at(schema, location)) or 'names and values'}",
        )
    return path, _given(detail["input"], path), _expected(detail["msg"])


def _given(value: object, path: FieldPath) -> str:
    if isinstance(value, dict) and path:
        return f"the fields {', '.join(map(str, value)) or 'of an empty mapping'}"
    return seen(value)


def _expected(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("expected ").removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def _written_path(data: Any, location: FieldPath, *, keep_last: bool) -> FieldPath:
    """Drop the names of union branches, which pydantic adds, from a location."""
    path: list[str | int] = []
    for position, part in enumerate(location):
        last = keep_last and position == len(location) - 1
        if isinstance(data, dict) and (part in data or last):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not last:
            continue
        path.append(part)
    return tuple(path)


def _value_at(data: Any, path: FieldPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _nearest(field: str, known: list[str]) -> str:
    close = difflib.get_close_matches(field, known, n=1)
    return f"{close[0]!r} (did you mean that?)" if close else f"one of {', '.join(known)}"


def _fields_at(schema: _Schema, location: FieldPath) -> list[str]:
    return list(_schema_at(schema, location).get("properties", {}))


def _tags_at(schema: _Schema, location: FieldPath) -> list[str]:
    return [repr(tag) for tag in _tags(_schema_at(schema, location))]


def _description(schema: _Schema, location: FieldPath) -> str:
    fields = _schema_at(schema, location[:-1]).get("properties", {})
    text = str(fields.get(location[-1], {}).get("description", "a value")).rstrip(".")
    return text[:1].lower() + text[1:]


@cache
def _schema_of(model: type[BaseModel]) -> _Schema:
    return model.model_json_schema()


def _schema_at(root: _Schema, location: FieldPath) -> Mapping[str, Any]:
    """Return the JSON Schema that holds at one of pydantic's locations (union branches included)."""
    node = root
    for part in location:
        node = _step(root, _resolved(root, node), part)
    return _resolved(root, node)


def _resolved(root: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    branches = [branch for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
    return _resolved(root, branches[0]) if len(branches) == 1 else node


def _step(root: Mapping[str, Any], node: Mapping[str, Any], part: str | int) -> Mapping[str, Any]:
    if part in (tags := _tags(node)):
        return {"$ref": tags[part]}
    if isinstance(part, int):
        return dict(node.get("items", {}))
    for branch in _branches(root, node):
        if branch.get("title") == part:
            return branch
    return dict(node.get("properties", {}).get(part, {}))


def _tags(node: Mapping[str, Any]) -> Mapping[str | int, str]:
    """Return the branches of a tagged union, which may itself be one branch beside a plain name."""
    tagged = [one["discriminator"]["mapping"] for one in (node, *node.get("anyOf", ())) if "discriminator" in one]
    return tagged[0] if tagged else {}


def _branches(root: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for branch in node.get("anyOf", ()):
        yield _resolved(root, branch)
