"""Requests that try the server's reading of HTTP: each is refused in its place, and the connection tells no more."""

from __future__ import annotations

import json
import re

import pytest

from .conftest import Server, gpupool
from .unauthenticated import said, statuses

BASE = "/gpupool/api/v1"


@pytest.fixture(scope="module")
def token(server: Server) -> str:
    return server.token()["token"]


def ask(server: Server, line: str, *headers: str, body: bytes = b"", answers: int = 0) -> bytes:
    """What is answered to a request of just this line and these headers."""
    head = "\r\n".join([line, *headers, "Connection: close", "", ""])
    return said(server, head.encode("latin-1") + body, answers)


def refused(answer: bytes, *allowed: int) -> bool:
    """One answer, a refusal that tells nothing of what runs here; or none at all."""
    known = statuses(answer)
    quiet = not re.search(rb"(?i)traceback|tornado|/site-packages/|python", answer)
    return quiet and (known == [] or (len(known) == 1 and known[0] in (allowed or (400, 401, 404, 405))))


@pytest.mark.parametrize(
    "path",
    [
        f"/{BASE}/pool",
        f"{BASE}//pool",
        f"{BASE}/pool/",
        f"{BASE}/./pool",
        f"{BASE}/tokens/../pool",
        f"{BASE}/../../../etc/passwd",
        f"{BASE}/%2e%2e/v1/pool",
        f"{BASE}/leases/%2e%2e%2fpool",
        f"{BASE}/leases/..%2f..%2f..%2fetc%2fpasswd",
        f"{BASE}/leases/%00",
        f"{BASE}/leases/x%0d%0aSet-Cookie:a=b",
        f"{BASE}/leases/'%20OR%201=1--",
        f"{BASE}/pool%00",
        f"{BASE}/pool;x=y",
        f"{BASE}/POOL",
        f"{BASE}/%70ool/x",
        f"https://elsewhere.example{BASE}/nothing",
        "elsewhere.example:443",
        "/",
        "*",
        "/" + "a" * 15_000,
        f"{BASE}/" + "%41" * 4_000,
        f"{BASE}/leases/" + "a" * 65,
    ],
)
def test_paths(server: Server, token: str, path: str) -> None:
    answer = ask(server, f"GET {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}")
    assert refused(answer), answer[:300]
    assert b"Set-Cookie" not in answer.split(b"\r\n\r\n")[0]
    # Without a token nobody learns which paths there are.
    assert refused(ask(server, f"GET {path} HTTP/1.1", "Host: x")), path


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: x", "Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Host: x", "Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Host: x", "Transfer-Encoding: chunked, identity"],
        ["Host: x", "Transfer-Encoding: xchunked"],
        ["Host: x", "Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Host: x", "Transfer-Encoding : chunked"],
        ["Host: x", "Transfer-Encoding:\x0bchunked"],
        ["Host: x", "Content-Length: 5", "Content-Length: 60"],
        ["Host: x", "Content-Length: +5"],
        ["Host: x", "Content-Length: 0x5"],
        ["Host: x", "Content-Length: 5_0"],
        ["Host: x", "Content-Length: -1"],
        ["Host: x", "Content-Length: 99999999999999999999999"],
        ["Host: x", " folded: first"],
        ["Host: x", "X: a\0b"],
        ["Host: x", "X: a\rb"],
        ["Host: x", "no colon"],
        ["Host: x", ": no name"],
        ["Host: x", "X: " + "a" * 20_000],
        ["Host: x", *(f"X-{n}: y" for n in range(4_000))],
        ["Host: a/b@c"],
        ["Host: "],
        ["Host: a", "Host: b"],
        [],
    ],
    ids=lambda headers: ("; ".join(headers)[:50]).encode("unicode_escape").decode(),
)
def test_headers(server: Server, token: str, headers: list[str]) -> None:
    """A second request hides in the body of the first: it must not be answered as one."""
    hidden = f"GET {BASE}/pool HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    chunks = b"0\r\n\r\n" + hidden
    for body in (b"", chunks, hidden):
        line = f"POST {BASE}/leases HTTP/1.1"
        answer = ask(server, line, *headers, f"Authorization: Bearer {token}", body=body)
        assert refused(answer), answer[:300]
        assert b'"servers"' not in answer, "the hidden request was answered"


