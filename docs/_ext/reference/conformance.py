"""The figures of ``make conformance``, from the JSON that it writes."""

from __future__ import annotations

import json
from pathlib import Path

from .text import table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "conformance" / "results.json"


def markdown() -> str:
    found = json.loads(RESULTS.read_text())
    rows = [
        (
            row["kind"],
            row["dtypes"],
            f"{row['samples']:,}",
            f"{row['passed']:,} ({row['passed_percent']} %)",
            f"{row['refused']:,}",
            f"{row['failed']:,}",
        )
        for row in found["table"]
    ]
    limit = found["most_samples_of_a_kind_and_dtype"]
    which = "Every sample" if limit is None else f"At most {limit} samples of each kind and dtype"
    head = ["samples", "dtypes", "number", "passed", "refused, with a reason", "failed"]
    return (
        f"{table(head, rows)}\n\n{which} of each of the {found['entries']} entries, PyTorch {found['torch']}."
    )
