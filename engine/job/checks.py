"""What a job file must fulfil beyond its schema: names, globs, files, the allow-list, include and exclude."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import Problem, UsageError
from .document import Document, FieldPath, path_text
from .fields import Name
from .methods import BitPlan
from .mlflow_client import shown
from .mlflow_source import mlflow_versions, task_name
from .registry import path_names, registry_models
from .schema import Evaluate, ModelSpec, Selector
from .sources import model_sources, selected

Allows = Callable[[str], bool]
_Item = TypeVar("_Item")
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_PLAN: TypeAdapter[BitPlan] = TypeAdapter(BitPlan)


class Checks:
    """Every check on those parts of a document that fit the schema, so that one broken part hides no other."""

    def __init__(self, document: Document, folder: Path, allows: Allows | None) -> None:
        self.document, self.folder, self.allows = document, folder, allows
        self.problems: list[Problem] = []
        self.complete = True
        self.models = self._items("models", ModelSpec.model_validate)
        self.plans = self._items("bit_plans", _PLAN.validate_python)
        evaluate = document.data.get("evaluate")
        self.evaluate = self._part(Evaluate.model_validate, evaluate) if evaluate is not None else None

    def run(self) -> list[Problem]:
        """Return all problems."""
        self._check_plan_names()
        names = self._check_models()
        self._check_evaluate()
        plans = [plan.name for _, plan in self.plans]
        if self.complete and names and plans:
            self._check_selectors(names, plans)
        return self.problems

    def _items(self, section: str, validate: Callable[[object], _Item]) -> list[tuple[int, _Item]]:
        entries = self.document.data.get(section)
        parts = [self._part(validate, entry) for entry in entries] if isinstance(entries, list) else []
        return [(index, part) for index, part in enumerate(parts) if part is not None]

    def _part(self, validate: Callable[[object], _Item], value: object) -> _Item | None:
        try:
            return validate(value)
        except ValidationError:  # the loader reports it from the whole job's validation
            self.complete = False
            return None

    def _add(self, path: FieldPath, value: object, expected: str) -> None:
        shown = value if isinstance(value, str) else repr(value)
        self.problems.append(Problem(path_text(path), shown, expected, self.document.line(path)))

    def _check_plan_names(self) -> None:
        first: dict[str, int] = {}
        entries = self.document.data.get("bit_plans")
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            name = entry.get("name") if isinstance(entry, dict) else None
            if isinstance(name, str) and name in first:
                self._add(("bit_plans", index, "name"), repr(name), _once(f"bit_plans[{first[name]}]"))
            elif isinstance(name, str):
                first[name] = index

    def _check_models(self) -> list[str]:
        first: dict[str, str] = {}
        for index, spec in self.models:
            if spec.factory is not None and self.allows is not None and not self.allows(spec.factory):
                expected = (
                    "a module on the allow-list; if you trust it, allow it by --allow-code FOLDER_OR_MODULE "
                    "(from Python allow_code=[…], or DFMPC_ALLOW_CODE, comma-separated)"
                )
                self._add(("models", index, "factory"), repr(spec.factory), expected)
            for name, origin in self._named(index, spec):
                if name in first:
                    path: FieldPath = ("models", index, "glob" if spec.glob else "name")
                    self._add(path, f"{name!r}{origin}", _once(first[name]))
                first.setdefault(name, f"models[{index}]{origin}")
        registries = [(index, spec) for index, spec in self.models if spec.registry or spec.mlflow]
        return [*first, *(name for index, spec in registries for name in self._registered(index, spec))]

    def _registered(self, index: int, spec: ModelSpec) -> list[str]:
        """Return the names in a registry. What is wrong with its models fails those alone, later."""
        field, expected = "registry", "a folder tree with a dfmpc.yaml or a .pt2 file in it"
        try:
            if spec.mlflow is not None:
                field, expected = "mlflow", "models with versions to take"
                names = [task_name(version.name) for version in mlflow_versions(spec.mlflow, self.folder)]
            elif self.document.data.get("include") or self.document.data.get("exclude"):
                names = [model.source.name for model in registry_models(spec, self.folder, None)]
            else:  # nobody asks for names by sidecars, which take their time to read
                names = path_names(spec, self.folder)
        except UsageError as error:
            names, expected = [], str(error)
        if not names:
            seen = repr(spec.registry) if spec.mlflow is None else shown(spec.mlflow.uri)
            self._add(("models", index, field), seen, expected)
        return names

    def _named(self, index: int, spec: ModelSpec) -> Iterator[tuple[str, str]]:
        if spec.registry is not None or spec.mlflow is not None:
            return
        field = "glob" if spec.glob is not None else "program"
        sources = model_sources(spec, self.folder, None)
        if not sources:
            self._add(
                ("models", index, "glob"), repr(spec.glob), f"a pattern of .pt2 files; none lies in {self.folder}"
            )
        for source in sources:
            try:
                _NAME.validate_python(source.name)
            except ValidationError as error:
                reason = str(error.errors()[0]["msg"]).removeprefix("Value error, expected ")
                expected = f"a file name that makes a model's name: {reason}"
                self._add(("models", index, field), f"{source.program} (name {source.name!r})", expected)
            yield source.name, f" ({source.program})" if spec.glob is not None else ""

    def _check_evaluate(self) -> None:
        if self.evaluate is not None and not (self.folder / self.evaluate.data).is_file():
            shown = f"{self.evaluate.data!r}, which is no file in {self.folder}"
            self._add(("evaluate", "data"), shown, "a Parquet file; its path counts from the job file's folder")

    def _check_selectors(self, models: Sequence[str], plans: Sequence[str]) -> None:
        include = self._items("include", Selector.model_validate)
        exclude = self._items("exclude", Selector.model_validate)
        pairs = [(model, plan) for model in models for plan in plans]
        for section, selectors in (("include", include), ("exclude", exclude)):
            for index, selector in selectors:
                if not any(selected([selector], [], *pair) for pair in pairs):
                    shown = f"{{model: {selector.model}, plan: {selector.plan}}}, which matches no task"
                    self._add((section, index), shown, f"patterns of models ({_few(models)}) and plans ({_few(plans)})")
        kept = ([one for _, one in include], [one for _, one in exclude])
        if not self.problems and not any(selected(*kept, *pair) for pair in pairs):
            self._add(("exclude",), "patterns that leave no task", "at least one model and bit-plan to run")


def _once(where: str) -> str:
    return f"a name used once: {where} has it already"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … {len(names)} in all" if len(names) > 8 else "")
