"""The event of Jupyter Server, from its schema."""

from __future__ import annotations

import yaml

from jupyter_gpupool.jupyter.lease_events import SCHEMA

from .text import table


def markdown() -> str:
    schema = yaml.safe_load(SCHEMA.read_text())
    rows = []
    for name, field in schema["properties"].items():
        kind = field.get("type") or ", ".join("null" if v is None else v for v in field["enum"])
        rows.append((f"`{name}`", kind, field["description"]))
    return f"Schema: `{schema['$id']}`, version {schema['version']}.\n\n{schema['description']}\n\n" + table(
        ["field", "values", "meaning"], rows
    )
