"""Connect to the event stream of a pool (``WS events``)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlencode

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.core.errors import PoolUnreachable

from .http import PoolClient

#: The longest message: a snapshot of ten thousand GPUs.
_MAX_MESSAGE_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0


async def connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    """Return a connection. ``query``: ``feed`` and ``seq`` to resume from, or nothing. Raises PoolError."""
    try:
        return await _connect(client, query)
    except (OSError, HTTPError, WebSocketError):
        # The HTTP client raises a clear error, or finds out which of several servers answers now.
        await asyncio.to_thread(client.whoami)
    try:
        return await _connect(client, query)
    except (OSError, HTTPError, WebSocketError) as e:
        raise PoolUnreachable(f"cannot open the event stream of the GPU pool at {client.url} ({e})") from None


async def _connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    url = f"{client.url.replace('http', 'ws', 1)}{PREFIX}/events?{urlencode(query)}"
    request = HTTPRequest(
        url, headers=client.headers, ssl_options=client.context, connect_timeout=_CONNECT_TIMEOUT_S
    )
    return await websocket_connect(request, max_message_size=_MAX_MESSAGE_BYTES)
