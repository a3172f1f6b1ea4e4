"""The schemas of leases and their parts, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from jupyter_gpupool.core import request_schema
from jupyter_gpupool.core.models import LeaseState

STATES = [state.value for state in LeaseState]

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_TIME = {"type": "number", "description": "In seconds since the epoch."}
_TIME_OR_NULL = {"type": ["number", "null"], "description": "In seconds since the epoch; null if not yet."}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_RECORDED_REQUEST: dict[str, Any] = {
    **request_schema.schema(request_schema.RECORDED),
    "owner": _TEXT,
}

_SLICE: dict[str, Any] = {
    "gpu_uuid": _TEXT,
    "server": _TEXT,
    "index": _COUNT,
    "name": _TEXT,
    "memory_mib": _COUNT,
    "total_mib": _COUNT,
    "emulated": {"type": "boolean"},
}

_WORKER: dict[str, Any] = {
    "host": _TEXT,
    "port": _COUNT,
    "pid": {"type": "integer"},
    "created": {"type": "number"},
}

_PARKED: dict[str, Any] = {
    "memory_mib": {**_COUNT, "description": "The host memory that is kept for it."},
    "since": _TIME,
    "wanted_since": {
        "type": ["number", "null"],
        "description": "Since when its program has waited for its GPUs; null while it needs none.",
    },
}

_ASKED_BACK: dict[str, Any] = {"by": _TEXT, "at": _TIME, "message": _TEXT}

#: The fields that every lease has, wherever it is sent.
_ALWAYS: dict[str, Any] = {
    "id": _TEXT,
    "state": _ref("LeaseState"),
    "reason": _TEXT,
    "request": _ref("RecordedRequest"),
    "slices": {"type": "array", "items": _ref("Slice")},
    "worker": {"anyOf": [_ref("Worker"), {"type": "null"}]},
    "environment": {
        **_TEXT,
        "description": "The environment of the GPU server that its worker runs in; empty without a worker.",
    },
    "torch": {**_TEXT, "description": "The release of PyTorch there."},
    "position": {"type": ["integer", "null"], "description": "Position in the queue, from 1."},
    "created_at": _TIME,
    "granted_at": _TIME_OR_NULL,
    "ended_at": _TIME_OR_NULL,
    "ttl_s": {"type": "number"},
    "waits_for": {**_TEXT, "description": "The limit that a queued request waits for."},
    "expires_at": {"type": ["number", "null"], "description": "When the lease ends; null for no limit."},
    "idle_since": {
        "type": ["number", "null"],
        "description": "Since when the lease has been idle; null while it computes.",
    },
    "asked_back": {
        "type": "array",
        "description": "The requests by other users to release this lease.",
        "items": _ref("AskedBack"),
    },
    "parked": {
        "anyOf": [_ref("Parked"), {"type": "null"}],
        "description": "Set while the lease is parked; its slices are then those that it held.",
    },
    "moving_to": {
        "type": "array",
        "description": "While it is moved: all slices that it is to have. Those on another server it holds as well.",
        "items": _ref("Slice"),
    },
}

SCHEMAS: dict[str, Any] = {
    "LeaseState": {"type": "string", "enum": STATES},
    "RecordedRequest": {
        "type": "object",
        "description": "A request as it was made, with its owner and without its secret.",
        "required": list(_RECORDED_REQUEST),
        "properties": _RECORDED_REQUEST,
    },
    "Slice": {
        "type": "object",
        "description": "A part of one GPU's memory that one lease holds.",
        "required": list(_SLICE),
        "properties": _SLICE,
    },
    "Worker": {
        "type": "object",
        "description": "The address and the process of a lease's worker.",
        "required": list(_WORKER),
        "properties": _WORKER,
    },
    "Parked": {
        "type": "object",
        "description": "A lease whose state is in host memory while others have its GPUs.",
        "required": list(_PARKED),
        "properties": _PARKED,
    },
    "AskedBack": {
        "type": "object",
        "description": "A request by another user that a lease be released.",
        "required": list(_ASKED_BACK),
        "properties": _ASKED_BACK,
    },
    "Lease": {
        "type": "object",
        "description": "A request and its state.",
        "required": list(_ALWAYS),
        "properties": {
            **_ALWAYS,
            "workers": {
                "type": "object",
                "description": "The worker on each server of a lease that spans servers, by the server's name.",
                "additionalProperties": _ref("Worker"),
            },
            "heartbeat_at": {**_TIME, "description": "When the last heartbeat arrived; not in the feed."},
        },
    },
    "Leases": {
        "type": "object",
        "required": ["leases"],
        "properties": {"leases": {"type": "array", "items": _ref("Lease")}},
    },
}
