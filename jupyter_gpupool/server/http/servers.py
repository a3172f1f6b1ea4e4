"""The calls about GPU servers, which the pool itself answers, never a Jupyter server."""

from __future__ import annotations

from tornado import web

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.request_schema import check_types
from jupyter_gpupool.server.service.service import PoolService

from .base import BaseHandler, Route


class ServerHandler(BaseHandler):
    """``PATCH servers/NAME`` drains a GPU server, or places leases on it again."""

    service: PoolService
    administrators_only = True

    @web.authenticated
    async def patch(self, name: str) -> None:
        body = self.body()
        check_types(body, {"draining": (bool,)})
        if "draining" not in body:
            raise InvalidRequest("draining is missing: give true or false")
        await self.service.drain(name, body["draining"])
        self.reply({"name": name, "draining": body["draining"]})


#: For :func:`~.handlers.standalone_application`.
SERVERS: list[Route] = [(r"/servers/([^/]{1,255})", ServerHandler)]
