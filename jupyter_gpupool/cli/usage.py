"""``gpupool usage``"""

from __future__ import annotations

import csv
import sys
import time
from typing import Any

from jupyter_gpupool.core.durations import format_time

from .command import Command
from .namespace import seconds
from .options import Parser, UsageError
from .table import table

_BY = ("user", "namespace", "gpu")
_HOURS = ("granted_h", "computing_h", "idle_h", "unknown_h", "parked_h")


class UsageApp(Command):
    name = "usage"
    description = (
        "Report GPU-hours: how many were granted, and in how many of them something computed. A GPU-hour is a whole\n"
        "GPU for an hour, or half of its memory for two. You see your own; administrators see everybody's."
    )
    examples = "  gpupool usage --since 7d --by namespace\n  gpupool usage --by gpu --csv > usage.csv"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "--since",
            metavar="TIME",
            type=seconds,
            help="the last 12h, 7d, 4w, ... (default: 30d, as far as the ledger reaches)",
        )
        parser.add_argument(
            "--by", choices=_BY, default="user", help="what a row is for (default: user)", metavar="WHAT"
        )
        parser.add_argument("--csv", action="store_true", help="print CSV instead of text")

    def check(self) -> None:
        if self.args.csv and self.args.json:
            raise UsageError("give either --csv or --json, not both")

    def act(self) -> int:
        since = None if self.args.since is None else time.time() - self.args.since
        usage = self.pool()[0].usage(self.args.by, since)
        if self.args.json:
            self.print_json(usage)
        elif self.args.csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow([self.args.by, "server_and_index", "leases", *_HOURS])
            writer.writerows(
                [row["name"], row["gpu"], row["leases"], *(row[hours] for hours in _HOURS)]
                for row in usage["rows"]
            )
        else:
            self._print_table(usage)
        return 0

    def _print_table(self, usage: dict[str, Any]) -> None:
        if not usage["rows"]:
            print(f"Nothing was granted since {format_time(usage['since'])}")
            return
        head = [self.args.by.upper(), "LEASES", "GRANTED", "COMPUTING", "IDLE", "UNKNOWN", "PARKED"]
        rows = [
            [row["gpu"] or row["name"], str(row["leases"]), *(f"{row[hours]:.2f}" for hours in _HOURS)]
            for row in usage["rows"]
        ]
        total = [f"{sum(row[hours] for row in usage['rows']):.2f}" for hours in _HOURS]
        if len(rows) > 1:
            # A lease on several GPUs is in several rows.
            leases = "" if self.args.by == "gpu" else str(sum(row["leases"] for row in usage["rows"]))
            rows.append(["(all)", leases, *total])
        print(table(head, rows, right=range(1, len(head))))
        print(f"\nGPU-hours since {format_time(usage['since'])}. {self._unknown(usage)}")

    def _unknown(self, usage: dict[str, Any]) -> str:
        if usage["measured_since"] is None:
            return "Nothing was measured in that time, so it is unknown what computed."
        return f"Unknown: before {format_time(usage['measured_since'])}, and while no pool ran."
