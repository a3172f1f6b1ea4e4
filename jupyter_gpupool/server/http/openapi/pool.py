"""The schemas of the pool's state and of the feed of its changes, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_BUSY = {
    "type": "number",
    "minimum": 0,
    "maximum": 1,
    "description": "Fraction of the last seconds in which the GPU computed.",
}
_TEXT_OR_NULL = {"type": ["string", "null"], "description": "Null where the caller may not see the holder."}
_TIME = {"type": "number", "description": "In seconds since the epoch."}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _type(name: str) -> dict[str, Any]:
    return {"type": "string", "const": name}


def _by_id(*of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of[0] if len(of) == 1 else {"anyOf": list(of)}}


def _shape(description: str, properties: dict[str, Any], optional: bool = False) -> dict[str, Any]:
    shape = {"type": "object", "description": description, "properties": properties}
    return shape if optional else {**shape, "required": list(properties)}


_GPU_SLICE: dict[str, Any] = {
    "lease": _TEXT_OR_NULL,
    "owner": _TEXT_OR_NULL,
    "label": _TEXT,
    "memory_mib": _COUNT,
    "used_mib": _COUNT,
    "overhead_mib": {
        **_COUNT,
        "description": "What of the used memory is for no tensor, but for CUDA itself.",
    },
    "busy": _BUSY,
    "frameworks": {
        "type": "array",
        "items": _TEXT,
        "description": "What programs use it by now: `torch`, `jax`.",
    },
    "state": _ref("LeaseState"),
}

_GPU: dict[str, Any] = {
    "uuid": _TEXT,
    "server": _TEXT,
    "index": _COUNT,
    "name": _TEXT,
    "memory_mib": {**_COUNT, "description": "The memory that the pool may grant."},
    "emulated": {"type": "boolean"},
    "healthy": {"type": "boolean", "description": "If false, the GPU gets no new slices."},
    "taken_mib": {**_COUNT, "description": "The memory that programs outside the pool use now."},
    "trouble": {**_TEXT, "description": "Why the GPU is not healthy."},
    "granted_mib": _COUNT,
    "used_mib": _COUNT,
    "busy": _BUSY,
    "slices": {"type": "array", "items": _ref("GPUSlice")},
}

_SERVER: dict[str, Any] = {
    "name": _TEXT,
    "host": _TEXT,
    "draining": {"type": "boolean", "description": "The server gets no new slices."},
}
_UUIDS = {"type": "array", "items": _TEXT, "description": "The uuids of its GPUs."}

_QUEUE = {
    "type": "array",
    "items": {"type": ["string", "null"]},
    "description": "The ids of the queued requests, in order; null for one that the caller may not see.",
}
_HEALTHY = {"type": "boolean", "description": "Whether no health check is failing."}

_SEQ = {**_COUNT, "description": "The message's number in its feed."}
_FEED = {**_TEXT, "description": "The feed's id."}

SCHEMAS: dict[str, Any] = {
    "GPUSlice": {
        **_shape("A lease's part of one GPU, with the fields that every user may see.", _GPU_SLICE),
        "required": [
            name for name in _GPU_SLICE if name not in ("frameworks", "overhead_mib")
        ],  # as in older pools
    },
    "GPU": _shape("A GPU and its slices.", _GPU),
    "GPUChange": _shape("The changed fields of a GPU; all fields of a new GPU.", _GPU, optional=True),
    "Pool": _shape(
        "The pool's state at one instant.",
        {
            "version": _TEXT,
            "servers": {
                "type": "array",
                "items": _shape(
                    "A machine with GPUs.", {**_SERVER, "gpus": {"type": "array", "items": _ref("GPU")}}
                ),
            },
            "queue": _QUEUE,
            "healthy": _HEALTHY,
        },
    ),
    "Server": _shape("A machine with GPUs, as the feed sends it.", {**_SERVER, "gpus": _UUIDS}),
    "StateMessage": _shape(
        "The first message of a feed: the whole state.",
        {
            "type": _type("state"),
            "feed": _FEED,
            "seq": _SEQ,
            "at": _TIME,
            "servers": {"type": "array", "items": _ref("Server")},
            "gpus": _by_id(_ref("GPU")),
            "leases": _by_id(_ref("Lease")),
            "queue": _QUEUE,
            "healthy": _HEALTHY,
        },
    ),
    "DeltaMessage": {
        "type": "object",
        "description": "What has changed since the message before; null for what was removed.",
        "required": ["type", "seq", "at"],
        "properties": {
            "type": _type("delta"),
            "seq": _SEQ,
            "at": _TIME,
            "servers": {"type": "array", "items": _ref("Server")},
            "gpus": _by_id(_ref("GPUChange"), {"type": "null"}),
            "leases": _by_id(_ref("Lease"), {"type": "null"}),
            "queue": _QUEUE,
            "healthy": _HEALTHY,
        },
    },
    "ResumedMessage": _shape(
        "The answer to a resumed feed: the missed deltas follow.",
        {"type": _type("resumed"), "feed": _FEED, "seq": _SEQ, "at": _TIME},
    ),
}
