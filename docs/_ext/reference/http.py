"""The HTTP interface, from the OpenAPI document that a pool serves."""

from __future__ import annotations

import re
from typing import Any

from jupyter_gpupool.server.http.openapi.document import document

from .text import prose, table

_METHODS = ("get", "put", "post", "patch", "delete")


def markdown() -> str:
    api = document()
    calls = [
        (path, method, shared[method])
        for path, shared in api["paths"].items()
        for method in _METHODS
        if method in shared
    ]
    overview = [(f"[`{_title(p, m)}`](#{_anchor(p, m)})", c["summary"]) for p, m, c in calls]
    parts = [table(["call", "what it does"], overview), "## Calls"]
    for path, method, call in calls:
        parts.append(_call(path, method, call, api["paths"][path].get("parameters", [])))
    parts.append("## Shapes")
    parts += [_shape(name, schema) for name, schema in api["components"]["schemas"].items()]
    return "\n\n".join(parts)


def _title(path: str, method: str) -> str:
    return f"{method.upper()} {path}"


def _anchor(path: str, method: str) -> str:
    """The anchor that MyST gives to a heading with that title."""
    return re.sub(r"[^\w\- ]", "", _title(path, method).lower()).replace(" ", "-")


def _call(path: str, method: str, call: dict[str, Any], shared: list[dict[str, Any]]) -> str:
    parts = [f"### {_title(path, method)}", prose(call["summary"])]
    if call.get("description"):
        parts.append(prose(call["description"]))
    rows = [
        (f"`{p['name']}`", p["in"], _kind(p["schema"]), prose(p.get("description")))
        for p in [*shared, *call.get("parameters", [])]
    ]
    if rows:
        parts.append(table(["parameter", "in", "type", "meaning"], rows))
    if "requestBody" in call:
        parts.append(f"Body: {_content(call['requestBody'])}")
    answers = [
        (f"`{status}`", _content(answer), prose(answer["description"]))
        for status, answer in call["responses"].items()
    ]
    parts.append(table(["status", "answer", "meaning"], answers))
    return "\n\n".join(parts)


def _content(holder: dict[str, Any]) -> str:
    kinds = [_kind(media.get("schema", {})) for media in holder.get("content", {}).values()]
    return ", ".join(dict.fromkeys(kinds))


def _shape(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"`{field}`" + (" (required)" if field in required else ""), _kind(of), prose(of.get("description")))
        for field, of in schema.get("properties", {}).items()
    ]
    parts = [f"### {name}", prose(schema.get("description"))]
    if rows:
        parts.append(table(["field", "type", "meaning"], rows))
    return "\n\n".join(part for part in parts if part)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words: its type, its bounds, the shape that it names."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(_kind(one) for one in schema[word]))
    kinds = schema.get("type", "any")
    text = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if text == "array" and "items" in schema:
        return f"list of {_kind(schema['items'])}"
    bounds = [
        (schema.get("minimum"), "≥"), (schema.get("exclusiveMinimum"), ">"), (schema.get("maximum"), "≤"),
    ]  # fmt: skip
    return " ".join([text, *(f"{sign} {bound}" for bound, sign in bounds if bound is not None)])
