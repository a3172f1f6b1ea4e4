"""What every call of the pool's HTTP interface shares, whichever server answers it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tornado import web

from ..pool.errors import InvalidRequest, PoolError
from ..pool.models import Request
from ..pool.namespaces import DEFAULT
from .auth import Doorkeeper
from .service import PoolService

PREFIX = "/gpupool/api/v1"
MAX_BODY = 64 * 1024
MAX_WAIT_S = 30.0

#: Field of a request's body → the JSON types it may have.
_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "num_gpus": (int,),
    "partial": (int, float, type(None)),
    "memory_mib": (int, type(None)),
    "filters": (dict,),
    "spread": (bool,),
    "namespace": (str,),
    "wait": (bool,),
    "secret_sha256": (str,),
    "label": (str,),
    "client": (str,),
}


#: The same of a body that resizes a lease.
RESIZABLE = {name: _FIELDS[name] for name in ("num_gpus", "partial", "memory_mib")}


class Calls(web.RequestHandler):
    """What every handler shares: the pool, who calls, and how a refusal is told."""

    service: PoolService
    #: The verbs that a token still has when it has expired or was revoked: for what it asked for before.
    last_rights: Sequence[str] = ()
    administrators_only = False
    #: The PoolError by which the call was refused.
    refusal = ""

    def initialize(self, service: PoolService, tokens: Doorkeeper | None = None) -> None:
        self.service = service
        self.tokens = tokens

    def owner(self) -> str:
        """The name whose leases these are."""
        raise NotImplementedError

    def scope(self) -> str | None:
        """Whose leases the caller may see and release: its own, or (None) everybody's."""
        return self.owner()

    def mine(self) -> str | None:
        """The scope of the caller's own leases."""
        return self.scope()

    def namespace(self) -> str:
        """The namespace that the caller is of."""
        return DEFAULT

    async def admitted(self, request: Request) -> Request:
        """The request as the caller may make it. Raises NotAllowed."""
        await self.service.tenants.check_use(self.scope(), request.namespace, request.id)
        return request

    def expects(self, lease_id: str) -> None:
        """The caller asks for a lease of that id."""

    async def keeps(self, lease_id: str) -> None:
        """The caller says that it wants this lease. Raises NotAdmitted where it has lost it."""

    def reply(self, value: Any, status: int = 200) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, PoolError):
            self.refusal = type(error).__name__
            self.reply({"error": type(error).__name__, "message": str(error)}, error.status)
            return
        reason = getattr(error, "log_message", None) or getattr(error, "reason", None) or self._reason
        self.reply({"error": type(error).__name__ if error else "Error", "message": str(reason)}, status_code)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, PoolError):
            super().log_exception(kind, value, trace)

    def seconds(self, name: str) -> float:
        """A query argument in seconds, at most :data:`MAX_WAIT_S`."""
        text = self.get_query_argument(name, "0")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise InvalidRequest(f"{name}={text[:40]}: give seconds from 0 up")
        return min(value, MAX_WAIT_S)

    def number(self, name: str) -> float | None:
        """A query argument that is a finite number; None without it."""
        text = self.get_query_argument(name, None)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) < 1e12:
            raise InvalidRequest(f"{name}={text[:40]}: give a number")
        return value

    def flag(self, name: str) -> bool:
        return self.get_query_argument(name, "0") in ("1", "true")

    def body(self) -> dict[str, Any]:
        if len(self.request.body) > MAX_BODY:
            raise InvalidRequest(f"the body has {len(self.request.body)} bytes; {MAX_BODY} are allowed")
        try:
            value = json.loads(self.request.body or b"{}")
        except (ValueError, RecursionError):
            raise InvalidRequest("the body is not JSON") from None
        if not isinstance(value, dict):
            raise InvalidRequest("the body is not a JSON object")
        return value


def parse_request(body: dict[str, Any], owner: str) -> Request:
    """The request that a body asks for; ``owner`` never comes from it. Raises InvalidRequest."""
    check_types(body, _FIELDS)
    filters = body.get("filters", {})
    if not all(isinstance(v, str) for v in filters.values()):
        raise InvalidRequest("filters maps names to text")
    if "id" not in body:
        raise InvalidRequest("id is missing: choose a uuid, so that the request can be repeated safely")
    return Request(**{**body, "owner": owner})


def check_types(body: dict[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Raise InvalidRequest unless a body has those fields only, with values of their types."""
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:40]!r}; known are {', '.join(fields)}")
    for name, value in body.items():
        kinds = fields[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InvalidRequest(f"{name} is a {type(value).__name__}, not {wanted}")
