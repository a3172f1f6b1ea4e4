"""What is made from a secured server's description of itself does not break it, and its answers fit it."""

from __future__ import annotations

import http.client
import json
import random
import re
from collections import Counter

import httpx
import pytest

from jupyter_gpupool.server.http import handlers, tokens
from jupyter_gpupool.server.http.openapi.document import document

from ...conftest import PATIENCE_S, often
from ..fuzzing import SOCKETS, calls_of, fuzzed, said_on
from .conftest import Server
from .unauthenticated import trusting


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("administers", [True, False])
def test_every_call_by_its_description(server: Server, administers: bool) -> None:
    token = server.token(administers=administers)["token"]
    headers = {"Authorization": f"Bearer {token}"}
    base = f"{server.url}/gpupool/api/v1"
    with httpx.Client(verify=trusting(server), headers=headers, timeout=PATIENCE_S) as http:
        description = http.get(f"{base}/openapi.json").json()
    met = fuzzed(description, base, headers, verify=str(server.folder / "ca.crt"))
    calls = {
        f"{verb.upper()} {path}"
        for path, item in description["paths"].items()
        for verb in item
        if verb != "parameters" and path not in SOCKETS
    }
    assert set(met) == calls
    if administers:
        # None was all refused at the door; whether what came in also fitted is chance's.
        assert all(statuses - {401, 403, 429} for statuses in met.values()), met
        assert sum(bool(statuses & {200, 201, 202, 404, 422}) for statuses in met.values()) > len(met) / 2, (
            met
        )
    assert server.administrator().pool()["healthy"]
    for line in server.log.splitlines():
        told = json.loads(line)
        assert told["level"] != "error", line
        assert token.partition(".")[2] not in line


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_very_many_calls(server: Server) -> None:
    """Calls that fit the description and ones that are close to it, on connections that stay open."""
    token = server.token(administers=True, expires_s=None)["token"]
    headers = {"Authorization": f"Bearer {token}"}
    rng = random.Random(3)
    kinds = calls_of(document(), often(3, 40))
    met: Counter[int] = Counter()
    connection = http.client.HTTPSConnection(
        "localhost", server.port, timeout=PATIENCE_S, context=trusting(server)
    )
    for _ in range(often(2_000, 1_000_000)):
        call = rng.choice(kinds)
        status = said_on(connection, "/gpupool/api/v1", call, headers, rng)
        met[status] += 1
        assert status < 500, call
    connection.close()
    assert {200, 400, 404} <= set(met), met
    assert server.administrator().pool()["healthy"]
    for line in server.log.splitlines():
        assert json.loads(line)["level"] != "error", line
        assert token.partition(".")[2] not in line


def test_the_description_names_every_call() -> None:
    """A call that the server has and the description does not know would be tried by nobody."""
    routes = [path for path, *_ in (*handlers.ROUTES, *tokens.token_routes(None))]  # type: ignore[arg-type]
    described = {re.sub(r"{\w+}", "x", path) for path in document()["paths"]}
    for route in routes:
        if route == "/(.*)":
            continue
        assert any(re.fullmatch(route, path) for path in described), route
