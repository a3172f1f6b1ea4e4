"""The hub's calls to its GPU pool service, made from the hub's process with the service's token."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from jupyter_gpupool.core import errors

from .options import ServerStart

#: How long a call retries while the service restarts, in seconds.
PATIENCE_S = 30.0
#: How long one call waits for news, in seconds. These calls also keep a queued request alive.
NEWS_S = 4.0


class Service:
    """A client of the service. All calls raise :mod:`jupyter_gpupool.core.errors`."""

    def __init__(self, url: str, token: str, ca_file: str = "") -> None:
        self._url = f"{url.rstrip('/')}/gpupool/api/v1/hub"
        self._token = token
        self._ca_file = ca_file
        self._http: httpx.AsyncClient | None = None

    async def offer(self, groups: list[str]) -> dict[str, Any]:
        """Return the pool's GPUs and how much of each is granted."""
        return await self._call("GET", "/offer", {"group": groups}, patience_s=0.0)

    async def begin(self, user: str, server: str, start: ServerStart) -> dict[str, Any]:
        """Announce that a user's server starts. Repeatable."""
        return await self._call("PUT", "/server", {"user": user, "server": server}, start.to_json())

    async def news(self, user: str, server: str, known: dict[str, Any]) -> dict[str, Any]:
        """Return the start's status as soon as it differs from ``known``, or after a few seconds."""
        query = {"user": user, "server": server, "wait": NEWS_S, "state": known["state"]}
        if known.get("position") is not None:
            query["position"] = known["position"]
        return await self._call("GET", "/server", query)

    async def end(self, user: str, server: str, lease: str = "") -> None:
        """Release what a server holds. With ``lease``, only if that is still the server's current start."""
        query = {"user": user, "server": server, **({"lease": lease} if lease else {})}
        await self._call("DELETE", "/server", query, patience_s=5.0)

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            self._http = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._token}"},
                trust_env=False,
                verify=self._ca_file or True,
                timeout=httpx.Timeout(20.0, connect=3.0, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=50),
            )
        return self._http

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, Any],
        body: dict[str, Any] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> dict[str, Any]:
        """Make a call; retry until ``patience_s`` while the service restarts. Every call may be repeated."""
        deadline = time.monotonic() + patience_s
        pause = 0.05
        while True:
            try:
                response = await self._client().request(method, f"{self._url}{path}", params=query, json=body)
                if response.status_code not in (502, 503):
                    return _answer(response)
                why = f"it answers {response.status_code}"
            except httpx.HTTPError as e:
                why = str(e) or type(e).__name__
            if time.monotonic() + pause > deadline:
                raise errors.PoolUnreachable(
                    f"the hub's GPU pool service does not answer ({why}); try again in a minute"
                )
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2)


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code < 300 and isinstance(answer, dict):
        return answer
    if isinstance(answer, dict) and isinstance(answer.get("message"), str):
        kind = getattr(errors, str(answer.get("error")), errors.PoolError)
        if isinstance(kind, type) and issubclass(kind, errors.PoolError):
            raise kind(answer["message"])
        raise errors.PoolError(answer["message"])
    raise errors.PoolUnreachable(
        f"the hub's GPU pool service gave an unexpected answer, status {response.status_code}; check the service's url"
    )
