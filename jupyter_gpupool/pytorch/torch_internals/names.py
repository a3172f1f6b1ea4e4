"""Looks up names that PyTorch does not promise to keep, and reports those that a release lacks."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch

#: The releases that this package was tested with, oldest first.
TESTED = (("2", "11"), ("2", "12"), ("2", "13"), ("2", "14"), ("2", "15"))


class UnsupportedPyTorch(ImportError):
    """This release of PyTorch lacks what the package needs; the message names it."""


class Name(NamedTuple):
    """A name of PyTorch, and what it is used for."""

    path: str
    purpose: str
    #: whether a release, or a build, may lack it
    optional: bool = False


class Attribute(NamedTuple):
    """A place that this package replaces: ``patches.set(*attribute, value)``."""

    owner: Any
    name: str

    @property
    def value(self) -> Any:
        """What is there now."""
        return getattr(self.owner, self.name)


class Later:
    """A name in a module that takes long to import. It is looked up when it is first used."""

    def __init__(self, name: Name) -> None:
        self._name = name

    def get(self) -> Any:
        """The value. Raises :class:`UnsupportedPyTorch`."""
        try:
            return resolve(self._name.path)
        except AttributeError:
            raise UnsupportedPyTorch(explain([self._name])) from None

    def set(self, value: Any) -> None:
        """Replace it."""
        owner, _, name = self._name.path.rpartition(".")
        setattr(resolve(owner), name, value)


class Names:
    """The names that one end uses."""

    def __init__(self) -> None:
        self.used: list[Name] = []
        self.missing: list[Name] = []
        #: those that are looked up when they are used
        self.later_ones: list[Name] = []

    def value(self, path: str, purpose: str, optional: bool = False) -> Any:
        """What ``path`` names. None if it is missing, which :meth:`check` reports unless it is optional."""
        return self._find(Name(path, purpose, optional))

    def attribute(self, path: str, purpose: str, of: Any = None, optional: bool = False) -> Attribute:
        """The place that ``path`` names; its value is looked up in ``of``, if only an instance has it.

        Its owner is None if it is missing, which :meth:`check` reports unless it is optional.
        """
        owner, _, name = path.rpartition(".")
        self._find(Name(path, purpose, optional), of)
        try:
            return Attribute(resolve(owner), name)
        except AttributeError:
            return Attribute(None, name)

    def behaves(self, path: str, purpose: str, works: bool) -> None:
        """Report ``path`` as missing unless it ``works``: a name that PyTorch reads from our objects."""
        self.used.append(Name(path, purpose))
        if not works:
            self.missing.append(self.used[-1])

    def later(self, path: str, purpose: str, optional: bool = False) -> Later:
        """A name that :meth:`check` does not look for, because its module takes long to import."""
        self.later_ones.append(Name(path, purpose, optional))
        return Later(self.later_ones[-1])

    def check(self) -> None:
        """Raise :class:`UnsupportedPyTorch` if a name is missing."""
        if self.missing:
            raise UnsupportedPyTorch(explain(self.missing))

    def _find(self, name: Name, of: Any = None) -> Any:
        self.used.append(name)
        try:
            return resolve(name.path) if of is None else getattr(of, name.path.rpartition(".")[2])
        except AttributeError:
            if not name.optional:
                self.missing.append(name)
            return None


def resolve(path: str) -> Any:
    """``"torch._C._swap_tensor_impl"`` → the function. Raises AttributeError."""
    first, *parts = path.split(".")
    found: Any = importlib.import_module(first)
    at = first
    for part in parts:
        at = f"{at}.{part}"
        if not hasattr(found, part) and isinstance(found, ModuleType):
            try:
                found = importlib.import_module(at)
            except ImportError:
                raise AttributeError(path) from None
        else:
            found = getattr(found, part)
    return found


def explain(missing: list[Name]) -> str:
    """One line that names what is missing, what it is for, and what to install."""
    first, *others = missing
    count = f"{len(others)} more name{'s' if len(others) > 1 else ''}"
    more = f" and {count} ({', '.join(n.path for n in others)})" if others else ""
    oldest, newest = (".".join(TESTED[k]) for k in (0, -1))
    return (
        f"PyTorch {torch.__version__} lacks {first.path}{more}, which jupyter-gpupool needs "
        f"to {first.purpose}; install PyTorch {oldest} to {newest}, or a newer jupyter-gpupool"
    )
