"""What a pool elsewhere tells those who watch it: a connection to its ``WS events``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlencode

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from ..pool.errors import PoolUnreachable
from .calls import PREFIX
from .client import PoolClient

#: A state of ten thousand GPUs, and no more.
_MOST_BYTES = 64 * 2**20
_CONNECT_S = 5.0


async def connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    """``query``: ``feed`` and ``seq`` to go on from, or nothing. Raises PoolError."""
    try:
        return await _connect(client, query)
    except (OSError, HTTPError, WebSocketError):
        # Why not, the same client knows to say; and which of several servers answers now.
        await asyncio.to_thread(client.whoami)
    try:
        return await _connect(client, query)
    except (OSError, HTTPError, WebSocketError) as e:
        raise PoolUnreachable(f"the GPU pool at {client.url} cannot be watched ({e})") from None


async def _connect(client: PoolClient, query: Mapping[str, str]) -> WebSocketClientConnection:
    url = f"{client.url.replace('http', 'ws', 1)}{PREFIX}/events?{urlencode(query)}"
    request = HTTPRequest(url, headers=client.headers, ssl_options=client.context, connect_timeout=_CONNECT_S)
    return await websocket_connect(request, max_message_size=_MOST_BYTES)
