"""What the hub asks of its pool's service: from the hub's own process, with the service's own token."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from ...pool import errors

#: How long a service that is restarting is waited for, in seconds: by a spawn, and by a page.
PATIENCE_S = 30.0
#: How long one question for news may stay unanswered, in seconds; a queued request lives by these questions.
NEWS_S = 4.0


class Service:
    """The calls. All raise :mod:`jupyter_gpupool.pool.errors`."""

    def __init__(self, url: str, token: str, ca_file: str = "") -> None:
        self._url = f"{url.rstrip('/')}/gpupool/api/v1/hub"
        self._token = token
        self._ca_file = ca_file
        self._http: httpx.AsyncClient | None = None

    async def offer(self, groups: list[str]) -> dict[str, Any]:
        """What can be had now: see :class:`~.handlers.OfferCall`."""
        return await self._call("GET", "/offer", {"group": groups}, patience_s=0.0)

    async def begin(
        self, user: str, server: str, groups: list[str], lease: str, mode: str, choice: dict[str, Any]
    ) -> dict[str, Any]:
        """A server of that user is about to start; repeatable. ``lease``: a uuid of this start's own."""
        body = {"groups": groups, "lease": lease, "mode": mode, "choice": choice}
        return await self._call("PUT", "/server", {"user": user, "server": server}, body)

    async def news(self, user: str, server: str, known: dict[str, Any]) -> dict[str, Any]:
        """What has become of it, as soon as it differs from what is known, or after a few seconds."""
        query = {"user": user, "server": server, "wait": NEWS_S, "state": known["state"]}
        if known.get("position") is not None:
            query["position"] = known["position"]
        return await self._call("GET", "/server", query)

    async def end(self, user: str, server: str, lease: str = "") -> None:
        """That server is over; what it holds goes back. ``lease``: only if it is still that start."""
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
        """Every call may be repeated, so a service that restarts is waited for."""
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
                    f"the hub's GPU pool does not answer ({why}); try again in a minute"
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
    raise errors.PoolUnreachable(f"the hub's GPU pool answers {response.status_code}, which no GPU pool does")
