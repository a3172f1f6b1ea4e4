"""The engines that a pool may have, by name: the entry points of the group ``jupyter_gpupool.engines``.

A package adds an engine by an entry point ``name = "module:Class"`` of that group. The engines of this package are
registered the same way, and are also listed here, so that they exist in a source tree that was never installed.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from traitlets.utils.importstring import import_item

from jupyter_gpupool.core.errors import EngineError

#: The entry-point group of engines.
GROUP = "jupyter_gpupool.engines"

#: The engines of this package. They win over entry points, which an old installation may have left.
_BUILT_IN = {
    "local": "jupyter_gpupool.engines.local.engine:LocalEngine",
    "ray": "jupyter_gpupool.engines.ray.engine:RayEngine",
}


def find_engines() -> dict[str, str]:
    """``module:Class`` of every engine by name, this package's first. Loads none of them."""
    found = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    others = {name: found[name] for name in sorted(found.keys() - _BUILT_IN.keys())}
    return {**_BUILT_IN, **others}


#: Name → ``module:Class`` whose ``pool_id`` distinguishes its workers from those of other pools.
ENGINES = find_engines()


def engine_class(name: str) -> Any:
    """The class of a :class:`~jupyter_gpupool.core.engine.Engine`. Raises EngineError if it cannot be loaded."""
    if name not in ENGINES:
        raise EngineError(f"there is no engine {name!r}; installed are {', '.join(ENGINES)}")
    try:
        return import_item(ENGINES[name].replace(":", "."))
    except ImportError as e:
        raise EngineError(f"the engine {name!r} ({ENGINES[name]}) cannot be loaded: {e}") from e
