"""The health call of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jupyter_gpupool.core.checks import STATUSES

_TEXT = {"type": "string"}
_FIGURE = {"type": ["number", "null"]}

_CHECK: dict[str, Any] = {
    "name": _TEXT,
    "status": {"type": "string", "enum": list(STATUSES)},
    "detail": {**_TEXT, "description": "What was measured, or why it is unknown."},
    "value": {**_FIGURE, "description": "The measured value in `unit`; null where there is none."},
    "unit": _TEXT,
    "bound": {"type": "string", "enum": ["", "at least", "at most"]},
    "threshold": {**_FIGURE, "description": "The limit that `value` is compared with, in `unit`."},
    "advice": {**_TEXT, "description": "What to do if the check is not ok."},
    "server": {**_TEXT, "description": "The GPU server; empty if the check concerns the whole pool."},
    "gpu": {**_TEXT, "description": "The GPU's uuid; empty if the check concerns no GPU."},
}
SCHEMAS: dict[str, Any] = {
    "Check": {"type": "object", "required": list(_CHECK), "properties": _CHECK},
    "Health": {
        "type": "object",
        "required": ["status", "time", "age_s", "checks"],
        "properties": {
            "status": {
                "type": "string",
                "enum": [status for status in STATUSES if status != "unknown"],
                "description": "The worst status of all checks.",
            },
            "time": {
                "type": "number",
                "description": "The time of the pool's clock, in seconds since the epoch.",
            },
            "age_s": {"type": "number", "minimum": 0, "description": "Seconds since the checks were made."},
            "checks": {"type": "array", "items": {"$ref": "#/components/schemas/Check"}},
        },
    },
}


def paths(answers: Callable[..., dict[str, Any]], schema: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return the call's description.

    A pool with a failing check answers 503 with its health, one that is not available with an error.
    """
    either = {"anyOf": [schema(name)["application/json"]["schema"] for name in ("Health", "Error")]}
    responses = answers("No check is failing", "Health", 503)
    responses["503"] = {
        "description": "A check is failing, or the pool does not answer",
        "content": {"application/json": {"schema": either}},
    }
    summary = "Return the results of the health checks, which run in the background"
    return {"/health": {"get": {"operationId": "getHealth", "summary": summary, "responses": responses}}}
