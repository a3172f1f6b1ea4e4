"""The calls about GPU servers, which are asked of the pool itself, never through a Jupyter server."""

from __future__ import annotations

from ..pool.errors import InvalidRequest
from .handlers import Calls, check_types


class ServerCall(Calls):
    administrators_only = True

    async def change(self, name: str) -> None:
        body = self.body()
        check_types(body, {"draining": (bool,)})
        if "draining" not in body:
            raise InvalidRequest("draining is missing: true or false")
        await self.service.drain(name, body["draining"])
        self.reply({"name": name, "draining": body["draining"]})


#: For :func:`~.handlers.standalone_application`.
SERVERS: list[tuple[str, type[Calls]]] = [(r"/servers/([^/]{1,255})", ServerCall)]
