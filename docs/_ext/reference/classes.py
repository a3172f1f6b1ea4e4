"""Finds classes of the package, wherever they are defined."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import jupyter_gpupool


@lru_cache(1)
def modules() -> tuple[ModuleType, ...]:
    """Every module that can be imported here; those that need PyTorch or Ray are left out where these are missing."""
    found = []
    for info in pkgutil.walk_packages(jupyter_gpupool.__path__, "jupyter_gpupool."):
        if info.name.endswith("__main__") or ".migrations." in info.name or ".pytorch" in info.name:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a former name of a module
                found.append(importlib.import_module(info.name))
        except ModuleNotFoundError:
            continue
    return tuple(found)


def subclasses(base: type) -> Iterator[type]:
    """The package's classes that derive from ``base``, ordered by module and name; deprecated aliases once."""
    seen = {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    }
    yield from sorted(seen, key=lambda cls: (cls.__module__, cls.__name__))
