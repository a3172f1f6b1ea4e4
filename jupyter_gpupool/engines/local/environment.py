"""One environment of a GPU server: an interpreter that workers may run in. And which one fits a client best."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """An interpreter, "" for the pool's own; its release of PyTorch, such as ``2.14.1``; and the operators of other
    libraries that are allowed there."""

    name: str
    python: str
    release: str
    operators: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Return the options of the warm parent that runs here."""
        operators = [f"--operators={','.join(self.operators)}"] if self.operators else []
        return [f"--environment={self.name}", *operators]


def fitting(client: str, environments: Collection[Environment]) -> Environment:
    """Return the environment for a client with that release of PyTorch; "": a client that names none.

    The same release is best, then the newest of the same minor release, then the newest of all: operators are
    translated between releases. A client that names none gets the first environment.
    """
    first = next(iter(environments))
    if not client:
        return first
    wanted = _numbers(client)

    def rank(environment: Environment) -> tuple[bool, bool, tuple[int, ...], bool]:
        has = _numbers(environment.release)
        return has == wanted, has[:2] == wanted[:2], has, environment is first

    return max(environments, key=rank)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")) if release else ()
