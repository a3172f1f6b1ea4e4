"""The client's side of OpenID Connect: log in by a device code or a browser, refresh, and revoke."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx

from jupyter_gpupool.core.errors import IssuerUnavailable, Unauthenticated

_TIMEOUT_S = 15.0
#: The longest that an answer may take, in seconds, and its most bytes.
_LONGEST_S = 30.0
_MAX_BYTES = 512 * 1024
_DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
#: How long a person may take to log in in the browser, in seconds.
_BROWSER_S = 300.0


class Denied(Unauthenticated):
    """The provider refuses, and says so; ``code`` is its word for why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class CodeRequest:
    """What ties the answer to a login by an authorization code to the request: its state, and PKCE's verifier."""

    state: str
    verifier: str

    @classmethod
    def new(cls) -> CodeRequest:
        """Return one that nobody can guess."""
        return cls(secrets.token_urlsafe(24), secrets.token_urlsafe(48))

    @property
    def challenge(self) -> str:
        """The verifier's digest, which the login page is given (RFC 7636, S256)."""
        digest = hashlib.sha256(self.verifier.encode()).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def login_page(
    endpoints: Mapping[str, Any],
    client_id: str,
    scopes: str,
    redirect_uri: str,
    asked: CodeRequest,
    parameters: Mapping[str, str],
) -> str:
    """Return the address of an issuer's page to log in at, which leads to ``redirect_uri``."""
    query = {
        "client_id": client_id,
        "response_type": "code",
        "redirect_uri": redirect_uri,
        "scope": scopes,
        "state": asked.state,
        "code_challenge": asked.challenge,
        "code_challenge_method": "S256",
        **parameters,
    }
    return f"{endpoints['authorization_endpoint']}?{urlencode(query)}"


