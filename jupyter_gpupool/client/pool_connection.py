"""How a call reaches a pool: its servers and tokens, what is tried again, and refusals as exceptions."""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx

from jupyter_gpupool.core import errors
from jupyter_gpupool.core.api import PREFIX

from . import bundle
from .sign_in import FreshToken

#: How long calls are retried while a pool restarts, in seconds.
PATIENCE_S = 5.0
#: How long another of several servers may take to become the leader, in seconds.
TAKEOVER_S = 12.0

#: How long it may take to connect to one of several servers, in seconds.
CONNECT_TIMEOUT_S = 3.0

#: How long a call waits in all where the pool allows only so many per second, in seconds.
MAX_RATE_WAIT_S = 60.0

#: Message for calls about tokens to a pool that has none.
NOT_OFFERED = (
    "this pool serves a single user and has no tokens; `gpupool server init` creates a server that has them"
)

#: How often a client turns to another pool because the one that it used has ended.
_MAX_SUCCESSORS = 2

_log = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", bound="PoolConnection")


class Passed(NamedTuple):
    """A pool's answer, to be passed on."""

    status: int
    headers: dict[str, str]
    body: bytes


class PoolConnection:
    """Calls of one pool. Several threads may make them at once; it is a context manager.

    ``timeout_s``: longest time to wait for an answer. ``patience_s``: how long to retry while no server answers.
    ``ca``: the certificate (PEM) of the only authority to trust (default: those that this system trusts).
    ``also``: addresses of the pool's other servers. A server that does not answer, or is not the leader, is skipped;
    ``patience_s`` is then at least the time until another one leads.
    ``bundled``: the token is that of the installed bundle, which is read again where the pool refuses the token.
    ``login``: the file of a login, whose token is used and refreshed.
    ``successor``: returns the address and token of a pool to use where this one has ended before a request reached it.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        timeout_s: float = 10.0,
        patience_s: float = PATIENCE_S,
        ca: str = "",
        also: Sequence[str] = (),
        successor: Callable[[], tuple[str, str]] | None = None,
        bundled: bool = False,
        login: str = "",
    ) -> None:
        self._urls = list(dict.fromkeys(_checked(u) for u in (url, *also)))
        self._at = 0  # index of the server that answered last
        self.ca = ca
        self._timeout_s = timeout_s
        self._successor = successor
        self._patience_s = patience_s if len(self._urls) == 1 else max(patience_s, TAKEOVER_S)
        self.secure = all(u.startswith("https:") for u in self._urls)
        self._token = token
        self._bundled = bundled
        self._login = login
        self._fresh = FreshToken(login) if login else None
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.context = _context(ca) if ca else None
        # trust_env=False: the pool is reached directly, never through a web proxy.
        self._http = httpx.Client(headers=self.headers, trust_env=False, verify=self.context or True)

    @property
    def url(self) -> str:
        """The address at which the pool answered last."""
        return self._urls[self._at]

    def settings(self) -> dict[str, Any]:
        """Return the arguments, as JSON, that create the same client in another process. They contain the token."""
        return {
            "url": self.url,
            "token": self._token,
            "timeout_s": self._timeout_s,
            "patience_s": self._patience_s,
            "ca": self.ca,
            "also": self._urls,
            "bundled": self._bundled,
            "login": self._login,
        }

    def authorize(self) -> None:
        """Refresh the token of a login where it is due. Raises Unauthenticated where the user has to log in again."""
        if self._fresh is not None:
            self._use_token(self._fresh.get())

    def close(self) -> None:
        """Close all connections. Later calls raise RuntimeError."""
        self._http.close()

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- calls

    def pass_on(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, accept: str
    ) -> Passed:
        """Pass on a call and return the pool's own answer. Only a call that reads is retried."""
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError):
            raise errors.InvalidRequest("the body is not JSON") from None
        patience = self._patience_s if method == "GET" else 0.0
        response = self._send(
            method, path, query, content, 20.0, {"Accept": accept}, patience, rate_wait_s=0.0
        )
        answer = _json(response)
        if response.status_code == 404 and isinstance(answer, dict) and answer.get("error") == "HTTPError":
            raise errors.NotSupported(NOT_OFFERED)
        if response.status_code in (401, 403):
            raise self._refusal(response, answer)
        kept = ("Content-Type", "Content-Disposition", "Retry-After")
        headers = {name: response.headers[name] for name in kept if name in response.headers}
        return Passed(response.status_code, headers, response.content)

    def _token_call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        wait_s: float = 0.0,
        unsure: str = "",
    ) -> dict[str, Any]:
        response = self._send(method, path, None, body, wait_s, unsure=unsure)
        answer = _json(response)
        if response.status_code in (200, 201) and isinstance(answer, dict):
            return answer
        if response.status_code == 404 and isinstance(answer, dict) and answer.get("error") == "HTTPError":
            raise errors.NotSupported(NOT_OFFERED)
        raise self._refusal(response, answer)

    def _with_successor(self, call: Callable[[], T]) -> T:
        """Return the call's answer; make it again at another pool where this one has ended. Raises PoolError."""
        for _ in range(_MAX_SUCCESSORS):
            try:
                return call()
            except errors.PoolUnreachable:
                if self._successor is None:
                    raise
                url, token = self._successor()
                self._urls, self._at = [_checked(url)], 0
                self._use_token(token)
        return call()

    def _call(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
        wait_s: float = 0.0,
        expect: tuple[int, ...] = (200, 201, 202),
    ) -> dict[str, Any]:
        response = self._send(method, path, query, body, wait_s)
        answer = _json(response)
        if response.status_code in expect and isinstance(answer, dict):
            return answer
        raise self._refusal(response, answer)

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None,
        body: Any,
        wait_s: float,
        headers: dict[str, str] | None = None,
        patience_s: float | None = None,
        unsure: str = "",
        rate_wait_s: float = MAX_RATE_WAIT_S,
    ) -> httpx.Response:
        """Send a call; retry until ``patience_s``, so that callers survive a restart or a change of leader.

        A call that came too soon after others was not made; it is made again when the pool allows it, after
        ``rate_wait_s`` in all at most.

        Almost all calls are idempotent. For one that is not, ``unsure`` is the advice in the PoolUnreachable that is
        raised when the first attempt may have succeeded.
        """
        # One of several servers that cannot be reached is soon passed over; the only one may be busy.
        connect_s = CONNECT_TIMEOUT_S if len(self._urls) > 1 else max(CONNECT_TIMEOUT_S, self._timeout_s)
        timeout = httpx.Timeout(self._timeout_s, read=self._timeout_s + wait_s, connect=connect_s)
        deadline = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        pause, tried = 0.05, 0
        while True:
            self.authorize()
            at = self._at
            url = self._urls[at]
            refusal: errors.PoolError | None
            try:
                response = self._http.request(
                    method, f"{url}{PREFIX}{path}", params=query, json=body, headers=headers, timeout=timeout
                )
                if response.status_code == errors.Unauthenticated.status and self._has_new_token(response):
                    continue
                refusal = self._not_leading(response)
                if refusal is None:
                    too_soon_s = _too_soon(response)
                    if too_soon_s is None or too_soon_s > rate_wait_s:
                        return response
                    rate_wait_s -= too_soon_s
                    deadline += too_soon_s
                    _log.warning("%s; waiting %g s", self._refusal(response, _json(response)), too_soon_s)
                    time.sleep(too_soon_s)
                    continue
            except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as e:
                self._refuse_certificate(e)
                self._refuse_repetition(e, url, unsure)
                everywhere = " or ".join(self._urls)
                refusal = errors.PoolUnreachable(f"no GPU pool answers at {everywhere} ({_why(e)})")
            except httpx.TimeoutException as e:
                self._refuse_repetition(e, url, unsure)
                refusal = errors.PoolUnreachable(f"the GPU pool at {url} does not answer ({_why(e)})")
                if len(self._urls) == 1:
                    raise refusal from None
            except httpx.HTTPError as e:
                raise errors.PoolUnreachable(f"cannot reach the GPU pool at {url} ({_why(e)})") from None
            tried += 1
            # A server that does not lead has changed nothing, so it is safe to try the others.
            has_untried = isinstance(refusal, errors.NotLeading) and tried < len(self._urls)
            if time.monotonic() + pause > deadline and not has_untried:
                raise refusal from None
            if self._at == at:  # else another thread has switched already
                self._at = (at + 1) % len(self._urls)
            if tried % len(self._urls) == 0:
                time.sleep(pause)
                pause = min(1.0, pause * 2)

    def _has_new_token(self, response: httpx.Response) -> bool:
        """Use the token that the bundle has by now; return whether it is not the one that was refused."""
        if not self._bundled:
            return False
        try:
            installed = bundle.find()
        except errors.InvalidRequest:
            return False  # it is being replaced, or the pool's refusal says more
        request = response.request
        if installed is None or not installed.token or not installed.covers(str(request.url)):
            return False
        self._use_token(installed.token)
        return bool(request.headers.get("Authorization") != self.headers["Authorization"])

    def _use_token(self, token: str) -> None:
        self._token = token
        self.headers = {"Authorization": f"Bearer {token}"}
        self._http.headers.update(self.headers)

    def _not_leading(self, response: httpx.Response) -> errors.PoolError | None:
        if response.status_code != errors.NotLeading.status:
            return None
        refusal = self._refusal(response, _json(response))
        return refusal if isinstance(refusal, errors.NotLeading) else None

    def _refuse_repetition(self, error: Exception, url: str, unsure: str) -> None:
        """Raise PoolUnreachable where a call that must not be repeated may have reached the pool."""
        if unsure and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise errors.PoolUnreachable(
                f"the connection to the GPU pool at {url} broke before it answered ({_why(error)}); {unsure}"
            ) from None

    def _refuse_certificate(self, error: BaseException) -> None:
        """Raise PoolUnreachable if TLS failed: retrying does not help then."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise errors.PoolUnreachable(
                f"the certificate of the GPU pool at {self.url} is not trusted "
                f"({cause.verify_message}); check the address, or get a new ca.crt from the pool's administrator"
            ) from None
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            raise errors.PoolUnreachable(
                f"no TLS 1.3 with the GPU pool at {self.url} ({cause.reason or cause}); is a `gpupool server` there?"
            ) from None

    def _refusal(self, response: httpx.Response, answer: Any) -> errors.PoolError:
        if isinstance(answer, dict) and isinstance(answer.get("message"), str):
            kind = getattr(errors, str(answer.get("error")), None)
            message = answer["message"]
            is_clear = kind is not errors.Unauthenticated or message.startswith("Token ")
            if isinstance(kind, type) and issubclass(kind, errors.PoolError) and is_clear:
                return kind(message)
        else:
            message = f"it answered with status {response.status_code}, so it is not a GPU pool"
        if response.status_code in (401, 403):
            return errors.Unauthenticated(f"the GPU pool at {self.url} does not admit this client: {message}")
        return errors.PoolUnreachable(f"the GPU pool at {self.url}: {message}")


def _too_soon(response: httpx.Response) -> float | None:
    """Return after how many seconds the pool allows the call that it refused; None if it was refused for good."""
    after = response.headers.get("Retry-After", "")
    is_limited = response.status_code == errors.TooManyRequests.status and after.isascii() and after.isdigit()
    return max(1.0, float(after)) if is_limited else None


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as e:
        raise errors.PoolUnreachable(f"{url!r} is no address of a GPU pool: {e}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise errors.PoolUnreachable(f"{url!r} is no address of a GPU pool; write it as https://host:56001")
    return url.rstrip("/")


def _context(ca: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=ca)
    except ssl.SSLError:
        raise errors.InvalidRequest("ca.crt contains no certificate; copy it from the bundle again") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
