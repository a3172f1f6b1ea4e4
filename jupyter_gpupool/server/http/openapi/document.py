"""The OpenAPI 3.1 description of the pool's HTTP interface."""

from __future__ import annotations

from typing import Any

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core import request_schema
from jupyter_gpupool.core.models import Scope

from . import health, leases, pool, tenants

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER_OR_NULL = {"type": ["number", "null"]}

_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["id"],
    "additionalProperties": False,
    "properties": request_schema.schema(),
}

_WANTED: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "What a kernelspec, a notebook or a frontend asks for; at most one of partial and memory_mib.",
    "properties": request_schema.schema(request_schema.WANTED),
}

_RESIZE = {
    "type": "object",
    "additionalProperties": False,
    "description": "Exactly one of partial, memory_mib and extend_s; num_gpus may repeat what the lease has.",
    "properties": {
        **request_schema.schema(request_schema.SIZE),
        "extend_s": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "Extend the lease by this many seconds.",
        },
    },
}

_DRAIN = {
    "type": "object",
    "required": ["draining"],
    "additionalProperties": False,
    "properties": {
        "draining": {"type": "boolean"},
        "move": {"type": "boolean", "description": "Also move its leases to other servers; default: false."},
    },
}
_MOVE = {
    "type": "object",
    "required": ["lease", "owner", "outcome", "to", "reason", "seconds"],
    "properties": {
        "lease": _TEXT,
        "owner": _TEXT,
        "outcome": {"type": "string", "enum": ["waiting", "moving", "moved", "stays", "ended"]},
        "to": {"type": "string", "description": "The server that it moves or has moved to."},
        "reason": {"type": "string", "description": "Why it stays, or has ended."},
        "seconds": {"type": ["number", "null"], "description": "How long the move took."},
    },
}
_DRAINED = {
    "type": "object",
    "required": ["name", "draining", "moves", "over"],
    "properties": {
        "name": _TEXT,
        "draining": {"type": "boolean"},
        "moves": {
            "type": "array",
            "description": "What became of its leases, if they were to move.",
            "items": {"$ref": "#/components/schemas/Move"},
        },
        "over": {"type": "boolean", "description": "No move is to come."},
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

_GPU_COLUMNS = {
    "type": "object",
    "description": "Columns over a regular grid of times; null where nothing was measured.",
    "required": list(_COLUMNS),
    "properties": _COLUMNS,
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
            "additionalProperties": {"$ref": "#/components/schemas/Columns"},
        },
    },
}

_FORECAST = {
    "type": "object",
    "required": ["outcome", "position", "reason", "slices"],
    "properties": {
        "outcome": {"type": "string", "enum": ["granted", "queued", "impossible"]},
        "position": {"type": ["integer", "null"], "description": "Position in the queue, from 1."},
        "reason": {"type": "string", "description": "One line: why the request is impossible."},
        "slices": {"type": "array", "items": {"$ref": "#/components/schemas/Slice"}},
    },
}

_ERROR = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {"error": _TEXT, "message": _TEXT},
}

#: Whatever OpenAPI allows in each part.
_PART: dict[str, Any] = {"type": "object", "additionalProperties": True}
_OPENAPI = {
    "type": "object",
    "required": ["openapi", "info", "paths", "components"],
    "description": "An OpenAPI 3.1 document.",
    "properties": {
        "openapi": _TEXT,
        "info": _PART,
        "servers": {"type": "array", "items": _PART},
        "security": {"type": "array", "items": _PART},
        "paths": _PART,
        "components": _PART,
    },
}


