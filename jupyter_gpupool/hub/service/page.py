"""The service's page in a browser: the pool's GPUs, and the leases that the user may see and release."""

from __future__ import annotations

from html import escape
from typing import Any

from jupyterhub.services.auth import HubOAuthenticated
from tornado import web

from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.server.http.console import CONSOLE, ConsoleFiles

from .identity import HubCaller, HubTokens
from .pool import HubPool

_STYLE = """
:root { color-scheme: light dark; }
body { font-family: sans-serif; margin: 2rem; max-width: 70rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #8886; }
"""


class HubConsoleFiles(HubOAuthenticated, ConsoleFiles):
    """The Console, for users who are logged in at the hub. Its calls use the same login."""

    async def prepare(self) -> None:
        await self.hub_auth.get_user(self, sync=False)

    @web.authenticated
    async def get(self, path: str, include_body: bool = True) -> None:  # type: ignore[override]  # untyped decorator
        self.xsrf_token  # noqa: B018  # sets the cookie that the page's calls repeat
        await super().get(path, include_body)


class PageHandler(HubOAuthenticated, web.RequestHandler):
    """The page. It works without scripts: a form releases a lease."""

    def initialize(self, service: HubPool, tokens: HubTokens) -> None:
        self.service = service
        self.tokens = tokens

    async def prepare(self) -> None:
        # Ask the hub asynchronously; `current_user` then has the answer.
        await self.hub_auth.get_user(self, sync=False)

    def _caller(self) -> HubCaller:
        caller = self.tokens.of_model(self.current_user, trusted=True)
        if caller is None:
            raise web.HTTPError(403, "you may not use the GPU pool; ask an administrator of this hub")
        return caller

    @web.authenticated
    async def get(self) -> None:
        caller = self._caller()
        leases = await self.service.leases(caller.scope)
        pool = await self.service.pool(caller.scope)
        self.set_header(
            "Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        )
        self.set_header("Cache-Control", "no-store")
        self.finish(
            f"<!doctype html><html lang=en><meta charset=utf-8><title>GPU pool</title><style>{_STYLE}</style>"
            f'<h1>GPU pool</h1><p><a href="{self._console()}">The Console</a> · '
            f'<a href="{self._home()}">Your servers</a></p>'
            f"{self._gpus(pool)}"
            f"<h2>{'All leases' if caller.administers else 'Your leases'}</h2>{self._leases(leases)}"
        )

    @web.authenticated
    async def post(self) -> None:
        caller = self._caller()
        self.hub_auth.check_xsrf_cookie(self)
        await self.service.release(self.get_body_argument("lease")[:64], caller.scope)
        self.redirect(self.request.path)

    def _console(self) -> str:
        return f"{self.request.path.rstrip('/')}{CONSOLE}/"

    def _home(self) -> str:
        return escape(f"{self.hub_auth.hub_prefix}home")

    def _gpus(self, pool: dict[str, Any]) -> str:
        rows = [
            (
                server["name"],
                f"{gpu['index']}: {gpu['name']}",
                f"{gpu['granted_mib']} of {gpu['memory_mib']} MiB",
            )
            for server in pool["servers"]
            for gpu in server["gpus"]
        ]
        return _table(("Server", "GPU", "Granted"), [[escape(c) for c in row] for row in rows])

    def _leases(self, leases: list[Lease]) -> str:
        token = escape(self.xsrf_token.decode())
        rows = []
        for lease in leases:
            request = lease.request
            state = lease.state.value
            if lease.position is not None:
                state += f", position {lease.position} in the queue"
            button = (
                f'<form method="post"><input type="hidden" name="_xsrf" value="{token}">'
                f'<button name="lease" value="{escape(lease.id)}">{"Leave the queue" if lease.position else "Release"}'
                "</button></form>"
            )
            share = f"{request.partial:g}" if request.partial is not None else f"{request.memory_mib} MiB"
            cells = (request.owner, request.label, f"{request.num_gpus} × {share}", state)
            rows.append([*map(escape, cells), button])
        if not rows:
            return "<p>None.</p>"
        return _table(("User", "Label", "GPU slices", "State", ""), rows)


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a table. The cells are HTML."""
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
