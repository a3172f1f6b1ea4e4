"""The result of a health check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

#: In ascending order of severity. ``unknown`` has its reason in ``detail`` and does not count.
STATUSES = ("unknown", "ok", "warning", "failing")


@dataclass(frozen=True)
class Check:
    """One check and its result.

    ``value``, in ``unit``, must be ``bound`` ("at least" or "at most") ``threshold``. ``advice``: what to do if the
    status is not ok. ``server`` and ``gpu`` (a uuid) are empty if the check is about the whole pool.
    """

    name: str
    status: str
    detail: str
    value: float | None = None
    unit: str = ""
    bound: str = ""
    threshold: float | None = None
    advice: str = ""
    server: str = ""
    gpu: str = ""


def from_json(data: Mapping[str, Any]) -> Check:
    """Return the check in an answer of ``GET health``, by this version of the pool or a later one.

    Fields that this version does not have are left out; a status that it does not have becomes ``unknown``.
    """
    known = {name: value for name, value in data.items() if name in Check.__dataclass_fields__}
    check = Check(**known)
    return check if check.status in STATUSES else replace(check, status="unknown")


def worst(checks: Iterable[Check]) -> str:
    """Return the worst status of the checks: ok, warning or failing."""
    return max(
        (check.status for check in checks if check.status != "unknown"), key=STATUSES.index, default="ok"
    )


def graded(
    name: str,
    value: float | None,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    fails_beyond: float | None = None,
    detail: str,
    advice: str,
    unknown: str = "",
    server: str = "",
    gpu: str = "",
) -> Check:
    """Return the check of ``value`` against its threshold.

    Beyond ``at_least`` or ``at_most`` the status is warning, beyond ``fails_beyond`` failing. If ``value`` is None it
    is unknown, with the reason ``unknown``.
    """
    bound = "at least" if at_least is not None else "at most"
    threshold = at_least if at_least is not None else at_most
    if value is None:
        return Check(name, "unknown", unknown, None, unit, bound, threshold, server=server, gpu=gpu)

    def beyond(limit: float | None) -> bool:
        return limit is not None and (value < limit if at_least is not None else value > limit)

    status = "failing" if beyond(fails_beyond) else "warning" if beyond(threshold) else "ok"
    advice = "" if status == "ok" else advice
    return Check(name, status, detail, value, unit, bound, threshold, advice, server, gpu)
