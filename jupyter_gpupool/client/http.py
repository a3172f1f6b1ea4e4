"""The client of a pool: its HTTP interface as methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jupyter_gpupool.core.models import AskedBack, Lease, LeaseState, Parked, Request, Slice, WorkerAddress
from jupyter_gpupool.core.request_schema import FORECAST, body_of, query_of
from jupyter_gpupool.core.validation import check_memory

from .pool_connection import PoolConnection


class PoolClient(PoolConnection):
    """A client of one pool: each of its calls is a method.

    Every method raises a PoolError: the pool's refusal, or PoolUnreachable. Leases are returned as
    :class:`.models.Lease`, other answers as the JSON that docs/reference/http.md describes.
    """

    def pool(self) -> dict[str, Any]:
        """Return the pool's servers, GPUs, slices and queue."""
        return self._with_successor(lambda: self._call("GET", "/pool"))

    def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        """Request GPUs. Return when the worker runs, at the latest after ``wait_s`` seconds. May be repeated."""
        body = body_of(request)
        lease = _lease(
            self._with_successor(lambda: self._call("POST", "/leases", {"wait": wait_s}, body, wait_s))
        )
        self._successor = None  # the lease is this pool's, and so are all calls that follow
        return lease

    def forecast(self, request: Request) -> dict[str, Any]:
        """Return what would happen to the request now: outcome, position, reason, slices."""
        return self._call("GET", "/forecast", query_of(request, FORECAST))

    def wait(self, lease_id: str, known: Lease | None = None, wait_s: float = 10.0) -> Lease:
        """Return the lease as soon as it differs from ``known``, at the latest after ``wait_s`` (≤ 30) seconds."""
        query: dict[str, Any] = {"wait": wait_s if known else 0}
        if known is not None:
            query["state"] = known.state.value
            if known.position is not None:
                query["position"] = known.position
        return _lease(self._call("GET", f"/leases/{lease_id}", query, wait_s=wait_s))

    def lease(self, lease_id: str) -> Lease:
        """Return the lease as it is now."""
        return self.wait(lease_id)

    def leases(self, include_ended: bool = False, mine: bool = False) -> list[Lease]:
        """Return the leases that the caller may see. ``mine``: only the caller's own, also for administrators."""
        query = {name: "1" for name, wanted in (("all", include_ended), ("mine", mine)) if wanted}
        found = self._call("GET", "/leases", query)
        return [_lease(item) for item in found["leases"]]

    def heartbeat(self, lease_id: str) -> Lease:
        """Keep the lease or the queued request alive for another TTL."""
        return _lease(self._call("POST", f"/leases/{lease_id}/heartbeat"))

    def release(self, lease_id: str) -> Lease:
        """Release the lease, or withdraw the queued request."""
        return _lease(self._call("DELETE", f"/leases/{lease_id}"))

    def history(
        self, since: float | None = None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Return utilization over time.

        ``since``: seconds since the epoch; ``step``: seconds; ``gpus``: also of GPUs with these uuids, None for all.
        """
        query = {"since": since, "step": step, "gpu": "all" if gpus is None else list(gpus)}
        return self._call("GET", "/history", {k: v for k, v in query.items() if v is not None})

    def resize(self, lease_id: str, partial: float | None = None, memory_mib: int | None = None) -> Lease:
        """Change the memory of the lease's slices. When this returns, the worker enforces the new limits."""
        check_memory(partial, memory_mib)
        body = {"partial": partial} if memory_mib is None else {"memory_mib": memory_mib}
        return _lease(self._call("PATCH", f"/leases/{lease_id}", None, body, wait_s=20.0))

    def my_server(self) -> tuple[Lease | None, str]:
        """Return the lease that a hub's pool acquired for the calling server, and its secret."""
        answer = self._call("GET", "/hub/mine")
        return (_lease(answer["lease"]) if answer["lease"] else None), answer["secret"]

    def hold_my_server(self) -> None:
        """Report that the calling server holds that lease from now on."""
        self._call("POST", "/hub/mine")

    def extend(self, lease_id: str, seconds: float) -> Lease:
        """Extend the lease, as far as its namespace allows."""
        return _lease(self._call("PATCH", f"/leases/{lease_id}", None, {"extend_s": seconds}))

    def ask(self, lease_id: str, message: str = "") -> dict[str, Any]:
        """Ask the holder, if the caller may know the holder's name, to release the lease: ``{"lease", "owner"}``."""
        return self._call("POST", f"/leases/{lease_id}/ask", None, {"message": message})

    def keep(self, lease_id: str) -> Lease:
        """Keep an idle lease: its holder still needs it."""
        return _lease(self._call("POST", f"/leases/{lease_id}/keep"))

    def whoami(self) -> dict[str, Any]:
        """Return ``{"owner", "administers", "namespace", "role", "namespaces": {name: role}}``."""
        return self._call("GET", "/whoami")

    def login_offer(self) -> dict[str, Any]:
        """Return the identity providers to log in at: ``{"issuers": [...]}``. Needs no token."""
        return self._token_call("GET", "/login")

    def namespaces(self) -> list[dict[str, Any]]:
        """Return the namespaces that the caller is a member of."""
        return list(self._call("GET", "/namespaces")["namespaces"])

    def create_namespace(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Create a namespace. For administrators. Raises NamespaceConflict if it exists, so do not repeat the call."""
        return self._call("POST", "/namespaces", None, {"name": name, **fields})

    def change_namespace(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Change the given fields of a namespace."""
        return self._call("PATCH", f"/namespaces/{quote(name, '')}", None, dict(fields))

    def delete_namespace(self, name: str) -> dict[str, Any]:
        """Delete a namespace. Raises NamespaceConflict while it has leases or tokens."""
        return self._call("DELETE", f"/namespaces/{quote(name, '')}")

    def set_member(self, name: str, user: str, role: str) -> dict[str, Any]:
        """Add a member to a namespace, or change the member's role."""
        path = f"/namespaces/{quote(name, '')}/members/{quote(user, '')}"
        return self._call("PUT", path, None, {"role": role})

    def remove_member(self, name: str, user: str) -> dict[str, Any]:
        """Remove a member from a namespace."""
        return self._call("DELETE", f"/namespaces/{quote(name, '')}/members/{quote(user, '')}")

    def audit(self, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """Return the newest ``limit`` entries of the audit log since ``since``, oldest first. For administrators."""
        return list(self._call("GET", "/audit", {"since": since, "limit": limit})["entries"])

    def usage(self, by: str = "user", since: float | None = None) -> dict[str, Any]:
        """Return GPU-hours by ``user``, ``namespace`` or ``gpu``: the caller's, or everybody's for administrators.

        ``since``: seconds since the epoch (default: as far back as the pool knows).
        """
        return self._call("GET", "/usage", {"by": by, **({} if since is None else {"since": since})})

    def drain(self, server: str, draining: bool = True, move: bool = False) -> dict[str, Any]:
        """Grant nothing new on that server, or grant on it again. For administrators.

        ``move``: its leases begin to move to other servers; :meth:`drained` tells how far they are.
        """
        body = {"draining": draining, **({"move": True} if move else {})}
        found: dict[str, Any] = self._call("PATCH", f"/servers/{quote(server, safe='')}", None, body)
        return found

    def drained(self, server: str) -> dict[str, Any]:
        """Return whether that server is drained, and what became of its leases. For administrators."""
        found: dict[str, Any] = self._call("GET", f"/servers/{quote(server, safe='')}", None)
        return found

    def tokens(self) -> list[dict[str, Any]]:
        """Return all tokens. For administrators, as are all calls about tokens."""
        return list(self._token_call("GET", "/tokens")["tokens"])

    def create_token(self, description: str, expires_s: float | None, **fields: Any) -> dict[str, Any]:
        """Create a token: its listing, with ``token`` (its text) and ``files`` (the bundle).

        The call is not retried once the pool may have created the token.
        """
        body = {"description": description, "expires_s": expires_s, **fields}
        unsure = "the token may have been created; look for it with `gpupool token list` before you try again"
        return self._token_call("POST", "/tokens", body, unsure=unsure)

    def extend_token(self, token_id: str, expires_s: float | None) -> dict[str, Any]:
        """Set a token's lifetime, in seconds from now; None for no end."""
        return self._token_call("PATCH", f"/tokens/{token_id}", {"expires_s": expires_s})

    def revoke_token(self, token_id: str, end_leases: bool = False) -> dict[str, Any]:
        """Revoke a token; with ``end_leases``, also end its leases."""
        return self._token_call("DELETE", f"/tokens/{token_id}?end_leases={int(end_leases)}", wait_s=20.0)

    def health(self) -> dict[str, Any]:
        """Return the pool's health: ``{"status", "checks"}``; also of a pool that is failing."""
        return self._with_successor(lambda: self._call("GET", "/health", expect=(200, 503)))


def _lease(data: dict[str, Any]) -> Lease:
    """Return the lease that :meth:`Lease.to_json` wrote, without fields that this version does not have."""
    fields = {k: v for k, v in data.items() if k in Lease.__dataclass_fields__}
    request = {k: v for k, v in data["request"].items() if k in Request.__dataclass_fields__}
    fields["request"] = Request(**request)
    fields["state"] = LeaseState(data["state"])
    fields["slices"] = tuple(Slice(**piece) for piece in data["slices"])
    if data.get("worker"):
        here = data["slices"][0]["server"] if data["slices"] else ""
        others = {name: one for name, one in data.get("workers", {}).items() if name != here}
        elsewhere = {name: WorkerAddress(**one) for name, one in others.items()}
        environment = {name: data.get(name, "") for name in ("environment", "torch")}
        fields["worker"] = WorkerAddress(**data["worker"], elsewhere=elsewhere, **environment)
    fields["asked_back"] = tuple(AskedBack(**one) for one in data.get("asked_back", ()))
    fields["parked"] = Parked(**data["parked"]) if data.get("parked") else None
    fields["moving_to"] = tuple(Slice(**piece) for piece in data.get("moving_to", ()))
    return Lease(**fields)
