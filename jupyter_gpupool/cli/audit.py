"""``gpupool audit``"""

from __future__ import annotations

import time

from ..pool.audit import MOST
from ..pool.tokens import date
from .base import Command
from .namespace import seconds
from .options import Parser, UsageError
from .table import table


class AuditApp(Command):
    name = "audit"
    description = "Who asked the pool for what, and what came of it; for its administrator."
    examples = "  gpupool audit --since 2d\n  gpupool audit --limit 1000 --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--since", metavar="TIME", type=seconds, help="so long ago at most: 90m, 12h, 2d")
        parser.add_argument("--limit", metavar="N", type=int, default=50, help="the newest N (default: 50)")

    def check(self) -> None:
        if not 1 <= self.args.limit <= MOST:
            raise UsageError(f"--limit is a number from 1 to {MOST}")

    def act(self) -> int:
        since = 0.0 if self.args.since is None else time.time() - self.args.since
        entries = self.pool()[0].audit(since, self.args.limit)
        if self.args.json:
            self.print_json({"entries": entries})
        elif not entries:
            print("Nobody asked for anything")
        else:
            head = ["AT", "WHO", "NAMESPACE", "ACTION", "WHAT", "OUTCOME"]
            print(table(head, [_row(entry) for entry in entries]))
        return 0


def _row(entry: dict) -> list[str]:
    who = entry["actor"] or "(the pool)"
    return [date(entry["at"]), who, entry["namespace"], entry["action"], entry["subject"], entry["outcome"]]
