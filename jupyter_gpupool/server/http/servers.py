"""The calls about GPU servers, which the pool itself answers, never a Jupyter server."""

from __future__ import annotations

from tornado import web

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Scope
from jupyter_gpupool.core.request_schema import check_types
from jupyter_gpupool.server.service.service import PoolService

from .base import BaseHandler, Route


class ServerHandler(BaseHandler):
    """``PATCH servers/NAME`` drains a GPU server, or places leases on it again; ``GET`` says how far its leases are."""

    service: PoolService
    administrators_only = True
    changes_need = Scope.ADMINISTER

    @web.authenticated
    async def patch(self, name: str) -> None:
        body = self.body()
        check_types(body, {"draining": (bool,), "move": (bool,)})
        if "draining" not in body:
            raise InvalidRequest("draining is missing: give true or false")
        draining, move = body["draining"], body.get("move", False)
        if move and not draining:
            raise InvalidRequest("leases are moved only from a server that is drained")
        self.reply(await self.service.drain(name, draining, move))

    @web.authenticated
    async def get(self, name: str) -> None:
        self.reply(await self.service.drained(name))


#: For :func:`~.handlers.standalone_application`.
SERVERS: list[Route] = [(r"/servers/([^/]{1,255})", ServerHandler)]
