"""The figures of the walk through PyTorch's public names, from the JSON that it writes."""

from __future__ import annotations

import json
from pathlib import Path

from .text import table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "conformance" / "names.json"


def markdown() -> str:
    found = json.loads(RESULTS.read_text())
    rows = [
        (
            f"`{row['area']}`",
            str(row["works"]),
            str(row["refused"]),
            str(row["fault"]),
            ", ".join(f"`{name}`" for name in row["refused_names"]),
        )
        for row in found["table"]
    ]
    head = ["names of", "work", "refused", "faults", "what is refused"]
    return f"{table(head, rows)}\n\nPyTorch {found['torch']}."
