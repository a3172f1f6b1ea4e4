"""``gpupool health``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..api.health import from_json
from ..devices.checks import Check, worst
from . import reach
from .base import Command
from .table import table

_WORDS = {"ok": "ok", "unknown": "?", "warning": "WARN", "failing": "FAIL"}


class HealthApp(Command):
    name = "health"
    description = (
        "Check whether the pool, its GPU servers and the way to them are well: each check with its figure, what it is\n"
        "held against, and what to do. The exit code is 1 when anything fails; warnings and what is unknown do\n"
        "not count."
    )
    lists = True

    def act(self) -> int:
        client, pool = self.pool()
        with client:
            health = client.health()
            found = [from_json(check) for check in health["checks"]]
            found += reach.checks(client.health, client.url, pool)
            found += [
                reach.bandwidth_check(server["name"], None, "up and down") for server in pool["servers"]
            ]
        status = worst(found)
        if self.args.json:
            self.print_json({**health, "status": status, "checks": [asdict(check) for check in found]})
        else:
            print(f"The GPU pool at {client.url} is {_said(status)}; looked at {health['age_s']:g} s ago\n")
            print(picture(found))
        return 1 if status == "failing" else 0


def picture(checks: Sequence[Check]) -> str:
    """A line for each check, and what to do below those that are not ok."""
    head = ["", "CHECK", "SERVER", "FIGURE", "LIMIT", "DETAIL"]
    rows = [
        [
            _WORDS[check.status],
            check.name,
            check.server,
            "" if check.value is None else f"{check.value:g} {check.unit}".strip(),
            ""
            if check.threshold is None
            else f"{'≥' if check.bound == 'at least' else '≤'} {check.threshold:g}",
            check.detail,
        ]
        for check in checks
    ]
    lines = table(head, rows).splitlines()
    told = [lines[0]]
    for check, line in zip(checks, lines[1:]):
        told.append(line)
        if check.advice:
            told.append(f"{'':6}→ {check.advice}")
    return "\n".join(told)


def _said(status: str) -> str:
    return {"ok": "ok", "warning": "ok, with warnings"}.get(status, status)