@pytest.mark.parametrize(
    "line",
    [
        *(f"{verb} {BASE}/pool HTTP/1.1" for verb in ("TRACE", "PROPFIND", "get", "X" * 3_000, "G\x01T")),
        f"CONNECT {BASE}/pool HTTP/1.1",
        f"GET {BASE}/pool HTTP/3.0",
        f"GET {BASE}/pool",
        f"GET  {BASE}/pool HTTP/1.1",
        f"GET\t{BASE}/pool HTTP/1.1",
        f"GET {BASE}/pool HTTP/1.1 HTTP/1.1",
        "PRI * HTTP/2.0",
        "",
        "\0" * 100,
    ],
    ids=lambda line: line[:30].encode("unicode_escape").decode(),
)
def test_first_lines(server: Server, token: str, line: str) -> None:
    answer = ask(server, line, "Host: x", f"Authorization: Bearer {token}")
    assert refused(answer, 400, 404, 405), answer[:300]
    assert b"Authorization" not in answer, "TRACE must not send a token back"


@pytest.mark.parametrize("verb", ["OPTIONS", "HEAD", "GET", "POST", "PUT", "PATCH", "DELETE"])
def test_no_verb_is_open_to_those_without_a_token(server: Server, verb: str) -> None:
    for path in (
        "/pool",
        "/leases",
        "/tokens",
        "/events",
        "/health",
        "/openapi.json",
        "/history",
        "/nothing",
    ):
        answer = ask(server, f"{verb} {BASE}{path} HTTP/1.1", "Host: x", "Content-Length: 0")
        assert refused(answer, 401, 405), (path, answer[:200])
        assert b"Access-Control-Allow" not in answer


def test_two_requests_on_one_connection_are_two_callers(server: Server, token: str) -> None:
    """Whoever was known with the first request is not with the second."""
    known = f"GET {BASE}/pool HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    unknown = f"GET {BASE}/pool HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(said(server, (known + unknown).encode(), 2)) == [200, 401]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 50_000,
        b'{"id":' * 10_000,
        b'{"num_gpus": ' + b"9" * 5_000 + b"}",
        b'{"num_gpus": 1e999}',
        b'{"partial": NaN}',
        b'{"partial": Infinity}',
        b'{"label": "\\ud800"}',
        b'{"label": "\\u0000"}',
        b'{"filters": {"name": "\\u001b]0;x\\u0007"}}',
        b'{"filters": ' + json.dumps({f"k{n}": "v" for n in range(3_000)}).encode() + b"}",
        b'{"filters": {"index": "' + b"1" * 500 + b'"}}',
        b'{"__class__": "x", "id": "y"}',
        b"\xff\xfe\x00",
        b"null",
        b'"' + b"x" * 60_000 + b'"',
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
def test_bodies(server: Server, token: str, body: bytes) -> None:
    fields = {"id": "3f0f2a6e-0000-4000-8000-000000000001", "partial": 0.1, "secret_sha256": "0" * 64}
    merged = body
    if body.startswith(b"{") and body.endswith(b"}"):
        merged = json.dumps(fields)[:-1].encode() + b", " + body[1:]
    headers = ["Host: x", f"Authorization: Bearer {token}", f"Content-Length: {len(merged)}"]
    answer = ask(server, f"POST {BASE}/leases HTTP/1.1", *headers, body=merged, answers=1)
    assert statuses(answer) in ([400], [422]), answer[:300]
    message = json.loads(answer.split(b"\r\n\r\n", 1)[1])["message"]
    assert "\n" not in message and len(message) < 400 and message.isprintable()


def test_no_number_of_gpus_is_too_large_to_be_refused(server: Server, token: str) -> None:
    for num_gpus in (3, 2**31, 2**63, 2**64, 10**300):
        for memory in ('"partial": 1', f'"memory_mib": {10**300}', f'"memory_mib": {2**63}'):
            body = f'{{"id": "3f0f2a6e-0000-4000-8000-000000000002", "num_gpus": {num_gpus}, {memory}}}'
            body = body[:-1] + f', "secret_sha256": "{"0" * 64}"}}'
            headers = ["Host: x", f"Authorization: Bearer {token}", f"Content-Length: {len(body)}"]
            answer = ask(server, f"POST {BASE}/leases HTTP/1.1", *headers, body=body.encode(), answers=1)
            assert statuses(answer) == [422], answer[:300]
    assert server.administrator().leases() == []


def test_after_all_that_nothing_of_it_is_in_the_log(server: Server, token: str) -> None:
    """No token, whole or in part, no traceback, and each line is JSON."""
    for secret in (
        token,
        (server.folder / "admin" / "client.yaml").read_text().partition("token: ")[2].strip(),
    ):
        assert secret not in server.log and secret.partition(".")[2][:20] not in server.log
    for line in server.log.splitlines():
        told = json.loads(line)
        assert told["level"] != "error" and "exception" not in told, line
    done = gpupool("health", GPUPOOL_CONFIG_DIR=str(server.folder / "admin"))
    assert done.returncode == 0, done.stdout + done.stderr
