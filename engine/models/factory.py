"""Networks from code: only modules on the allow-list are imported, and nothing of a model runs before that check."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import FactoryError, UsageError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MODULES = ("torchvision.models", "timm", "efficientnet_lite_pytorch")
ENVIRONMENT = "DFMPC_ALLOW_CODE"
HOW_TO_ALLOW = f"--allow-code FOLDER_OR_MODULE (from Python allow_code=[…], or {ENVIRONMENT}, comma-separated)"
"""How messages tell what puts code on the list."""


class FactorySource(Protocol):
    """The part of a model's source that names code."""

    @property
    def factory(self) -> str | None:
        """``module:callable``, dots allowed in both."""

    @property
    def args(self) -> Sequence[Any]:
        """Positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments."""


@dataclass(frozen=True)
class AllowList:
    """Module prefixes, and folders whose own modules may be imported."""

    modules: tuple[str, ...]
    folders: tuple[Path, ...] = ()

    @classmethod
    def default(cls, extra: Sequence[str] = ()) -> AllowList:
        """Return the built-in modules, ``extra`` and the entries of DFMPC_ALLOW_CODE (comma-separated).

        An entry with a path separator, or that is an existing folder, is a folder. Raises UsageError where it is none.
        """
        entries = [*extra, *(entry.strip() for entry in os.environ.get(ENVIRONMENT, "").split(","))]
        folders = [entry for entry in entries if entry and _is_folder(entry)]
        modules = [entry for entry in entries if entry and not _is_folder(entry)]
        return cls((*DEFAULT_MODULES, *modules), tuple(Path(entry).resolve() for entry in folders))

    def allows(self, factory: str) -> bool:
        """Whether ``factory`` (``module:callable``) is code that may be imported."""
        module = factory.partition(":")[0]
        inside = any(module == prefix or module.startswith(f"{prefix}.") for prefix in self.modules)
        return inside or self.folder_of(module) is not None

    def build(self, source: FactorySource) -> nn.Module:
        """Import the factory of ``source`` and call it with its arguments; the weights are left uninitialised.

        Raises FactoryError where the factory is not allowed, cannot be imported, fails, or gives no nn.Module.
        """
        factory = source.factory or ""
        if not self.allows(factory):
            raise FactoryError(
                f"factory {factory!r} is not on the allow-list ({', '.join(self._entries())}); "
                f"if you trust it, allow it by {HOW_TO_ALLOW}"
            )
        function = self._resolve(factory)
        from torch import nn  # noqa: PLC0415 - job files are checked against the list without torch

        from .uninitialised import Uninitialised  # noqa: PLC0415 - the same

        try:
            with Uninitialised():
                module = function(*source.args, **source.kwargs)
        except Exception as error:  # a factory is foreign code and may raise anything
            raise FactoryError(f"factory {factory!r} failed: {_said(error)}; check its args and kwargs") from error
        if not isinstance(module, nn.Module):
            raise FactoryError(f"factory {factory!r} gave a {type(module).__name__}; expected a torch.nn.Module")
        return module

    def distribution_version(self, factory: str) -> str:
        """Return what pins a factory's code, without importing it.

        ``name==version`` of the distribution that owns its module; for code of an allowed folder or of no
        distribution the sha256 of the module's file; else ``unknown``.
        """
        module = factory.partition(":")[0]
        folder = self.folder_of(module)
        if folder is None:
            names = _distributions().get(module.partition(".")[0], [])
            if names:
                return ",".join(f"{name}=={importlib.metadata.version(name)}" for name in sorted(set(names)))
        file = _module_file(folder, module) if folder else _found_file(module)
        return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" if file else "unknown"

    def _entries(self) -> list[str]:
        return [*self.modules, *(str(folder) for folder in self.folders)]

    def folder_of(self, module: str) -> Path | None:
        """Return the allowed folder that holds ``module`` directly, if one does."""
        return next((folder for folder in self.folders if _module_file(folder, module)), None)

    def _resolve(self, factory: str) -> Any:
        name, _, attributes = factory.partition(":")
        folder = self.folder_of(name)
        if folder is not None and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            found: Any = importlib.import_module(name)
        except Exception as error:  # importing runs foreign code, which may raise anything
            raise FactoryError(
                f"factory {factory!r} cannot be imported: {_said(error)}; {_import_remedy(name, error)}"
            ) from error
        for attribute in attributes.split("."):
            found = _attribute(factory, found, attribute)
        if not callable(found):
            raise FactoryError(f"factory {factory!r} is not callable; expected 'module:callable'")
        self._check_home(factory, found)
        return found

    def _check_home(self, factory: str, function: Any) -> None:
        """Refuse what an allowed module has merely imported: ``timm.layers:os.system`` is no factory of timm's."""
        while isinstance(function, partial):
            function = function.func
        home = getattr(function, "__module__", None) or "an unknown module"
        if not self.allows(f"{home}:"):
            raise FactoryError(
                f"factory {factory!r} is defined in {home}, which is not on the allow-list "
                f"({', '.join(self._entries())}); if you trust it, allow it by {HOW_TO_ALLOW}"
            )


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the installed distributions by module, looked up once: that reads the names of all their files."""
    return importlib.metadata.packages_distributions()


def _import_remedy(module: str, error: Exception) -> str:
    """A module that is not found may lie in a folder that Python does not look into."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        first = module.partition(".")[0]
        return (
            f"install its package, correct the name, or give --allow-code the folder that holds {first}.py or {first}/"
        )
    return "install its package or correct the name"


def _attribute(factory: str, holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError as error:
        owner = getattr(holder, "__name__", type(holder).__name__)
        public = [known for known in dir(holder) if not known.startswith("_")]
        close = difflib.get_close_matches(name, public, n=1)
        raise FactoryError(
            f"factory {factory!r}: {owner} has no function {name}; "
            + (f"did you mean {close[0]}?" if close else "correct the name")
        ) from error
    except Exception as error:  # a module's own __getattr__ is foreign code too
        raise FactoryError(f"factory {factory!r} cannot be imported: {_said(error)}; correct the name") from error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_folder(entry: str) -> bool:
    if Path(entry).is_dir():
        return True
    if os.sep in entry or "/" in entry:
        raise UsageError(f"--allow-code {entry}: no such folder; give an existing folder or a module prefix")
    return False


def _module_file(folder: Path, module: str) -> Path | None:
    first = module.partition(".")[0]
    if not first.isidentifier():
        return None
    if not (folder / f"{first}.py").is_file() and not (folder / first).is_dir():
        return None
    path = folder.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _found_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
