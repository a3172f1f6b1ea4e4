"""The pool's client: its HTTP interface as methods, its refusals as exceptions."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from ..pool import errors
from ..pool.models import AskedBack, Lease, LeaseState, Request, Slice, WorkerAddress
from ..pool.validation import check_memory

_PATH = "/gpupool/api/v1"

#: How long a pool that is restarting is waited for, in seconds.
PATIENCE_S = 5.0
#: How long one of several servers may take until it leads in the place of another, in seconds.
TAKEOVER_S = 12.0

#: Of a pool without tokens and namespaces.
NOT_OFFERED = "this pool is one user's own and has no tokens; `gpupool server init` makes a server that has"


class Passed(NamedTuple):
    """A pool's answer, for somebody else."""

    status: int
    headers: dict[str, str]
    body: bytes


class PoolClient:
    """Talks to one pool. Safe to use from several threads; a context manager.

    ``ca``: the certificate (PEM) of the one authority to trust; without it those that this system trusts.
    ``also``: where the pool's other servers answer, of which one leads: who does not answer, or does not lead, is
    passed over. Then ``patience_s`` is at least what it takes until another one leads.
    Every method raises :mod:`jupyter_gpupool.pool.errors`: what the pool refused, or PoolUnreachable.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        timeout_s: float = 10.0,
        patience_s: float = PATIENCE_S,
        ca: str = "",
        also: Sequence[str] = (),
    ) -> None:
        self._urls = list(dict.fromkeys(_checked(u) for u in (url, *also)))
        self._at = 0  # the one of them that answered last
        self.ca = ca
        self._timeout_s = timeout_s
        self._patience_s = patience_s if len(self._urls) == 1 else max(patience_s, TAKEOVER_S)
        self.secure = all(u.startswith("https:") for u in self._urls)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.context = _context(ca) if ca else None
        # The pool is addressed directly: a proxy for the web has no business here.
        self._http = httpx.Client(headers=self.headers, trust_env=False, verify=self.context or True)

    @property
    def url(self) -> str:
        """Where the pool answered last."""
        return self._urls[self._at]

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> PoolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- calls

    def pool(self) -> dict[str, Any]:
        """Servers, GPUs, slices and queue, as docs/architecture.md describes them."""
        return self._call("GET", "/pool")

    def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        """Request slices; returns when its worker is up, or ``wait_s`` seconds later. Repeatable."""
        body: dict[str, Any] = {
            "id": request.id,
            "num_gpus": request.num_gpus,
            "filters": dict(request.filters),
            "namespace": request.namespace,
            "wait": request.wait,
            "secret_sha256": request.secret_sha256,
            "label": request.label,
            "client": request.client,
        }
        if request.partial is not None:
            body["partial"] = request.partial
        if request.memory_mib is not None:
            body["memory_mib"] = request.memory_mib
        if request.spread:  # a server of before does not know the word
            body["spread"] = True
        return _lease(self._call("POST", "/leases", {"wait": wait_s}, body, wait_s))

    def forecast(self, request: Request) -> dict[str, Any]:
        """What the request would come to if it were made now: outcome, position, reason, slices."""
        query = {
            "num_gpus": request.num_gpus,
            "partial": request.partial,
            "memory_mib": request.memory_mib,
            "namespace": request.namespace,
            "filter": [f"{key}={value}" for key, value in request.filters.items()],
            "spread": "1" if request.spread else None,
        }
        return self._call("GET", "/forecast", {k: v for k, v in query.items() if v is not None})

    def wait(self, lease_id: str, known: Lease | None = None, wait_s: float = 10.0) -> Lease:
        """The lease as soon as it differs from ``known``, at the latest after ``wait_s`` (≤ 30) seconds."""
        query: dict[str, Any] = {"wait": wait_s if known else 0}
        if known is not None:
            query["state"] = known.state.value
            if known.position is not None:
                query["position"] = known.position
        return _lease(self._call("GET", f"/leases/{lease_id}", query, wait_s=wait_s))

    def lease(self, lease_id: str) -> Lease:
        return self.wait(lease_id)

    def leases(self, include_ended: bool = False, mine: bool = False) -> list[Lease]:
        """Those that the caller may see; ``mine``: only its own, though it may administer the pool."""
        query = {name: "1" for name, wanted in (("all", include_ended), ("mine", mine)) if wanted}
        found = self._call("GET", "/leases", query)
        return [_lease(item) for item in found["leases"]]

    def heartbeat(self, lease_id: str) -> Lease:
        return _lease(self._call("POST", f"/leases/{lease_id}/heartbeat"))

    def release(self, lease_id: str) -> Lease:
        return _lease(self._call("DELETE", f"/leases/{lease_id}"))

    def history(
        self, since: float | None = None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Utilisation over time, see docs/architecture.md; of ``gpus`` too, None for all."""
        query = {"since": since, "step": step, "gpu": "all" if gpus is None else list(gpus)}
        return self._call("GET", "/history", {k: v for k, v in query.items() if v is not None})

    def resize(self, lease_id: str, partial: float | None = None, memory_mib: int | None = None) -> Lease:
        """Another share of the lease's GPUs; when this returns its worker keeps to it."""
        check_memory(partial, memory_mib)
        body = {"partial": partial} if memory_mib is None else {"memory_mib": memory_mib}
        return _lease(self._call("PATCH", f"/leases/{lease_id}", None, body, wait_s=20.0))

    def my_server(self) -> tuple[Lease | None, str]:
        """Of a hub's pool, to one of the hub's servers: the lease that was got for it, and that one's secret."""
        said = self._call("GET", "/hub/mine")
        return (_lease(said["lease"]) if said["lease"] else None), said["secret"]

    def hold_my_server(self) -> None:
        """The server that calls holds that lease now."""
        self._call("POST", "/hub/mine")

    def extend(self, lease_id: str, seconds: float) -> Lease:
        """More time, as far as the lease's namespace allows it."""
        return _lease(self._call("PATCH", f"/leases/{lease_id}", None, {"extend_s": seconds}))

    def ask(self, lease_id: str, message: str = "") -> dict[str, Any]:
        """Ask a lease's holder, if the caller may know them, to give it back: ``{"lease", "owner"}``."""
        return self._call("POST", f"/leases/{lease_id}/ask", None, {"message": message})

    def keep(self, lease_id: str) -> Lease:
        """The holder wants it still, though it computes nothing."""
        return _lease(self._call("POST", f"/leases/{lease_id}/keep"))

    def whoami(self) -> dict[str, Any]:
        """``{"owner", "administers", "namespace", "role", "namespaces": {name: role}}``."""
        return self._call("GET", "/whoami")

    def namespaces(self) -> list[dict[str, Any]]:
        """Those that the caller is a member of, as docs/architecture.md describes them."""
        return self._call("GET", "/namespaces")["namespaces"]

    def create_namespace(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """For the pool's administrator. Raises NamespaceConflict, also when it is repeated."""
        return self._call("POST", "/namespaces", None, {"name": name, **fields})

    def change_namespace(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._call("PATCH", f"/namespaces/{quote(name, '')}", None, dict(fields))

    def delete_namespace(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", f"/namespaces/{quote(name, '')}")

    def set_member(self, name: str, user: str, role: str) -> dict[str, Any]:
        path = f"/namespaces/{quote(name, '')}/members/{quote(user, '')}"
        return self._call("PUT", path, None, {"role": role})

    def remove_member(self, name: str, user: str) -> dict[str, Any]:
        return self._call("DELETE", f"/namespaces/{quote(name, '')}/members/{quote(user, '')}")

    def audit(self, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """Who asked for what since then, oldest first; for the pool's administrator."""
        return self._call("GET", "/audit", {"since": since, "limit": limit})["entries"]

    def drain(self, server: str, draining: bool = True) -> None:
        """Place nothing new on that server, or place on it again. For administrators."""
        self._call("PATCH", f"/servers/{quote(server, safe='')}", None, {"draining": draining})

    def tokens(self) -> list[dict[str, Any]]:
        """For administrators, as all calls about tokens."""
        return self._token_call("GET", "/tokens")["tokens"]

    def create_token(self, description: str, expires_s: float | None, **fields: Any) -> dict[str, Any]:
        """The token as it is listed, with ``token`` (its text) and ``files`` (the bundle). Not repeated where it may
        have been made."""
        body = {"description": description, "expires_s": expires_s, **fields}
        unsure = "the token may have been made: `gpupool token list` shows it, `gpupool token revoke` takes it back"
        return self._token_call("POST", "/tokens", body, unsure=unsure)

    def extend_token(self, token_id: str, expires_s: float | None) -> dict[str, Any]:
        return self._token_call("PATCH", f"/tokens/{token_id}", {"expires_s": expires_s})

    def revoke_token(self, token_id: str, end_leases: bool = False) -> dict[str, Any]:
        return self._token_call("DELETE", f"/tokens/{token_id}?end_leases={int(end_leases)}", wait_s=20.0)

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
            raise errors.NotOffered(NOT_OFFERED)
        raise self._refusal(response, answer)

    def pass_on(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, accept: str
    ) -> Passed:
        """A call of somebody else, who is to have the pool's own answer. Tried once, unless it only reads."""
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError):
            raise errors.InvalidRequest("the body is not JSON") from None
        patience = self._patience_s if method == "GET" else 0.0
        response = self._send(method, path, query, content, 20.0, {"Accept": accept}, patience)
        answer = _json(response)
        if response.status_code == 404 and isinstance(answer, dict) and answer.get("error") == "HTTPError":
            raise errors.NotOffered(NOT_OFFERED)
        if response.status_code in (401, 403):
            raise self._refusal(response, answer)
        kept = ("Content-Type", "Content-Disposition")
        headers = {name: response.headers[name] for name in kept if name in response.headers}
        return Passed(response.status_code, headers, response.content)

    def health(self) -> dict[str, Any]:
        """``{"status", "checks"}``; a pool that is failing answers too."""
        return self._call("GET", "/health", expect=(200, 503))

    # -- how

    def _call(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
        wait_s: float = 0.0,
        expect: tuple[int, ...] = (200, 201, 202),
    ) -> Any:
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
    ) -> httpx.Response:
        """Nearly every call here may be repeated harmlessly, so a pool that restarts, or whose lead changes, is waited
        for. ``unsure``: what is to be said of one that may not, where it may have been done."""
        timeout = httpx.Timeout(self._timeout_s, read=self._timeout_s + wait_s, connect=3.0)
        deadline = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        pause, tried = 0.05, 0
        while True:
            at = self._at
            url = self._urls[at]
            refusal: errors.PoolError | None
            try:
                response = self._http.request(
                    method, f"{url}{_PATH}{path}", params=query, json=body, headers=headers, timeout=timeout
                )
                refusal = self._not_leading(response)
                if refusal is None:
                    return response
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
                raise errors.PoolUnreachable(f"the GPU pool at {url} cannot be asked ({_why(e)})") from None
            tried += 1
            # One that does not lead has changed nothing: the others may be asked even where nothing is repeated.
            unasked = isinstance(refusal, errors.NotLeading) and tried < len(self._urls)
            if time.monotonic() + pause > deadline and not unasked:
                raise refusal from None
            if self._at == at:  # else another thread has moved on
                self._at = (at + 1) % len(self._urls)
            if tried % len(self._urls) == 0:
                time.sleep(pause)
                pause = min(1.0, pause * 2)

    def _not_leading(self, response: httpx.Response) -> errors.PoolError | None:
        if response.status_code != errors.NotLeading.status:
            return None
        refusal = self._refusal(response, _json(response))
        return refusal if isinstance(refusal, errors.NotLeading) else None

    def _refuse_repetition(self, error: Exception, url: str, unsure: str) -> None:
        """Raise PoolUnreachable where a call that must not be repeated may have been heard."""
        if unsure and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise errors.PoolUnreachable(
                f"the GPU pool at {url} broke off before it answered ({_why(error)}); {unsure}"
            ) from None

    def _refuse_certificate(self, error: BaseException) -> None:
        """Raise PoolUnreachable where it is TLS that failed: that does not get better by waiting."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise errors.PoolUnreachable(
                f"the GPU pool at {self.url} shows a certificate that this client does not trust "
                f"({cause.verify_message}); get a new ca.crt from its administrator, or check the address"
            ) from None
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            raise errors.PoolUnreachable(
                f"no TLS 1.3 with the GPU pool at {self.url} ({cause.reason or cause}); is a `gpupool server` there?"
            ) from None

    def _refusal(self, response: httpx.Response, answer: Any) -> errors.PoolError:
        if isinstance(answer, dict) and isinstance(answer.get("message"), str):
            kind = getattr(errors, str(answer.get("error")), None)
            message = answer["message"]
            told = kind is not errors.NotAdmitted or message.startswith("Token ")
            if isinstance(kind, type) and issubclass(kind, errors.PoolError) and told:
                return kind(message)
        else:
            message = f"it answered {response.status_code}, which no GPU pool does"
        if response.status_code in (401, 403):
            return errors.NotAdmitted(f"the GPU pool at {self.url} does not admit this client: {message}")
        return errors.PoolUnreachable(f"the GPU pool at {self.url}: {message}")


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as e:
        raise errors.PoolUnreachable(f"{url!r} is no address of a GPU pool: {e}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise errors.PoolUnreachable(f"{url!r} is no address of a GPU pool: it looks like http://host:56001")
    return url.rstrip("/")


def _context(ca: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=ca)
    except ssl.SSLError:
        raise errors.InvalidRequest("ca.crt holds no certificate; copy it from the bundle again") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _lease(data: dict[str, Any]) -> Lease:
    """A lease as :meth:`Lease.to_json` wrote it; fields that this version does not know are left out."""
    fields = {k: v for k, v in data.items() if k in Lease.__dataclass_fields__}
    request = {k: v for k, v in data["request"].items() if k in Request.__dataclass_fields__}
    fields["request"] = Request(**request)
    fields["state"] = LeaseState(data["state"])
    fields["slices"] = tuple(Slice(**piece) for piece in data["slices"])
    if data.get("worker"):
        here = data["slices"][0]["server"] if data["slices"] else ""
        others = {name: one for name, one in data.get("workers", {}).items() if name != here}
        elsewhere = {name: WorkerAddress(**one) for name, one in others.items()}
        fields["worker"] = WorkerAddress(**data["worker"], elsewhere=elsewhere)
    fields["asked_back"] = tuple(AskedBack(**one) for one in data.get("asked_back", ()))
    return Lease(**fields)
