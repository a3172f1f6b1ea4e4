"""The figures of JAX's own tests, from the JSON that ``python -m benchmarks.conformance.jax_suite`` writes."""

from __future__ import annotations

import json
from pathlib import Path

from .text import table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "conformance" / "jax.json"


def markdown() -> str:
    found = json.loads(RESULTS.read_text())
    rows = [
        (
            f"`{row['file']}`",
            f"{row['share']:.1%}",
            f"{row['most_cases_of_a_test']}",
            f"{row['slices']}",
            f"{row['cpu_passes']:,}",
            f"{row['passed']:,} ({row['passed_percent']} %)",
            f"{sum(row['refused'].values()):,}",
            f"{row['failed']:,}",
        )
        for row in found["files"]
    ]
    head = [
        "tests",
        "sample",
        "cases",
        "slices",
        "the CPU passes",
        "passed",
        "refused, with a reason",
        "failed",
    ]
    reasons = sorted({reason for row in found["files"] for reason in row["refused"]})
    refused = "\n".join(f"- {reason}" for reason in reasons)
    about = f"JAX {found['jax']}; of each test at most so many cases."
    return f"{table(head, rows)}\n\n{about}" + (f"\n\nRefused:\n\n{refused}" if reasons else "")
