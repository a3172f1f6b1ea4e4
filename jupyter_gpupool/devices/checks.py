"""One health check's outcome. Values only: what is read, and what follows, are said elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: From the best to the worst. ``unknown`` says in ``detail`` why, and speaks neither for nor against.
STATUSES = ("unknown", "ok", "warning", "failing")


@dataclass(frozen=True)
class Check:
    """What was looked at, and what came of it.

    ``value`` is a figure in ``unit``, to be ``bound`` ("at least" or "at most") ``threshold``; ``advice`` says what to
    do where it is not ok. ``server`` and ``gpu`` (a uuid) are empty where it is about the whole pool.
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


def worst(checks: Iterable[Check]) -> str:
    """The status of all of them together: ok, warning or failing."""
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
    """A figure against its threshold: beyond ``at_least`` or ``at_most`` it is a warning, beyond ``fails_beyond``
    it fails. None is unknown, for the reason ``unknown``."""
    bound = "at least" if at_least is not None else "at most"
    threshold = at_least if at_least is not None else at_most
    if value is None:
        return Check(name, "unknown", unknown, None, unit, bound, threshold, server=server, gpu=gpu)

    def beyond(limit: float | None) -> bool:
        return limit is not None and (value < limit if at_least is not None else value > limit)

    status = "failing" if beyond(fails_beyond) else "warning" if beyond(threshold) else "ok"
    advice = "" if status == "ok" else advice
    return Check(name, status, detail, value, unit, bound, threshold, advice, server, gpu)
