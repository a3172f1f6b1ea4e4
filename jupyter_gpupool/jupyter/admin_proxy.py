"""Administrative calls, passed on to the pool that this server joined with an administrator's bundle."""

from __future__ import annotations

from typing import Any

from jupyter_server.base.handlers import APIHandler
from tornado import web

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.server.http.handlers import MAX_BODY, PREFIX, BaseHandler, in_jupyter

from .pool_backend import GPUPool

_SEGMENT = "[A-Za-z0-9_@%-][A-Za-z0-9_@.%-]{0,127}"
#: The paths that are passed on. The pool itself decides what the token permits.
_PATH = rf"((?:tokens|servers)(?:/{_SEGMENT}){{0,4}})"


class _PassedOn(BaseHandler, APIHandler):  # type: ignore[misc]  # both define prepare()
    """Passes a call on. Every user with write access to this server acts with the one token of the bundle."""

    service: GPUPool
    administrators_only = True

    @web.authenticated
    async def _pass_on(self, path: str) -> None:
        body = self.request.body
        if len(body) > MAX_BODY:
            raise InvalidRequest(f"the body has {len(body)} bytes; send at most {MAX_BODY}")
        raw = self.request.path.rpartition(f"{PREFIX}/")[2]  # undecoded, because a name may contain %2F
        # The query may contain Jupyter's own token, which must not leave this server.
        query = {
            name: values
            for name, values in self.request.query_arguments.items()
            if name not in ("token", "_xsrf")
        }
        passed = await self.service.administer(
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


def administrative_handlers(service: GPUPool) -> list[tuple[Any, ...]]:
    """Return the handlers, which must precede those of the pool's own calls."""
    return [(rf"{PREFIX}/{_PATH}", in_jupyter(_PassedOn), {"service": service})]
