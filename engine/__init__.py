"""Data-free compression of PyTorch models (DF-MPC, arXiv 2307.00498): the public API, loaded on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Signature, getdoc, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import compress as compress
    from .api import run as run
    from .artifact.loader import load as load
    from .artifact.loader import load_state_dict as load_state_dict
    from .artifact.verify import verify as verify

_HOMES = {
    "compress": ".api",
    "run": ".api",
    "load": ".artifact.loader",
    "load_state_dict": ".artifact.loader",
    "verify": ".artifact.verify",
}
__all__ = ["__version__", "compress", "load", "load_state_dict", "run", "verify"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallablePackage(ModuleType):
    """A sub-package that bears a function's name: calling it calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        return signature(self._function())

    @property
    def __doc__(self) -> str:  # type: ignore[override]  # a text elsewhere; here it is looked up when it is asked for
        function = self._function()
        return f"{function.__name__}{signature(function)}\n\n{getdoc(function)}"

    def _function(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        function: Callable[..., Any] = getattr(import_module(_HOMES[name], __name__), name)
        return function


class _Package(ModuleType):
    """Importing dfmpc.run or dfmpc.compress puts the sub-package where the function of that name is looked up."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
