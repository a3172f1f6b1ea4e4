"""The figures of c10d's own tests, from the JSON that ``python -m benchmarks.conformance.collectives`` writes."""

from __future__ import annotations

import json
from pathlib import Path

from .text import table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "conformance" / "collectives.json"
#: Each part of that command, as a page names it.
PARTS = {
    "suite": "PyTorch's tests (`distributed_test.py`)",
    "exchanges": "every collective, operation, dtype, shape and layout",
}


def markdown() -> str:
    found = json.loads(RESULTS.read_text())
    rows = [
        (
            PARTS[row["part"]],
            f"{row['ranks']}",
            f"{row['passed']:,}",
            f"{row['refused']:,}",
            f"{row['failed']:,}",
            f"{row['skipped']:,}",
        )
        for row in found["table"]
    ]
    head = ["tests", "ranks", "passed", "refused, with a reason", "failed", "skipped by PyTorch"]
    refused: dict[str, set[str]] = {}
    for row in found["table"]:
        for why, tests in row["tests"]["refused"].items():
            refused.setdefault(why, set()).update(tests)
    reasons = "\n".join(
        f"- {why}: {', '.join(f'`{t}`' for t in sorted(refused[why]))}" for why in sorted(refused)
    )
    return f"{table(head, rows)}\n\nPyTorch {found['torch']}. Refused:\n\n{reasons}"
