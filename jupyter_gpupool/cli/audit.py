"""``gpupool audit``"""

from __future__ import annotations

import time
from typing import Any

from jupyter_gpupool.core.api import MAX_AUDIT_ENTRIES
from jupyter_gpupool.core.durations import format_time

from .command import Command
from .namespace import seconds
from .options import Parser, UsageError
from .table import table


class AuditApp(Command):
    name = "audit"
    description = (
        "Show the pool's audit log: who requested or changed what, and the outcome. For administrators."
    )
    examples = "  gpupool audit --since 2d\n  gpupool audit --limit 1000 --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "--since", metavar="TIME", type=seconds, help="only entries of the last 90m, 12h, 2d, ..."
        )
        parser.add_argument(
            "--limit", metavar="N", type=int, default=50, help="only the newest N entries (default: 50)"
        )

    def check(self) -> None:
        if not 1 <= self.args.limit <= MAX_AUDIT_ENTRIES:
            raise UsageError(f"--limit must be a number from 1 to {MAX_AUDIT_ENTRIES}")

    def act(self) -> int:
        since = 0.0 if self.args.since is None else time.time() - self.args.since
        entries = self.pool()[0].audit(since, self.args.limit)
        if self.args.json:
            self.print_json({"entries": entries})
        elif not entries:
            print("No entries")
        else:
            head = ["TIME", "USER", "NAMESPACE", "ACTION", "SUBJECT", "OUTCOME"]
            print(table(head, [_row(entry) for entry in entries]))
        return 0


def _row(entry: dict[str, Any]) -> list[str]:
    who = entry["actor"] or "(the pool)"
    return [
        format_time(entry["at"]),
        who,
        entry["namespace"],
        entry["action"],
        entry["subject"],
        entry["outcome"],
    ]
