"""The calls about namespaces, the end of leases, the audit log and usage in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jupyter_gpupool.pool.usage_report import BY

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_BY = list(BY)
_HOURS = {"type": "number", "minimum": 0}
_ROLE = {"type": "string", "enum": ["view", "use", "administer"]}
_ROLE_OR_NULL = {"anyOf": [_ROLE, {"type": "null"}]}

_LIMITS = {
    "type": "object",
    "description": "What the namespace's leases may hold together; null for no limit.",
    "additionalProperties": False,
    "properties": {
        "memory_mib": {"type": ["integer", "null"], "minimum": 0, "description": "GPU memory in MiB."},
        "gpus": {
            "type": ["number", "null"],
            "minimum": 0,
            "description": "The sum of the fractions of GPUs.",
        },
        "leases": {"type": ["integer", "null"], "minimum": 0},
        "user_share": {
            "type": ["number", "null"],
            "minimum": 0.001,
            "maximum": 1,
            "description": "The fraction of the three limits above that one user may hold.",
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
        "reclaim_after_s": {
            "type": ["number", "null"],
            "minimum": 1,
            "description": "How long an idle lease keeps its GPUs while others wait, in seconds; null: as the pool.",
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
        "description": "The namespace's weight when requests queue.",
    },
    "names_holders": {"type": "boolean", "description": "Members see which member holds which slices."},
    "reclaim": {
        "type": ["string", "null"],
        "enum": ["never", "idle", None],
        "description": "Whether its idle leases may be parked while others wait; null is the pool's default.",
    },
}
_MEMBERS = {"type": "object", "additionalProperties": _ROLE}

SCHEMAS: dict[str, Any] = {
    "Limits": _LIMITS,
    "Namespace": {
        "type": "object",
        "required": ["name", *_CHANGE, "ceiling", "members", "role", "held"],
        "properties": {
            "name": _TEXT,
            **_CHANGE,
            "ceiling": {
                "$ref": "#/components/schemas/Limits",
                "description": "The limits that the pool's administrator sets; the namespace's own are at most these.",
            },
            "members": _MEMBERS,
            "role": {**_ROLE_OR_NULL, "description": "The caller's role."},
            "held": {
                "type": "object",
                "required": ["memory_mib", "gpus", "leases"],
                "properties": {"memory_mib": _COUNT, "gpus": {"type": "number"}, "leases": _COUNT},
            },
        },
    },
    "Namespaces": {
        "type": "object",
        "required": ["namespaces"],
        "properties": {
            "namespaces": {"type": "array", "items": {"$ref": "#/components/schemas/Namespace"}},
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
        "description": "Only the given fields change, each limit by itself; a member whose role is null is removed.",
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
    "Asked": {
        "type": "object",
        "required": ["lease", "owner"],
        "properties": {"lease": _TEXT, "owner": {**_TEXT, "description": "The lease's holder."}},
    },
    "Deleted": {"type": "object", "additionalProperties": False, "description": "An object without fields."},
    "AuditEntry": {
        "type": "object",
        "required": ["at", "action", "subject", "outcome", "namespace", "actor"],
        "properties": {
            "at": {"type": "number", "description": "In seconds since the epoch."},
            "action": _TEXT,
            "subject": {**_TEXT, "description": "The id of a lease or token, or a name."},
            "outcome": _TEXT,
            "namespace": _TEXT,
            "actor": {**_TEXT, "description": "The user; empty for the pool itself."},
        },
    },
    "Audit": {
        "type": "object",
        "required": ["entries"],
        "properties": {
            "entries": {"type": "array", "items": {"$ref": "#/components/schemas/AuditEntry"}},
        },
    },
    "UsageRow": {
        "type": "object",
        "description": "Hours of whole GPUs: half of a GPU's memory for two hours is one.",
        "required": ["name", "gpu", "leases", "granted_h", "computing_h", "idle_h", "unknown_h", "parked_h"],
        "properties": {
            "name": {**_TEXT, "description": "The user, the namespace, or the GPU's uuid."},
            "gpu": {**_TEXT, "description": "A GPU's server and index; empty in other reports."},
            "leases": _COUNT,
            "granted_h": _HOURS,
            "computing_h": _HOURS,
            "idle_h": _HOURS,
            "unknown_h": {
                **_HOURS,
                "description": "Granted, and not known which of both: nothing was measured, or only by a version "
                "that did not tell apart the leases that share a GPU.",
            },
            "parked_h": {
                **_HOURS,
                "description": "Not granted: leases were parked, and others had their GPUs.",
            },
        },
    },
    "Usage": {
        "type": "object",
        "required": ["since", "until", "by", "measured_since", "rows"],
        "properties": {
            "since": {"type": "number", "description": "In seconds since the epoch; at most 30 days ago."},
            "until": {"type": "number"},
            "by": {"type": "string", "enum": _BY},
            "measured_since": {
                "type": ["number", "null"],
                "description": "Since when it is known whether GPUs compute; null: not at all.",
            },
            "rows": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/UsageRow"},
                "description": "Most granted first.",
            },
        },
    },
    "WhoAmI": {
        "type": "object",
        "required": ["owner", "administers", "namespace", "role", "namespaces"],
        "properties": {
            "owner": _TEXT,
            "administers": {"type": "boolean"},
            "namespace": _TEXT,
            "role": _ROLE_OR_NULL,
            "namespaces": _MEMBERS,
        },
    },
}


def paths(
    answers: Callable[..., dict[str, Any]],
    schema: Callable[[str], dict[str, Any]],
    query: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Return the descriptions of the calls, in the words that all calls share."""

    def body(name: str, required: bool = True) -> dict[str, Any]:
        return {"required": required, "content": schema(name)}

    def path(name: str) -> dict[str, Any]:
        return {"name": name, "in": "path", "required": True, "schema": _TEXT}

    return {
        "/whoami": {
            "get": {
                "operationId": "whoAmI",
                "summary": "Return who the caller is and what they may do",
                "responses": answers("The caller", "WhoAmI", 503),
            }
        },
        "/namespaces": {
            "get": {
                "operationId": "listNamespaces",
                "summary": "List the namespaces that the caller is a member of, or all for the pool's administrator",
                "responses": answers("The namespaces", "Namespaces", 503),
            },
            "post": {
                "operationId": "createNamespace",
                "summary": "Create a namespace; for the pool's administrator",
                "requestBody": body("NewNamespace"),
                "responses": answers("The namespace", "Namespace", 400, 403, 409, 503, status=201),
            },
        },
        "/namespaces/{name}": {
            "parameters": [path("name")],
            "patch": {
                "operationId": "changeNamespace",
                "summary": "Change a namespace; for its administrators, within the limits of the pool's administrator",
                "requestBody": body("NamespaceChange"),
                "responses": answers("The namespace", "Namespace", 400, 403, 404, 409, 503),
            },
            "delete": {
                "operationId": "deleteNamespace",
                "summary": "Delete a namespace; for the pool's administrator; refused while it has leases or tokens",
                "responses": answers("The namespace is deleted", "Deleted", 403, 404, 409, 503),
            },
        },
        "/namespaces/{name}/members/{user}": {
            "parameters": [path("name"), path("user")],
            "put": {
                "operationId": "setMember",
                "summary": "Add a member, or change the member's role",
                "requestBody": body("Member"),
                "responses": answers("The namespace", "Namespace", 400, 403, 404, 503),
            },
            "delete": {
                "operationId": "removeMember",
                "summary": "Remove a member, whose leases continue",
                "responses": answers("The namespace", "Namespace", 403, 404, 503),
            },
        },
        "/leases/{id}/ask": {
            "parameters": [path("id")],
            "post": {
                "operationId": "askBack",
                "summary": "Ask the holder to release a lease, if the caller may see who holds it",
                "requestBody": body("Ask", required=False),
                "responses": answers("The lease, and its holder", "Asked", 400, 404, 410, 503),
            },
        },
        "/leases/{id}/keep": {
            "parameters": [path("id")],
            "post": {
                "operationId": "keepLease",
                "summary": "Keep a lease: restart its idle time, and clear the requests to release it",
                "responses": answers("The lease", "Lease", 404, 410, 503),
            },
        },
        "/audit": {
            "get": {
                "operationId": "getAudit",
                "summary": "Return the audit log; for the pool's administrator",
                "parameters": [
                    query("since", {"type": "number"}, "Seconds since the epoch."),
                    query(
                        "limit",
                        {"type": "integer", "minimum": 1, "maximum": 1000},
                        "The number of entries: the newest ones.",
                    ),
                ],
                "responses": answers("The entries, oldest first", "Audit", 400, 403, 503),
            }
        },
        "/usage": {
            "get": {
                "operationId": "getUsage",
                "summary": "Return GPU-hours: the caller's, or everybody's for the pool's administrator",
                "parameters": [
                    query("by", {"type": "string", "enum": _BY}, "What a row is for; default: user."),
                    query(
                        "since",
                        {"type": "number"},
                        "Seconds since the epoch; default: 30 days ago, which is as far as the ledger reaches.",
                    ),
                ],
                "responses": answers("The report", "Usage", 400, 503),
            }
        },
    }