def _schema(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


#: Whoever calls, and whatever for.
_ALWAYS = (400, 401, 403, 429, 503)


def _answers(description: str, schema: str, *refusals: int, status: int = 200) -> dict[str, Any]:
    good = {"description": description, "content": _schema(schema)}
    meanings = {
        400: "The request is invalid.",
        401: "The token is missing, unknown, expired or revoked.",
        403: "The caller is not allowed to make this call.",
        404: "No object with this id is visible to the caller, or the pool does not offer this call.",
        409: "The request cannot be granted now and does not wait, or its id is in use.",
        410: "The lease has ended.",
        422: "This pool can never grant the request.",
        429: "A limit was exceeded, of calls per second or of wrong tokens; the message says what to do.",
        503: "The ledger or the engine is unavailable; nothing was changed.",
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
    "description": "Seconds from now; null for no end.",
}
_SCOPE = {
    "type": "string",
    "enum": [scope.value for scope in Scope],
    "default": Scope.ADMINISTER.value,
    "description": "The most that the token may do of what its user may: read; also request, keep and release GPUs; "
    "also administer.",
}
_ONE_NAMESPACE = {
    "type": "boolean",
    "default": False,
    "description": "The token changes nothing outside of its namespace.",
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
            "description": "The user whose leases the token reads; default: its own.",
        },
        "namespace": _TEXT,
        "administers": {"type": "boolean", "default": False},
        "expires_s": _EXPIRES,
        "scope": _SCOPE,
        "one_namespace": _ONE_NAMESPACE,
    },
}
_LIFE = {"type": "object", "additionalProperties": False, "properties": {"expires_s": _EXPIRES}}
_TOKEN: dict[str, Any] = {
    "type": "object",
    "required": [
        "id",
        "description",
        "owner",
        "namespace",
        "administers",
        "created_at",
        "expires_at",
        "revoked_at",
        "last_used_at",
        "cuts_leases",
        "scope",
        "one_namespace",
        "state",
    ],
    "properties": {
        **dict.fromkeys(("id", "description", "owner", "namespace"), _TEXT),
        "administers": {"type": "boolean"},
        "created_at": {"type": "number"},
        "expires_at": _NUMBER_OR_NULL,
        "revoked_at": _NUMBER_OR_NULL,
        "last_used_at": _NUMBER_OR_NULL,
        "cuts_leases": {"type": "boolean"},
        "scope": _SCOPE,
        "one_namespace": _ONE_NAMESPACE,
        "state": {"type": "string", "enum": ["valid", "expired", "revoked"]},
    },
}
_TOKENS = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"tokens": {"type": "array", "items": {"$ref": "#/components/schemas/Token"}}},
}
_TOKEN_MADE = {
    **_TOKEN,
    "required": [*_TOKEN["required"], "token", "files"],
    "properties": {
        **_TOKEN["properties"],
        "token": {"type": "string", "description": "The token itself. Only this answer contains it."},
        "files": {
            "type": "object",
            "additionalProperties": _TEXT,
            "description": "The files of a client's bundle, by name.",
        },
    },
}
_TOKEN_PATHS: dict[str, Any] = {
    "/tokens": {
        "get": {
            "operationId": "listTokens",
            "summary": "List the tokens of a secured pool; for administrators",
            "responses": _answers("The tokens", "Tokens", 404),
        },
        "post": {
            "operationId": "createToken",
            "summary": "Create a token; with `Accept: application/x-tar`, return its bundle as a tar archive",
            "requestBody": {"required": True, "content": _schema("NewToken")},
            "responses": _answers(
                "The token, and the files of a client's bundle", "TokenMade", 404, status=201
            ),
        },
    },
    "/tokens/{id}": {
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": _TEXT}],
        "patch": {
            "operationId": "extendToken",
            "summary": "Set the token's lifetime, counted from now",
            "requestBody": {"required": True, "content": _schema("Life")},
            "responses": _answers("The token", "Token", 404),
        },
        "delete": {
            "operationId": "revokeToken",
            "summary": "Revoke the token",
            "parameters": [
                _query(
                    "end_leases", {"type": "string", "enum": ["0", "1"]}, "1: also end the token's leases."
                )
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
                    "summary": "Return the servers, GPUs, slices and queue",
                    "responses": _answers("The pool", "Pool", 503),
                }
            },
            "/history": {
                "get": {
                    "operationId": "getHistory",
                    "summary": "Return the utilization over time as columns over a regular grid; null in gaps",
                    "parameters": [
                        _query("since", {"type": "number"}, "Seconds since the epoch; default: an hour ago."),
                        _query(
                            "step",
                            {"type": "number", "minimum": 1},
                            "Seconds between two values; older samples may be coarser.",
                        ),
                        _query(
                            "gpu",
                            {"type": "array", "items": _TEXT},
                            "Also return the columns of these GPUs (uuids); `all` for all GPUs.",
                        ),
                    ],
                    "responses": _answers("The series", "History", 400, 503),
                }
            },
            "/forecast": {
                "get": {
                    "operationId": "forecast",
                    "summary": "Forecast the outcome of a request; nothing is recorded",
                    "parameters": request_schema.query_parameters(request_schema.FORECAST),
                    "responses": _answers("The forecast", "Forecast", 400, 503),
                }
            },
            "/servers/{name}": {
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": _TEXT},
                ],
                "get": {
                    "operationId": "getServer",
                    "summary": "Return whether a GPU server is drained, and how far its leases have moved",
                    "responses": _answers("The server's present state", "Drained", 403, 404, 503),
                },
                "patch": {
                    "operationId": "drain",
                    "summary": "Drain a GPU server, or grant on it again; for administrators",
                    "requestBody": {"required": True, "content": _schema("Drain")},
                    "responses": _answers("The server's present state", "Drained", 400, 403, 404, 503),
                },
            },
            "/events": {
                "get": {
                    "operationId": "watch",
                    "summary": "Open a WebSocket: a StateMessage or ResumedMessage, then a DeltaMessage each second",
                    "parameters": [
                        _query(
                            "feed", _TEXT, "To resume after a lost connection: the feed of the last state."
                        ),
                        _query("seq", _COUNT, "To resume: the number of the last message received."),
                    ],
                    "responses": {"101": {"description": "Switching to WebSocket"}},
                }
            },
            "/leases": {
                "get": {
                    "operationId": "listLeases",
                    "summary": "List the leases that have not ended; with all=1 also those that have",
                    "parameters": [
                        _query(
                            "all",
                            {"type": "string", "enum": ["0", "1"]},
                            "1: include leases that have ended.",
                        )
                    ],
                    "responses": _answers("Leases, oldest first", "Leases", 503),
                },
                "post": {
                    "operationId": "requestLease",
                    "summary": "Request GPU slices",
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
                    "summary": "Return a lease, at once or when it changes",
                    "parameters": [
                        _WAIT,
                        _query(
                            "state",
                            {"type": "string", "enum": leases.STATES},
                            "The state that the caller has seen: wait until it differs.",
                        ),
                        _query(
                            "position",
                            {"type": "integer"},
                            "The position that the caller has seen: wait until it differs.",
                        ),
                    ],
                    "responses": _answers("The lease", "Lease", 404, 503),
                },
                "patch": {
                    "operationId": "resizeLease",
                    "summary": "Extend the lease, or change its slices' memory once the worker enforces it",
                    "requestBody": {"required": True, "content": _schema("Resize")},
                    "responses": _answers("The lease", "Lease", 400, 404, 409, 410, 422, 503),
                },
                "delete": {
                    "operationId": "releaseLease",
                    "summary": "Release the lease, or cancel the queued request",
                    "responses": _answers("The lease, ended", "Lease", 404, 503),
                },
            },
            "/leases/{id}/heartbeat": {
                "parameters": [_ID],
                "post": {
                    "operationId": "heartbeat",
                    "summary": "Keep a lease or a queued request alive",
                    "responses": _answers("The lease", "Lease", 404, 410, 503),
                },
            },
            **tenants.paths(_answers, _schema, _query),
            **health.paths(_answers, _schema),
            **_TOKEN_PATHS,
            "/openapi.json": {
                "get": {
                    "operationId": "getDescription",
                    "summary": "This document",
                    "responses": _answers("OpenAPI 3.1", "OpenAPI"),
                }
            },
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Forecast": _FORECAST,
                "Columns": _GPU_COLUMNS,
                "History": _HISTORY,
                "Request": _REQUEST,
                "WantedGPUs": _WANTED,
                "Resize": _RESIZE,
                "Drain": _DRAIN,
                "Drained": _DRAINED,
                "Move": _MOVE,
                "Token": _TOKEN,
                "Tokens": _TOKENS,
                "NewToken": _NEW_TOKEN,
                "TokenMade": _TOKEN_MADE,
                "Life": _LIFE,
                "Error": _ERROR,
                "OpenAPI": _OPENAPI,
                **leases.SCHEMAS,
                **pool.SCHEMAS,
                **health.SCHEMAS,
                **tenants.SCHEMAS,
            },
        },
    }
