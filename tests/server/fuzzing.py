"""Requests made from the pool's own description of itself, and what every answer to them has to be."""

from __future__ import annotations

import http.client
import json
import random
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from ..conftest import PATIENCE_S, often
from ..support.mutations import mutated

#: Sockets are no calls that answer; see tests/server/test_events.py.
SOCKETS = ("/events",)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def fuzzed(description: dict[str, Any], url: str, headers: dict[str, str], **how: Any) -> dict[str, set[int]]:
    """Tries every call with values that its description allows and values that it does not; the statuses by call.

    Raises what is wrong with an answer: 500 or more, a status or a kind of content that the description does not
    know, a body of another shape. ``how`` goes to the HTTP client.
    """
    met: dict[str, set[int]] = {}
    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = result.ok()
        if operation.path in SOCKETS:
            continue
        met[operation.label] = set()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _try(operation.as_strategy(generation_mode=mode), url, headers, met[operation.label], how)
    return met


def _try(strategy: Any, url: str, headers: dict[str, str], answers: set[int], how: dict[str, Any]) -> None:
    @settings(
        max_examples=often(4, 400),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(case: Any) -> None:
        if case.query and "wait" in case.query:
            case.query["wait"] = 0  # not half a minute for each
        response = case.call(base_url=url, headers=headers, timeout=PATIENCE_S, **how)
        answers.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    attempt()


@dataclass(frozen=True)
class Call:
    """One request: the path as its parts, the query, and the body as plain values, or None."""

    method: str
    path: tuple[str, ...]
    query: tuple[tuple[str, Any], ...]
    body: Any


def calls_of(description: dict[str, Any], each: int) -> list[Call]:
    """Some calls of each kind, about half of which fit the description."""
    found: list[Call] = []

    def note(case: Any) -> None:
        said = case.as_transport_kwargs(base_url="http://pool")
        path = tuple(said["url"].removeprefix("http://pool").split("?")[0].split("/"))
        query = tuple((k, v) for k, v in (said.get("params") or {}).items() if k != "wait")
        found.append(Call(said["method"], path, query, said.get("json")))

    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = result.ok()
        if operation.path in SOCKETS:
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)
            settings(
                max_examples=each,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(strategy)(note))()
    return found


def _changed(rng: random.Random, values: list[Any]) -> list[Any]:
    changed = mutated(rng, values)
    return changed if isinstance(changed, list) else [changed]


def said_on(
    connection: http.client.HTTPConnection, base: str, call: Call, headers: dict[str, str], rng: random.Random
) -> int:
    """Make a call, in most cases with something else in it; the status of the answer, which is read to its end."""
    path, query, body, method = list(call.path), list(call.query), call.body, call.method
    how = rng.randrange(10)
    if how < 5 and body is not None:
        body = mutated(rng, body)
    elif how < 7:
        path = [str(part) for part in _changed(rng, path)]
    elif how < 8:
        query = [(str(pair), "1") for pair in _changed(rng, [*query, "limit"])]
    elif how < 9:
        method = rng.choice(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
    try:
        data = None if body is None else json.dumps(body, default=repr).encode()
    except ValueError:
        data = b"{"
    where = base + "/".join(quote(part, safe="") for part in path)
    where += f"?{urlencode([(k, str(v)) for k, v in query], errors='replace')}" if query else ""
    connection.request(method, where, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = response.read()
    if content and response.headers.get_content_type() == "application/json":
        json.loads(content)
    return response.status
