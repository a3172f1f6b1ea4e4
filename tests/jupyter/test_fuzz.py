"""What is made from the description of the pool in a Jupyter server does not break it, and its answers fit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..server.fuzzing import fuzzed


@pytest.mark.soak
def test_every_call_by_its_description(start_server: Callable[..., Any]) -> None:
    _, http = start_server()
    description = http.get("/openapi.json").json()
    met = fuzzed(
        description, str(http.base_url).rstrip("/"), {"Authorization": http.headers["authorization"]}
    )
    assert met["GET /pool"] >= {200}
    assert met["GET /leases/{id}"] >= {404}
    assert http.get("/pool").status_code == 200
    assert http.get("/leases").json() == {"leases": []}
