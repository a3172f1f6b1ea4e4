"""Prepares a module of PyTorch when the program imports it, which may take seconds that most programs do not need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, prepare: Callable[[], None]) -> None:
    """Call ``prepare`` once, when that module has been imported: at once if it has been already."""
    if name in sys.modules:
        prepare()
    else:
        sys.meta_path.insert(0, _Finder(name, prepare))


class _Finder(MetaPathFinder):
    """Finds one module once, and prepares it after it is loaded."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self._name = name
        self._prepare = prepare

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Preparing(spec.loader, self._prepare)
        return spec


class _Preparing(Loader):
    def __init__(self, loader: Loader, prepare: Callable[[], None]) -> None:
        self._loader = loader
        self._prepare = prepare

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._prepare()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
