"""The calls about the pool as a whole: its state, its health and its description."""

from __future__ import annotations

import time

from tornado import web

from jupyter_gpupool.server.service import health_monitor

from .base import BaseHandler, Route
from .openapi.document import document


class PoolHandler(BaseHandler):
    """``GET pool`` returns servers, GPUs, slices and the queue."""

    @web.authenticated
    async def get(self) -> None:
        self.reply(await self.service.pool(self.scope()))


class HealthHandler(BaseHandler):
    """``GET health`` returns the results of the health checks; 503 if one fails."""

    @web.authenticated
    async def get(self) -> None:
        at, checks = await self.service.health()
        body = health_monitor.document(at, checks, time.time())
        self.reply(body, 503 if body["status"] == "failing" else 200)


class OpenAPIHandler(BaseHandler):
    """``GET openapi.json`` describes the interface."""

    @web.authenticated
    async def get(self) -> None:
        self.reply(document())


class NoSuchHandler(BaseHandler):
    """Whatever no other handler answers."""

    @web.authenticated
    async def get(self, path: str = "") -> None:
        raise web.HTTPError(404, "there is no such call; see openapi.json")

    post = put = patch = delete = get


#: Path below the prefix → the handler.
ROUTES: list[Route] = [
    ("/pool", PoolHandler),
    ("/health", HealthHandler),
    (r"/openapi\.json", OpenAPIHandler),
]
