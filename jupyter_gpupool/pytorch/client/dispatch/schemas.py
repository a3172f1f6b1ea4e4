"""Translates calls for a worker with another release of PyTorch, by the operators' schemas.

Most operators are the same in both releases. Of the others, the worker has said what they are there. A call is
changed where its meaning can be kept, and refused where it cannot; no other call is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import tensor
from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream
from jupyter_gpupool.pytorch.protocol.commands import SCHEMAS
from jupyter_gpupool.pytorch.protocol.schemas import (
    Argument,
    Description,
    describe,
    digests,
    dtypes,
    name_of,
)
from jupyter_gpupool.pytorch.torch_internals.client import all_schemas

from . import composites
from .prediction import Unsupported, encode_constant

#: An encoded call, see Definition in prediction.py: the operator's name, its arguments, and those by name.
Call = tuple[str, list[Any], dict[str, Any]]


def _cholesky(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    matrix, *upper = args
    return [matrix], {**kwargs, **({"upper": upper[0]} if upper else {})}


#: Operators that a later release has under another name: that name, and how the arguments are passed there.
RENAMED: dict[str, tuple[str, Callable[..., Any]]] = {
    "aten::cholesky.default": ("aten::linalg_cholesky.default", _cholesky)  # until 2.13
}


class SchemaDifferences:
    """What differs between this process's operators and a worker's.

    ``theirs`` has the worker's schema of each operator that differs, None for one that it lacks.
    """

    def __init__(self, theirs: dict[str, Description | None], release: str) -> None:
        self._theirs = theirs
        self._release = release

    def parts(self, func: Any) -> Callable[..., Any] | None:
        """A handler that runs ``func`` as the operators that it is composed of, if the worker lacks it."""
        name = name_of(func._schema)
        if self._theirs.get(name, ()) is not None or name in RENAMED:
            return None
        return composites.parts_here(func)

    def translate(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Call:
        """The encoded call as the worker's release takes it. Raises :class:`~.prediction.Unsupported`."""
        name = name_of(func._schema)
        if name not in self._theirs:
            return name, args, kwargs
        theirs = self._theirs[name]
        if theirs is None:
            if name in RENAMED:
                there, passed = RENAMED[name]
                return there, *passed(args, kwargs)
            raise self._refused(name, "has no such operator")
        ours = describe(func._schema)
        if theirs[1] != ours[1]:
            raise self._refused(name, "returns other results")
        return name, *self._arguments(name, func, ours[0], theirs[0], args, kwargs)

    def _arguments(
        self,
        name: str,
        func: Any,
        ours: list[Argument],
        theirs: list[Argument],
        args: list[Any],
        kwargs: dict[str, Any],
    ) -> tuple[list[Any], dict[str, Any]]:
        places = {argument[0]: k for k, argument in enumerate(theirs)}
        given = {ours[k][0]: value for k, value in enumerate(args)} | kwargs
        passed: list[Any] = []
        named: dict[str, Any] = {}
        taken: set[str] = set()
        for k, (own, type_, default, _) in enumerate(ours):
            there = places.get(own)
            if there is None and k < len(theirs) and theirs[k][1] == type_ and not self._has(ours, theirs[k]):
                there = k  # it has another name there
            if own in given:
                value = given[own]
            elif default and there is not None and theirs[there][2] != default:
                value = _default(func, k)  # what is left out means another value there
                if value is _NONE:
                    raise self._refused(name, f"has another default of the argument {own!r}")
            else:
                if there is not None:
                    taken.add(theirs[there][0])
                continue
            if there is None:
                if value != _default(func, k):
                    raise self._refused(name, f"has no argument {own!r}")
                continue
            if theirs[there][1] != type_:
                raise self._refused(name, f"takes {theirs[there][1]} as {own!r}, not {type_}")
            taken.add(theirs[there][0])
            if there == len(passed) and not theirs[there][3] and not named:
                passed.append(value)
            else:
                named[theirs[there][0]] = value
        missing = [a[0] for a in theirs if not a[2] and a[0] not in taken]
        if missing:
            raise self._refused(name, f"needs an argument {missing[0]!r}")
        return passed, named

    @staticmethod
    def _has(arguments: list[Argument], other: Argument) -> bool:
        return any(argument[0] == other[0] for argument in arguments)

    def _refused(self, name: str, why: str) -> Unsupported:
        return Unsupported(
            f"{name} cannot be called as in PyTorch {torch.__version__}, which this process has: PyTorch "
            f"{self._release} on the GPU server {why}; compute it on the CPU, or install the same release on both"
        )


_NONE = object()


def _default(func: Any, k: int) -> Any:
    """The default of argument ``k``, encoded; ``_NONE`` for one that cannot be."""
    argument = func._schema.arguments[k]
    if not argument.has_default_value():
        return _NONE
    value = argument.default_value
    try:
        return (
            ["l", [encode_constant(v) for v in value]] if isinstance(value, list) else encode_constant(value)
        )
    except Unsupported:
        return _NONE


@functools.cache
def _own_digests() -> dict[str, str]:
    return digests(all_schemas())


def compare(stream: CommandStream, release: str) -> SchemaDifferences | None:
    """What differs from the worker's operators, whose PyTorch is ``release``; None for the same release."""
    if release.partition("+")[0] == torch.__version__.partition("+")[0]:
        return None
    answer = stream.ask((SCHEMAS, _own_digests()))
    tensor.lacking_dtypes |= dtypes(torch) - set(answer["dtypes"])
    return SchemaDifferences(answer["operators"], release)
