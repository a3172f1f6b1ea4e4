"""Of the OpenAPI description what is about health."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..devices.checks import STATUSES

_TEXT = {"type": "string"}
_FIGURE = {"type": ["number", "null"]}

_CHECK = {
    "type": "object",
    "required": ["name", "status", "detail"],
    "properties": {
        "name": _TEXT,
        "status": {"type": "string", "enum": list(STATUSES)},
        "detail": {**_TEXT, "description": "What was seen; of what is unknown, why."},
        "value": {**_FIGURE, "description": "In `unit`; null where there is no figure."},
        "unit": _TEXT,
        "bound": {"type": "string", "enum": ["", "at least", "at most"]},
        "threshold": {**_FIGURE, "description": "What `value` is held against, in `unit`."},
        "advice": {**_TEXT, "description": "What to do where it is not ok."},
        "server": {**_TEXT, "description": "Empty where it is about the whole pool."},
        "gpu": {**_TEXT, "description": "A GPU's uuid, or empty."},
    },
}
SCHEMAS: dict[str, Any] = {
    "Health": {
        "type": "object",
        "required": ["status", "time", "age_s", "checks"],
        "properties": {
            "status": {
                "type": "string",
                "enum": [status for status in STATUSES if status != "unknown"],
                "description": "The worst of the checks.",
            },
            "time": {"type": "number", "description": "The pool's clock, in seconds since the epoch."},
            "age_s": {"type": "number", "minimum": 0, "description": "Seconds since they were made."},
            "checks": {"type": "array", "items": _CHECK},
        },
    }
}


def paths(answers: Callable[..., dict[str, Any]], schema: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The call. A pool of which something fails answers 503 with what it is, one that cannot be asked with an error."""
    either = {"anyOf": [schema(name)["application/json"]["schema"] for name in ("Health", "Error")]}
    responses = answers("Nothing fails", "Health", 503)
    responses["503"] = {
        "description": "Something fails, or the pool cannot be asked",
        "content": {"application/json": {"schema": either}},
    }
    summary = "Named checks, made in the background"
    return {"/health": {"get": {"operationId": "getHealth", "summary": summary, "responses": responses}}}
