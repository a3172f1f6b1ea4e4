"""An administrator's calls, passed on to the pool that this server joined with an administrator's bundle."""

from __future__ import annotations

from typing import cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from ..api.handlers import MAX_BODY, PREFIX, Calls, in_jupyter
from ..api.service import PoolService
from ..pool.errors import InvalidRequest
from .user_pool import GPUPool

_SEGMENT = "[A-Za-z0-9_@%-][A-Za-z0-9_@.%-]{0,127}"
#: What is passed on; the pool itself decides who may do what there.
_PATH = rf"((?:tokens|servers)(?:/{_SEGMENT}){{0,4}})"


class _PassedOn(Calls, APIHandler):
    """Everybody who may change something on this server acts with the one token of the bundle."""

    @web.authenticated
    @authorized("write")
    async def _pass_on(self, path: str) -> None:
        body = self.request.body
        if len(body) > MAX_BODY:
            raise InvalidRequest(f"the body has {len(body)} bytes; {MAX_BODY} are allowed")
        raw = self.request.path.rpartition(f"{PREFIX}/")[2]  # as it came, where a name holds %2F
        # Jupyter's own token may be in the query; it is nobody else's business.
        query = {
            name: values
            for name, values in self.request.query_arguments.items()
            if name not in ("token", "_xsrf")
        }
        passed = await cast(GPUPool, self.service).administer(
            str(self.request.method),
            f"/{raw}",
            {name: [value.decode(errors="replace") for value in values] for name, values in query.items()},
            body,
            self.request.headers.get("Accept", ""),
        )
        self.set_status(passed.status)
        self.set_header("Cache-Control", "no-store")
        for name, value in passed.headers.items():
            self.set_header(name, value)
        await self.finish(
            passed.body, set_content_type=passed.headers.get("Content-Type", "application/json")
        )

    get = post = put = patch = delete = _pass_on


def administrative_handlers(service: PoolService) -> list[tuple]:
    """To be matched before the pool's own calls."""
    return [(rf"{PREFIX}/{_PATH}", in_jupyter(_PassedOn), {"service": service})]
