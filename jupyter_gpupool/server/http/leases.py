"""The calls about leases: request, wait, keep alive, resize, extend and release them."""

from __future__ import annotations

import re
import uuid

from tornado import web

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.request_schema import FORECAST, SIZE, check_types, from_query, types
from jupyter_gpupool.server.service import traces

from .base import BaseHandler, Route, parse_request


class LeasesHandler(BaseHandler):
    """``GET leases`` lists leases; ``POST leases`` requests GPUs."""

    @web.authenticated
    async def get(self) -> None:
        scope = self.mine() if self.flag("mine") else self.scope()
        leases = await self.service.leases(scope, self.flag("all"))
        if self.flag("mine") and scope is not None:  # without those of others that the caller administers
            leases = [lease for lease in leases if lease.request.owner == scope]
        self.reply({"leases": [lease.to_json() for lease in leases]})

    @web.authenticated
    async def post(self) -> None:
        request = await self.check_request(parse_request(self.body(), self.owner()))
        wait_s = self.seconds("wait")
        self.expect_lease(request.id)
        with self.waiting(wait_s), traces.current.request(self.request.headers, request):
            lease = await self.service.request(request, wait_s)
        await self.keep_lease(lease.id)
        self.reply(lease.to_json(), 201 if lease.state.holds else 202)


class LeaseHandler(BaseHandler):
    """``GET``, ``PATCH`` and ``DELETE leases/ID``: read, resize or extend, and release a lease."""

    last_rights = ("GET", "DELETE")

    @web.authenticated
    async def get(self, lease_id: str) -> None:
        position = self.get_query_argument("position", "")
        if position and not re.fullmatch(r"[0-9]{1,9}", position):
            raise InvalidRequest(f"position={position[:40]}: give a number")
        wait_s = self.seconds("wait")
        with self.waiting(wait_s):
            lease = await self.service.wait(
                lease_id,
                self.scope(),
                wait_s,
                self.get_query_argument("state", None),
                int(position) if position else None,
            )
        self.reply(lease.to_json())

    @web.authenticated
    async def patch(self, lease_id: str) -> None:
        await self.check_lease(lease_id)
        body = self.body()
        check_types(body, {**types(SIZE), "extend_s": (int, float)})
        if "extend_s" in body:
            if len(body) > 1:
                raise InvalidRequest("extend a lease or resize it, one at a time")
            extended = await self.service.tenants.extend(self.scope(), lease_id, body["extend_s"])
            self.reply(extended.to_json())
            return
        if "num_gpus" in body:
            count = (await self.service.wait(lease_id, self.scope(), 0.0)).request.num_gpus
            if body["num_gpus"] != count:
                raise InvalidRequest(
                    f"a lease keeps its number of GPUs ({count}), only their memory can change; "
                    f"to have {body['num_gpus']}, release it and make a new request"
                )
        resized = await self.service.resize(
            lease_id, self.scope(), body.get("partial"), body.get("memory_mib")
        )
        self.reply(resized.to_json())

    @web.authenticated
    async def delete(self, lease_id: str) -> None:
        await self.check_lease(lease_id)
        self.reply((await self.service.release(lease_id, self.scope())).to_json())


class HeartbeatHandler(BaseHandler):
    """``POST leases/ID/heartbeat`` keeps a lease alive."""

    last_rights = ("POST",)

    @web.authenticated
    async def post(self, lease_id: str) -> None:
        await self.check_lease(lease_id)
        lease = await self.service.heartbeat(lease_id, self.scope())
        await self.keep_lease(lease_id)
        self.reply(lease.to_json())


class AskHandler(BaseHandler):
    """``POST leases/ID/ask`` asks a lease's holder to release it."""

    @web.authenticated
    async def post(self, lease_id: str) -> None:
        await self.check_lease(lease_id)
        body = self.body()
        check_types(body, {"message": (str,)})
        self.reply(await self.service.tenants.ask(self.scope(), lease_id, body.get("message", "")))


class KeepHandler(BaseHandler):
    """``POST leases/ID/keep`` keeps a lease that somebody asked for, or that is idle."""

    @web.authenticated
    async def post(self, lease_id: str) -> None:
        await self.check_lease(lease_id)
        self.reply((await self.service.tenants.keep(self.scope(), lease_id)).to_json())


class ForecastHandler(BaseHandler):
    """``GET forecast`` returns the outcome of a request without making it."""

    @web.authenticated
    async def get(self) -> None:
        query = {name: self.get_query_arguments(name) for name in self.request.query_arguments}
        # An id and a secret that are never used.
        body = {**from_query(query, FORECAST), "id": str(uuid.uuid4()), "secret_sha256": "0" * 64}
        request = await self.check_request(parse_request(body, self.owner()))
        self.reply(await self.service.forecast(request))


_LEASE_ID = r"([0-9A-Za-z-]{1,64})"

#: Path below the prefix → the handler.
ROUTES: list[Route] = [
    ("/leases", LeasesHandler),
    (f"/leases/{_LEASE_ID}", LeaseHandler),
    (f"/leases/{_LEASE_ID}/heartbeat", HeartbeatHandler),
    (f"/leases/{_LEASE_ID}/ask", AskHandler),
    (f"/leases/{_LEASE_ID}/keep", KeepHandler),
    ("/forecast", ForecastHandler),
]
