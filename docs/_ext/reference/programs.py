"""The table of ``make programs``, from the JSON that it writes."""

from __future__ import annotations

import json
from pathlib import Path

from .text import table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "programs.json"


def markdown() -> str:
    rows = [
        (
            program,
            row["compared"],
            row["result"],
            f"JAX {row['jax']}" if "jax" in row else f"PyTorch {row['torch']}",
        )
        for program, row in json.loads(RESULTS.read_text()).items()
    ]
    return table(["program", "compared", "result", "release"], rows)
