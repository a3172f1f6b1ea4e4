"""Requests made from the pool's own description of itself, and what every answer to them has to be."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from ..conftest import PATIENCE_S, often

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