class IdentityProvider:
    """An issuer, as a public client of it sees it. Its methods raise Denied and IssuerUnavailable."""

    def __init__(
        self,
        issuer: str,
        client_id: str,
        ca: str = "",
        parameters: Mapping[str, str] | None = None,
        secret: str = "",
    ) -> None:
        """``secret`` is that of a client which is a server; a public one has none."""
        self.issuer = issuer
        self._client_id = client_id
        self._secret = {"client_secret": secret} if secret else {}
        self._parameters = dict(parameters or {})
        context = ssl.create_default_context(cadata=ca or None)
        self._http = httpx.Client(verify=context, timeout=_TIMEOUT_S)

    def __enter__(self) -> IdentityProvider:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def discover(self) -> dict[str, Any]:
        """Return the issuer's description of itself."""
        found = self._answer("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self.issuer:
            raise IssuerUnavailable(f"{self.issuer} describes another issuer; ask the pool's administrator")
        for name, value in found.items():
            if name.endswith("_endpoint") and not str(value).startswith("https://"):
                raise IssuerUnavailable(f"{self.issuer} has a {name} without https; ask its administrator")
        return found

    def by_device(
        self, endpoints: Mapping[str, Any], scopes: str, show: Callable[[str, str], None]
    ) -> dict[str, Any]:
        """Log in on any device: ``show`` is called with an address and a code. Returns the tokens."""
        if "device_authorization_endpoint" not in endpoints:
            raise Denied(f"{self.issuer} has no login by a device code; leave out --device", "unsupported")
        begun = self._post(endpoints["device_authorization_endpoint"], scope=scopes)
        show(begun.get("verification_uri_complete") or begun["verification_uri"], begun["user_code"])
        interval_s = float(begun.get("interval", 5))
        deadline = time.monotonic() + float(begun["expires_in"])
        while time.monotonic() < deadline:
            time.sleep(interval_s)
            try:
                return self._post(
                    endpoints["token_endpoint"], grant_type=_DEVICE, device_code=begun["device_code"]
                )
            except Denied as e:
                if e.code == "slow_down":
                    interval_s += 5
                elif e.code != "authorization_pending":
                    raise
        raise Denied("nobody confirmed the login in time; run gpupool login again", "expired_token")

    def by_browser(
        self, endpoints: Mapping[str, Any], scopes: str, open_page: Callable[[str], None]
    ) -> dict[str, Any]:
        """Log in in this machine's browser, by an authorization code with PKCE. Returns the tokens."""
        asked = CodeRequest.new()
        with _Callback() as callback:
            open_page(login_page(endpoints, self._client_id, scopes, callback.url, asked, self._parameters))
            answer = callback.wait(asked.state, _BROWSER_S)
        return self.redeem(endpoints, answer, callback.url, asked)

    def redeem(
        self,
        endpoints: Mapping[str, Any],
        answer: Mapping[str, str],
        redirect_uri: str,
        asked: CodeRequest,
    ) -> dict[str, Any]:
        """Return the tokens for the answer that came to ``redirect_uri``, whose state the caller has compared."""
        if answer.get("iss", self.issuer) != self.issuer:
            raise Denied("another issuer answered the login; log in again", "invalid_issuer")
        if "code" not in answer:
            why = answer.get("error_description") or answer.get("error") or "nobody logged in in time"
            raise Denied(f"the login did not succeed: {' '.join(why.split())[:200]}", answer.get("error", ""))
        return self._post(
            endpoints["token_endpoint"],
            grant_type="authorization_code",
            code=answer["code"],
            redirect_uri=redirect_uri,
            code_verifier=asked.verifier,
        )

    def refresh(self, token_endpoint: str, refresh_token: str) -> dict[str, Any]:
        """Return new tokens for a refresh token."""
        return self._post(token_endpoint, grant_type="refresh_token", refresh_token=refresh_token)

    def revoke(self, revocation_endpoint: str, refresh_token: str) -> None:
        """Make a refresh token worthless."""
        self._post(revocation_endpoint, token=refresh_token, token_type_hint="refresh_token")

    def _post(self, url: str, **form: str) -> dict[str, Any]:
        data = {"client_id": self._client_id, **self._secret, **form, **self._parameters}
        return self._answer("POST", url, data)

    def _answer(self, method: str, url: str, form: Mapping[str, str] | None = None) -> dict[str, Any]:
        try:
            status, body = self._read(method, url, form)
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise IssuerUnavailable(f"{self.issuer} does not answer ({e or type(e).__name__})") from None
        try:
            found = json.loads(body) if body else {}
        except (ValueError, RecursionError):
            found = None
        if status == 200 and isinstance(found, dict):
            return found
        if isinstance(found, dict) and "error" in found and status < 500:
            code = str(found["error"])
            why = " ".join(str(found.get("error_description") or code).split())[:200]
            raise Denied(f"{self.issuer} refuses: {why}", code)
        raise IssuerUnavailable(f"{self.issuer} answered with status {status}")

    def _read(self, method: str, url: str, form: Mapping[str, str] | None) -> tuple[int, bytes]:
        """Return the status and the body of an answer, which may be neither endless nor slow for ever."""
        until, body = time.monotonic() + _LONGEST_S, b""
        headers = {"Accept-Encoding": "identity"}  # a few bytes could expand to any number
        with self._http.stream(method, url, data=form, headers=headers) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise httpx.ReadError("its answer is compressed, which nobody asked for")
            for part in answer.iter_bytes():
                body += part
                if len(body) > _MAX_BYTES or time.monotonic() > until:
                    raise httpx.ReadError("its answer is too long, or too slow")
        return answer.status_code, body


class _Callback:
    """Waits on the loopback for the page that a browser is sent to after the login."""

    def __init__(self) -> None:
        found: list[dict[str, str]] = []
        self._found = found

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path == "/callback":
                    found.append({name: values[0] for name, values in parse_qs(parts.query).items()})
                text = b"<title>GPU pool</title><p>You can close this page.</p>"
                self.send_response(200 if parts.path == "/callback" else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass  # the address has the code

        self._server = HTTPServer(("127.0.0.1", 0), Page)
        self.url = f"http://127.0.0.1:{self._server.server_port}/callback"

    def __enter__(self) -> _Callback:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def wait(self, state: str, timeout_s: float) -> dict[str, str]:
        """Return the answer with that state, or nothing; others may have opened the page."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._server.timeout = left_s
            self._server.handle_request()
            for answer in self._found:
                if secrets.compare_digest(answer.get("state", "").encode(), state.encode()):
                    return answer
            self._found.clear()
        return {}
