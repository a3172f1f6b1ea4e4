"""The limits that a worker sets itself, before it serves anybody: it cannot raise them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .control_groups import join
from .limits import MAX_OPEN_FILES, Limits


def to_json(limits: Limits, group: str) -> dict[str, Any]:
    """Return what :func:`enter` takes. ``group``: the path of the worker's control group, empty without one."""
    return {"group": group, "data_mib": limits.data_mib, "disk_mib": limits.disk_mib}


def enter(bounds: Mapping[str, Any]) -> None:
    """Limit this process, and what it starts. Raises OSError if it cannot be put into its group."""
    import resource  # an import of this module alone, as by a client's command, is to work without it

    if bounds.get("group"):
        join(bounds["group"])
    _lower(resource.RLIMIT_CORE, 0)  # a crash would write all of its memory, its tenant's data included
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if bounds.get("disk_mib"):
        _lower(resource.RLIMIT_FSIZE, bounds["disk_mib"] << 20)
    if bounds.get("data_mib"):
        _lower(resource.RLIMIT_DATA, bounds["data_mib"] << 20)


def _lower(which: int, value: int) -> None:
    import resource

    _, hard = resource.getrlimit(which)
    lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (lowest, lowest))
