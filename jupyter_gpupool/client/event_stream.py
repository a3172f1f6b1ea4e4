"""Connect to the event stream of a pool (``WS events``)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from urllib.parse import urlencode

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.core.errors import PoolUnreachable, TooManyRequests

from .http import PoolClient
from .pool_connection import MAX_RATE_WAIT_S

#: The longest message: a snapshot of ten thousand GPUs.
_MAX_MESSAGE_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


async def connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    """Return a connection. ``query``: ``feed`` and ``seq`` to resume from, or nothing. Raises PoolError."""
    waited_s = 0.0
    try:
        while True:
            try:
                return await _connect(client, query)
            except HTTPError as e:
                pause_s = _too_many(e)
                if pause_s is None or waited_s + pause_s > MAX_RATE_WAIT_S:
                    raise
                _log.warning(
                    "The GPU pool at %s admits no more calls at the moment; waiting %g s", client.url, pause_s
                )
                await asyncio.sleep(pause_s)
                waited_s += pause_s
    except (OSError, HTTPError, WebSocketError) as e:
        if isinstance(e, HTTPError) and e.code == TooManyRequests.status:
            raise TooManyRequests(_message(e)) from None
        # The HTTP client raises a clear error, or finds out which of several servers answers now.
        await asyncio.to_thread(client.whoami)
    try:
        return await _connect(client, query)
    except (OSError, HTTPError, WebSocketError) as e:
        raise PoolUnreachable(f"cannot open the event stream of the GPU pool at {client.url} ({e})") from None


def _too_many(error: HTTPError) -> float | None:
    """Return after how many seconds the pool may admit the connection; None where it was refused for something else."""
    if error.code != TooManyRequests.status or error.response is None:
        return None
    after = error.response.headers.get("Retry-After", "")
    return max(1.0, float(after)) if after.isascii() and after.isdigit() else None


def _message(error: HTTPError) -> str:
    try:
        return str(json.loads(error.response.body)["message"])  # type: ignore[union-attr]  # a refusal has one
    except (AttributeError, ValueError, KeyError, TypeError):
        return "the GPU pool has too many open calls of this user; close some"


async def _connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    await asyncio.to_thread(client.authorize)
    url = f"{client.url.replace('http', 'ws', 1)}{PREFIX}/events?{urlencode(query)}"
    request = HTTPRequest(
        url, headers=client.headers, ssl_options=client.context, connect_timeout=_CONNECT_TIMEOUT_S
    )
    return await websocket_connect(request, max_message_size=_MAX_MESSAGE_BYTES)
