"""``gpupool health``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from jupyter_gpupool.core.checks import Check, from_json, worst

from . import network_checks
from .command import Command
from .table import table

_WORDS = {"ok": "ok", "unknown": "?", "warning": "WARN", "failing": "FAIL"}


class HealthApp(Command):
    name = "health"
    description = (
        "Check the health of the pool, its GPU servers and the network between. Each check shows its value, its limit\n"
        "and what to do. The exit code is 1 if any check fails; warnings and unknown results do not count."
    )
    lists = True

    def act(self) -> int:
        client, pool = self.pool()
        with client:
            health = client.health()
            found = [from_json(check) for check in health["checks"]]
            found += network_checks.checks(client.health, client.url, pool)
            found += [
                network_checks.bandwidth_check(server["name"], None, "up and down")
                for server in pool["servers"]
            ]
        status = worst(found)
        if self.args.json:
            self.print_json({**health, "status": status, "checks": [asdict(check) for check in found]})
        else:
            print(
                f"The GPU pool at {client.url} is {_status_text(status)}; checked {health['age_s']:g} s ago\n"
            )
            print(picture(found))
        return 1 if status == "failing" else 0


def picture(checks: Sequence[Check]) -> str:
    """Return a line for each check, with the advice below each that is not ok."""
    head = ["", "CHECK", "SERVER", "VALUE", "LIMIT", "DETAIL"]
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
    shown = [lines[0]]
    for check, line in zip(checks, lines[1:]):
        shown.append(line)
        if check.advice:
            shown.append(f"{'':6}→ {check.advice}")
    return "\n".join(shown)


def _status_text(status: str) -> str:
    return {"ok": "ok", "warning": "ok, with warnings"}.get(status, status)
