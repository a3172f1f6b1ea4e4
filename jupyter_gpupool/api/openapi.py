"""The OpenAPI 3.1 description of the pool's HTTP interface."""

from __future__ import annotations

from typing import Any

from .. import __version__
from . import openapi_health, openapi_tenants

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER_OR_NULL = {"type": ["number", "null"]}

_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["id"],
    "additionalProperties": False,
    "properties": {
        "id": {
            "type": "string",
            "format": "uuid",
            "description": "Chosen by the client; repeating it is harmless.",
        },
        "num_gpus": {"type": "integer", "minimum": 1, "default": 1},
        "partial": {
            "type": ["number", "null"],
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "Share of each GPU.",
        },
        "memory_mib": {
            "type": ["integer", "null"],
            "minimum": 1,
            "description": "MiB of each GPU, instead of partial.",
        },
        "filters": {"type": "object", "additionalProperties": _TEXT},
        "spread": {"type": "boolean", "default": False, "description": "The GPUs may be of several servers."},
        "namespace": _TEXT,
        "wait": {"type": "boolean", "default": True, "description": "Queue if it cannot be met now."},
        "secret_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "label": _TEXT,
        "client": _TEXT,
    },
}

_RESIZE = {
    "type": "object",
    "additionalProperties": False,
    "description": "Exactly one of partial, memory_mib and extend_s; num_gpus may repeat what the lease has.",
    "properties": {
        **{name: _REQUEST["properties"][name] for name in ("num_gpus", "partial", "memory_mib")},
        "extend_s": {"type": "number", "exclusiveMinimum": 0, "description": "So many more seconds."},
    },
}

_DRAIN = {
    "type": "object",
    "required": ["draining"],
    "additionalProperties": False,
    "properties": {"draining": {"type": "boolean"}},
}

_SLICE = {
    "type": "object",
    "properties": {
        "gpu_uuid": _TEXT,
        "server": _TEXT,
        "index": _COUNT,
        "name": _TEXT,
        "memory_mib": _COUNT,
        "total_mib": _COUNT,
        "emulated": {"type": "boolean"},
    },
}

_STATES = ["QUEUED", "GRANTED", "ACTIVE", "PARKED", "RELEASED", "EXPIRED", "LOST", "CANCELLED"]

_LEASE = {
    "type": "object",
    "required": ["id", "state", "request", "slices"],
    "properties": {
        "id": _TEXT,
        "state": {"type": "string", "enum": _STATES},
        "reason": _TEXT,
        "request": {
            "type": "object",
            "description": "As it was asked for, with its owner and without its secret.",
        },
        "slices": {"type": "array", "items": {"$ref": "#/components/schemas/Slice"}},
        "worker": {"type": ["object", "null"]},
        "workers": {
            "type": "object",
            "description": "Of a lease that spans servers: the worker on each, by the server's name.",
            "additionalProperties": {"type": "object"},
        },
        "position": {"type": ["integer", "null"], "description": "Place in the queue, from 1."},
        "created_at": {"type": "number"},
        "granted_at": _NUMBER_OR_NULL,
        "ended_at": _NUMBER_OR_NULL,
        "heartbeat_at": {"type": "number"},
        "ttl_s": {"type": "number"},
        "waits_for": {**_TEXT, "description": "The limit that a queued request waits for."},
        "expires_at": {**_NUMBER_OR_NULL, "description": "When its time is over."},
        "idle_since": {**_NUMBER_OR_NULL, "description": "Since when it computes nothing."},
        "asked_back": {
            "type": "array",
            "description": "Who would like to have it.",
            "items": {
                "type": "object",
                "properties": {"by": _TEXT, "at": {"type": "number"}, "message": _TEXT},
            },
        },
    },
}


def _column(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": [kind, "null"]}}


_COLUMNS = {
    "memory_mib": _column("integer"),
    "granted_mib": _column("integer"),
    "used_mib": _column("integer"),
    "busy": _column("number"),
}

_HISTORY = {
    "type": "object",
    "required": ["since", "until", "step", "times", "gpus", *_COLUMNS],
    "properties": {
        "since": {"type": "number"},
        "until": {"type": "number"},
        "step": {"type": "integer", "minimum": 1},
        "times": {"type": "array", "items": {"type": "integer"}},
        **_COLUMNS,
        "gpus": {
            "type": "object",
            "additionalProperties": {"type": "object", "properties": _COLUMNS},
        },
    },
}

_FORECAST = {
    "type": "object",
    "required": ["outcome", "position", "reason", "slices"],
    "properties": {
        "outcome": {"type": "string", "enum": ["granted", "queued", "impossible"]},
        "position": {"type": ["integer", "null"], "description": "Its place in the queue, from 1."},
        "reason": {"type": "string", "description": "Why it is impossible, one line."},
        "slices": {"type": "array", "items": {"$ref": "#/components/schemas/Slice"}},
    },
}

_ERROR = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {"error": _TEXT, "message": _TEXT},
}


