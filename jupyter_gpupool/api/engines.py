"""The engines that a pool may have, by name."""

from __future__ import annotations

from typing import Any

from traitlets.utils.importstring import import_item

#: Name → a class whose ``pool_id`` tells its workers from those of other pools.
ENGINES = {
    "local": "jupyter_gpupool.engines.local.LocalEngine",
    "ray": "jupyter_gpupool.engines.ray.engine.RayEngine",
}


def engine_class(name: str) -> Any:
    """The class of a :class:`~jupyter_gpupool.pool.interfaces.Engine`."""
    return import_item(ENGINES[name])
