"""A YAML file as plain data plus the line of every field; bounded, so that a hostile file costs little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer

from ..errors import JobFileError, Problem

MAX_BYTES = 2**20
MAX_ALIASES = 50
MAX_NODES = 200_000
MAX_DEPTH = 50

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed YAML mapping; ``lines`` gives the line (from 1) of a field's key or of a list's item."""

    file: str
    data: dict[str, Any]
    lines: dict[FieldPath, int]

    def line(self, path: FieldPath) -> int | None:
        """Return the line of ``path`` or of the nearest field around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return self.lines.get(())


class _TooLargeError(yaml.composer.ComposerError):
    """More aliases or levels than a job file needs."""


class _Bounded(Composer):
    """Gives up after ``MAX_ALIASES`` aliases and below ``MAX_DEPTH`` levels."""

    aliases = depth = 0
    check_event: Any
    peek_event: Any
    """The parser's, beside which this is inherited."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.aliases > MAX_ALIASES:
            self._refuse(f"more than {MAX_ALIASES} aliases")
        if self.depth > MAX_DEPTH:
            self._refuse(f"fields nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, what: str) -> NoReturn:
        mark = self.peek_event().start_mark
        raise _TooLargeError(None, None, what, mark)


class _Loader(_Bounded, yaml.SafeLoader):
    """PyYAML's own parser, whose messages we quote."""


_LOADERS: list[Any] = [_Loader]
if yaml.__with_libyaml__:

    class _FastLoader(_Bounded, yaml.CSafeLoader):
        """libyaml parses in a tenth of the time; nodes are composed in Python, where they can be counted."""

        def __init__(self, text: str) -> None:
            Composer.__init__(self)
            yaml.CSafeLoader.__init__(self, text)

    _LOADERS.insert(0, _FastLoader)


def path_text(path: FieldPath) -> str:
    """Return a field path as people write it: ``bit_plans[2].low``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class FileKind:
    """What a file is, in the words of messages."""

    name: str = "job file"
    fields: str = "version, name, output, models and bit_plans ('dfmpc schema' lists every field)"


_JOB_FILE = FileKind()


def parse(path: Path, kind: FileKind = _JOB_FILE) -> Document:
    """Read the YAML mapping in ``path``; JobFileError lists everything that keeps it from being one."""
    text = _text(path, kind)
    *fast, last = _LOADERS
    for loader in fast:
        with suppress(yaml.YAMLError, ValueError, OverflowError):  # said below, by the parser whose words we know
            return _document(path, loader(text), kind)
    try:
        return _document(path, last(text), kind)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise JobFileError(str(path), [_broken(error, kind)]) from error


def _document(path: Path, loader: Any, kind: FileKind) -> Document:
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise JobFileError(str(path), [_not_a_mapping(root, kind)])
        lines, problems = _walk(root)
        if problems:
            raise JobFileError(str(path), problems)
        return Document(str(path), loader.construct_document(root), lines)
    finally:
        loader.dispose()


def _text(path: Path, kind: FileKind) -> str:
    if not path.is_file():
        seen = "a folder" if path.is_dir() else "nothing there"
        raise JobFileError(str(path), [Problem("(file)", seen, f"a YAML {kind.name}")])
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise JobFileError(str(path), [Problem("(file)", "more than 1 MiB", f"a {kind.name} of at most 1 MiB")])
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise JobFileError(str(path), [Problem("(file)", "bytes that are not UTF-8", "UTF-8 text", line)]) from error
    except OSError as error:
        raise JobFileError(
            str(path), [Problem("(file)", str(error.strerror), f"a readable YAML {kind.name}")]
        ) from error


def _not_a_mapping(root: yaml.Node | None, kind: FileKind) -> Problem:
    expected = f"a mapping with {kind.fields}"
    if root is None:
        return Problem("(file)", "an empty file", expected)
    seen = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {root.value[:60]!r}"
    return Problem("(file)", seen, expected, root.start_mark.line + 1)


def _broken(error: Exception, kind: FileKind) -> Problem:
    mark = getattr(error, "problem_mark", None)
    seen = getattr(error, "problem", None) or " ".join(str(error).split())
    at = f" at column {mark.column + 1}" if mark else ""
    return Problem("(file)", f"{seen}{at}", _wanted(error, seen, kind), mark.line + 1 if mark else None)


def _wanted(error: Exception, seen: str, kind: FileKind) -> str:
    if isinstance(error, _TooLargeError):
        return f"a {kind.name} within these bounds"
    if isinstance(error, yaml.constructor.ConstructorError) and "tag" in seen:
        return "YAML without tags"
    return "valid YAML: check brackets, quotes, indentation and values there"


def _walk(root: yaml.MappingNode) -> tuple[dict[FieldPath, int], list[Problem]]:
    """Collect the lines of all fields with aliases followed; stop where that does not end soon."""
    lines: dict[FieldPath, int] = {}
    problems: list[Problem] = []
    stack: list[tuple[FieldPath, yaml.Node]] = [((), root)]
    seen = 0
    while stack:
        path, node = stack.pop()
        seen += 1
        if seen > MAX_NODES or len(path) > MAX_DEPTH:
            expected = f"at most {MAX_NODES} values, nested at most {MAX_DEPTH} deep, once aliases are followed"
            return {}, [Problem("(file)", "aliases that multiply or contain themselves", expected)]
        lines.setdefault(path, node.start_mark.line + 1)
        children = _children(path, node, lines, problems)
        stack.extend(children)
    return lines, problems


def _children(
    path: FieldPath, node: yaml.Node, lines: dict[FieldPath, int], problems: list[Problem]
) -> Iterator[tuple[FieldPath, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        yield from (((*path, index), child) for index, child in enumerate(node.value))
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from ((path, source) for source in merged)
        elif key.tag != "tag:yaml.org,2002:str":
            seen = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            problems.append(Problem(path_text(path) or "(file)", f"the key {seen}", "a text as key: quote it", line))
        elif key.value in own:
            expected = f"each key once (first on line {own[key.value]})"
            problems.append(Problem(path_text((*path, key.value)), "a duplicate key", expected, line))
        else:
            own[key.value] = line
            lines.setdefault((*path, key.value), line)
            yield (*path, key.value), value