def _schema(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


#: Whoever calls, and whatever for.
_ALWAYS = (400, 401, 403, 429, 503)


def _answers(
    description: str, schema: str | None = None, *refusals: int, status: int = 200
) -> dict[str, Any]:
    good: dict[str, Any] = {"description": description}
    good["content"] = _schema(schema) if schema else {"application/json": {"schema": {"type": "object"}}}
    meanings = {
        400: "The request makes no sense by itself.",
        401: "No token, an unknown one, or one that is not valid any more.",
        403: "The caller may not do that.",
        404: "There is none of that id, or it is not the caller's; or this pool has no such call.",
        409: "It cannot be met now and would not wait, or the id is taken.",
        410: "The lease has ended.",
        422: "This pool can never grant it.",
        429: "Too many wrong tokens, or too much of something else; the text says what to do.",
        503: "The ledger or the engine is not available; nothing was changed.",
    }
    refused = {
        str(code): {"description": meanings[code], "content": _schema("Error")}
        for code in (*_ALWAYS, *refusals)
    }
    return {str(status): good, **refused}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
_WAIT = _query("wait", {"type": "number", "minimum": 0}, "Seconds to wait for a change, at most 30.")


_EXPIRES = {
    "type": ["number", "null"],
    "exclusiveMinimum": 0,
    "description": "Seconds from now on; null for ever.",
}
_NEW_TOKEN: dict[str, Any] = {
    "type": "object",
    "required": ["description"],
    "additionalProperties": False,
    "properties": {
        "description": {"type": "string", "minLength": 1, "maxLength": 200},
        "owner": {
            "type": "string",
            "maxLength": 200,
            "description": "Whose leases it sees; default: its own.",
        },
        "namespace": _TEXT,
        "administers": {"type": "boolean", "default": False},
        "expires_s": _EXPIRES,
    },
}
_LIFE = {"type": "object", "additionalProperties": False, "properties": {"expires_s": _EXPIRES}}
_TOKEN: dict[str, Any] = {
    "type": "object",
    "required": ["id", "description", "owner", "namespace", "administers", "created_at", "state"],
    "properties": {
        **dict.fromkeys(("id", "description", "owner", "namespace"), _TEXT),
        "administers": {"type": "boolean"},
        "created_at": {"type": "number"},
        "expires_at": _NUMBER_OR_NULL,
        "revoked_at": _NUMBER_OR_NULL,
        "last_used_at": _NUMBER_OR_NULL,
        "cuts_leases": {"type": "boolean"},
        "state": {"type": "string", "enum": ["valid", "expired", "revoked"]},
    },
}
_TOKEN_MADE = {
    **_TOKEN,
    "required": [*_TOKEN["required"], "token", "files"],
    "properties": {
        **_TOKEN["properties"],
        "token": {"type": "string", "description": "Told this once."},
        "files": {"type": "object", "additionalProperties": _TEXT, "description": "A client's, by name."},
    },
}
_TOKEN_PATHS: dict[str, Any] = {
    "/tokens": {
        "get": {
            "operationId": "listTokens",
            "summary": "A secured pool's tokens; for administrators",
            "responses": _answers("The tokens", None, 404),
        },
        "post": {
            "operationId": "createToken",
            "summary": "Admit somebody; `Accept: application/x-tar` asks for the bundle itself",
            "requestBody": {"required": True, "content": _schema("NewToken")},
            "responses": _answers("The token, and a client's files", "TokenMade", 404, status=201),
        },
    },
    "/tokens/{id}": {
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": _TEXT}],
        "patch": {
            "operationId": "extendToken",
            "summary": "Valid for so long from now on",
            "requestBody": {"required": True, "content": _schema("Life")},
            "responses": _answers("The token", "Token", 404),
        },
        "delete": {
            "operationId": "revokeToken",
            "summary": "Admit it no more, for good",
            "parameters": [
                _query("end_leases", {"type": "string", "enum": ["0", "1"]}, "End its leases, too.")
            ],
            "responses": _answers("The token", "Token", 404),
        },
    },
}


def document() -> dict[str, Any]:
    """The whole description as a JSON-ready dictionary."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "GPU pool",
            "version": __version__,
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "servers": [
            {"url": "/gpupool/api/v1", "description": "Below Jupyter Server's base URL, if there is one."}
        ],
        "security": [{"token": []}],
        "paths": {
            "/pool": {
                "get": {
                    "operationId": "getPool",
                    "summary": "Servers, GPUs, slices, queue",
                    "responses": _answers("The pool", None, 503),
                }
            },
            "/history": {
                "get": {
                    "operationId": "getHistory",
                    "summary": "Utilisation over time, for a chart: columns over a regular grid, null in gaps",
                    "parameters": [
                        _query("since", {"type": "number"}, "Seconds since the epoch; default: an hour ago."),
                        _query(
                            "step",
                            {"type": "number", "minimum": 1},
                            "Seconds; more where samples are coarser.",
                        ),
                        _query(
                            "gpu",
                            {"type": "array", "items": _TEXT},
                            "Of these GPUs as well, by uuid; `all` for all.",
                        ),
                    ],
                    "responses": _answers("The series", "History", 400, 503),
                }
            },
            "/forecast": {
                "get": {
                    "operationId": "forecast",
                    "summary": "What a request would come to if it were made now; nothing is recorded",
                    "parameters": [
                        _query("num_gpus", _COUNT, "How many GPUs; default: 1."),
                        _query("partial", {"type": "number"}, "Share of each GPU."),
                        _query("memory_mib", _COUNT, "MiB of each GPU, instead of partial."),
                        _query(
                            "filter", {"type": "array", "items": _TEXT}, "As `name=V100`; may be repeated."
                        ),
                        _query("spread", {"type": "string", "enum": ["0", "1"]}, "1: of several servers, too."),
                        _query("namespace", _TEXT, "Default: default."),
                    ],
                    "responses": _answers("The forecast", "Forecast", 400, 503),
                }
            },
            "/servers/{name}": {
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": _TEXT},
                ],
                "patch": {
                    "operationId": "drain",
                    "summary": "For administrators: place nothing new on a GPU server, or place on it again",
                    "requestBody": {"required": True, "content": _schema("Drain")},
                    "responses": _answers("As it is now", None, 400, 403, 404, 503),
                },
            },
            "/events": {
                "get": {
                    "operationId": "watch",
                    "summary": "A WebSocket: the state, then deltas, at the latest each second",
                    "parameters": [
                        _query("feed", _TEXT, "After a lost connection: the feed of the last state."),
                        _query("seq", _COUNT, "And the number of the last message."),
                    ],
                    "responses": {"101": {"description": "Switching to WebSocket"}},
                }
            },
            "/leases": {
                "get": {
                    "operationId": "listLeases",
                    "summary": "Leases that have not ended; with all=1 also those that have",
                    "parameters": [_query("all", {"type": "string", "enum": ["0", "1"]}, "Ended ones too.")],
                    "responses": _answers("Leases, oldest first", None, 503),
                },
                "post": {
                    "operationId": "requestLease",
                    "summary": "Request slices",
                    "parameters": [_WAIT],
                    "requestBody": {"required": True, "content": _schema("Request")},
                    "responses": {
                        **_answers("Granted", "Lease", 400, 409, 422, 503, status=201),
                        "202": {"description": "Queued, or ended already", "content": _schema("Lease")},
                    },
                },
            },
            "/leases/{id}": {
                "parameters": [_ID],
                "get": {
                    "operationId": "getLease",
                    "summary": "One lease, now or when it changes",
                    "parameters": [
                        _WAIT,
                        _query("state", {"type": "string", "enum": _STATES}, "The state the caller knows."),
                        _query("position", {"type": "integer"}, "The place in the queue the caller knows."),
                    ],
                    "responses": _answers("The lease", "Lease", 404, 503),
                },
                "patch": {
                    "operationId": "resizeLease",
                    "summary": "More time, or another share of the same GPUs: answered when the worker keeps to it",
                    "requestBody": {"required": True, "content": _schema("Resize")},
                    "responses": _answers("The lease", "Lease", 400, 404, 409, 410, 422, 503),
                },
                "delete": {
                    "operationId": "releaseLease",
                    "summary": "Release or cancel",
                    "responses": _answers("The lease, ended", "Lease", 404, 503),
                },
            },
            "/leases/{id}/heartbeat": {
                "parameters": [_ID],
                "post": {
                    "operationId": "heartbeat",
                    "summary": "Keep a lease alive",
                    "responses": _answers("The lease", "Lease", 404, 410, 503),
                },
            },
            **openapi_tenants.paths(_answers, _schema, _query),
            **openapi_health.paths(_answers, _schema),
            **_TOKEN_PATHS,
            "/openapi.json": {
                "get": {
                    "operationId": "getDescription",
                    "summary": "This document",
                    "responses": _answers("OpenAPI 3.1"),
                }
            },
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Forecast": _FORECAST,
                "History": _HISTORY,
                "Request": _REQUEST,
                "Resize": _RESIZE,
                "Drain": _DRAIN,
                "Slice": _SLICE,
                "Lease": _LEASE,
                "Token": _TOKEN,
                "NewToken": _NEW_TOKEN,
                "TokenMade": _TOKEN_MADE,
                "Life": _LIFE,
                "Error": _ERROR,
                **openapi_health.SCHEMAS,
                **openapi_tenants.SCHEMAS,
            },
        },
    }
