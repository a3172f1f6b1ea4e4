"""Of the OpenAPI description what is about namespaces, the end of leases, and the audit trail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_ROLE = {"type": "string", "enum": ["view", "use", "administer"]}

_LIMITS = {
    "type": "object",
    "description": "What its leases may hold together; null is no limit.",
    "additionalProperties": False,
    "properties": {
        "memory_mib": {"type": ["integer", "null"], "minimum": 0, "description": "GPU memory in MiB."},
        "gpus": {"type": ["number", "null"], "minimum": 0, "description": "Whole GPUs that it amounts to."},
        "leases": {"type": ["integer", "null"], "minimum": 0},
        "user_share": {
            "type": ["number", "null"],
            "minimum": 0.001,
            "maximum": 1,
            "description": "What one user may hold of the three above.",
        },
        "lease_s": {
            "type": ["number", "null"],
            "minimum": 1,
            "description": "The longest lease, in seconds.",
        },
        "idle_s": {
            "type": ["number", "null"],
            "minimum": 1,
            "description": "How long a lease may compute nothing, in seconds.",
        },
    },
}

_CHANGE = {
    "description": _TEXT,
    "limits": {"$ref": "#/components/schemas/Limits"},
    "weight": {
        "type": "number",
        "minimum": 0.001,
        "maximum": 1000,
        "description": "Share when requests queue.",
    },
    "names_holders": {"type": "boolean", "description": "Members see who of them holds what."},
}
_MEMBERS = {"type": "object", "additionalProperties": _ROLE}

SCHEMAS: dict[str, Any] = {
    "Limits": _LIMITS,
    "Namespace": {
        "type": "object",
        "required": ["name", "limits", "weight", "members", "held"],
        "properties": {
            "name": _TEXT,
            **_CHANGE,
            "ceiling": {
                "$ref": "#/components/schemas/Limits",
                "description": "What the pool's administrator allows; limits are at most that.",
            },
            "members": _MEMBERS,
            "role": {"type": ["string", "null"], "description": "The caller's."},
            "held": {
                "type": "object",
                "properties": {"memory_mib": _COUNT, "gpus": {"type": "number"}, "leases": _COUNT},
            },
        },
    },
    "NewNamespace": {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": {"type": "string", "maxLength": 63}, **_CHANGE, "members": _MEMBERS},
    },
    "NamespaceChange": {
        "type": "object",
        "additionalProperties": False,
        "description": "Only what is named changes, limits one by one; a member whose role is null is taken out.",
        "properties": {
            **_CHANGE,
            "members": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        },
    },
    "Member": {
        "type": "object",
        "required": ["role"],
        "additionalProperties": False,
        "properties": {"role": _ROLE},
    },
    "Ask": {"type": "object", "additionalProperties": False, "properties": {"message": _TEXT}},
    "WhoAmI": {
        "type": "object",
        "required": ["owner", "administers", "namespace", "role", "namespaces"],
        "properties": {
            "owner": _TEXT,
            "administers": {"type": "boolean"},
            "namespace": _TEXT,
            "role": {"type": ["string", "null"]},
            "namespaces": _MEMBERS,
        },
    },
}


def paths(
    answers: Callable[..., dict[str, Any]],
    schema: Callable[[str], dict[str, Any]],
    query: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """The calls, described with the words that all calls share."""

    def body(name: str, required: bool = True) -> dict[str, Any]:
        return {"required": required, "content": schema(name)}

    def path(name: str) -> dict[str, Any]:
        return {"name": name, "in": "path", "required": True, "schema": _TEXT}

    return {
        "/whoami": {
            "get": {
                "operationId": "whoAmI",
                "summary": "Who the caller is, and what they may do",
                "responses": answers("The caller", "WhoAmI", 503),
            }
        },
        "/namespaces": {
            "get": {
                "operationId": "listNamespaces",
                "summary": "The namespaces that the caller is a member of; all of them for the pool's administrator",
                "responses": answers("`{namespaces: [Namespace]}`", None, 503),
            },
            "post": {
                "operationId": "createNamespace",
                "summary": "For the pool's administrator",
                "requestBody": body("NewNamespace"),
                "responses": answers("The namespace", "Namespace", 400, 403, 409, 503, status=201),
            },
        },
        "/namespaces/{name}": {
            "parameters": [path("name")],
            "patch": {
                "operationId": "changeNamespace",
                "summary": "For its administrators, within what the pool's administrator has set",
                "requestBody": body("NamespaceChange"),
                "responses": answers("The namespace", "Namespace", 400, 403, 404, 409, 503),
            },
            "delete": {
                "operationId": "deleteNamespace",
                "summary": "For the pool's administrator; refused while leases or tokens are of it",
                "responses": answers("Nothing is left of it", None, 403, 404, 409, 503),
            },
        },
        "/namespaces/{name}/members/{user}": {
            "parameters": [path("name"), path("user")],
            "put": {
                "operationId": "setMember",
                "summary": "Add a member, or change their role",
                "requestBody": body("Member"),
                "responses": answers("The namespace", "Namespace", 400, 403, 404, 503),
            },
            "delete": {
                "operationId": "removeMember",
                "summary": "What they hold goes on",
                "responses": answers("The namespace", "Namespace", 403, 404, 503),
            },
        },
        "/leases/{id}/ask": {
            "parameters": [path("id")],
            "post": {
                "operationId": "askBack",
                "summary": "Ask the holder to give the lease back, where the caller may know who that is",
                "requestBody": body("Ask", required=False),
                "responses": answers("`{lease, owner}`", None, 400, 404, 410, 503),
            },
        },
        "/leases/{id}/keep": {
            "parameters": [path("id")],
            "post": {
                "operationId": "keepLease",
                "summary": "The holder wants it still: the idle time begins anew, and who asked for it is answered",
                "responses": answers("The lease", "Lease", 404, 410, 503),
            },
        },
        "/audit": {
            "get": {
                "operationId": "getAudit",
                "summary": "Who asked for what, and what came of it; for the pool's administrator",
                "parameters": [
                    query("since", {"type": "number"}, "Seconds since the epoch."),
                    query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "The newest so many."),
                ],
                "responses": answers("`{entries: […]}`, oldest first", None, 400, 403, 503),
            }
        },
    }
