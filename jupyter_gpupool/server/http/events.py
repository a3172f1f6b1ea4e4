"""``WS events``: the pool's state and its changes over a WebSocket, in a pool's own server and in Jupyter Server."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from jupyter_gpupool.core.errors import PoolError, TooManyAttempts, TooManyRequests, Unauthenticated
from jupyter_gpupool.server.access.authentication import (
    PROTOCOL,
    Authenticator,
    BrowserSessions,
    Caller,
    who_calls,
)
from jupyter_gpupool.server.access.open_calls import OpenCallLimits
from jupyter_gpupool.server.access.rates import RateLimits
from jupyter_gpupool.server.watch.feed import Feed, WatcherState

#: RFC 6455: "policy violation".
_POLICY_VIOLATION = 1008
#: RFC 6455: "service restart"; the client may connect again.
_SERVICE_RESTART = 1012
#: The most connections that watch what one owner sees, or what administrators see.
_MAX_WATCHERS = 200
#: A client with so many unsent messages has lost the connection, or is too slow.
_MAX_UNSENT_MESSAGES = 60


class _Events(WebSocketHandler):
    """One watcher. After a lost connection, the query has ``feed`` and ``seq`` of the last message received."""

    feed: Feed
    view: WatcherState | None = None
    unsent = 0

    def owner(self) -> str | None:
        raise NotImplementedError

    async def open(self, *args: str, **kwargs: str) -> None:
        seq = self.get_query_argument("seq", "-1")
        self.view = self.feed.view(self.owner())
        try:
            await self.view.join(
                self, self.get_query_argument("feed", ""), int(seq) if seq.isascii() and seq.isdigit() else -1
            )
        except (PoolError, RuntimeError) as e:
            self.end(str(e))
            return
        if self.ws_connection is None:  # it was closed meanwhile
            self.on_close()

    def on_message(self, message: str | bytes) -> None:
        pass  # clients send nothing here; requests go over HTTP

    def on_close(self) -> None:
        if self.view is not None:
            self.view.leave(self)

    def send(self, message: str) -> None:
        if self.unsent >= _MAX_UNSENT_MESSAGES:
            self.close(_SERVICE_RESTART, "too slow")
            return
        try:
            sent = self.write_message(message)
        except WebSocketClosedError:
            return
        self.unsent += 1
        sent.add_done_callback(self._sent)

    def _sent(self, future: Any) -> None:
        self.unsent -= 1
        future.exception()  # on_close notices a lost connection

    def end(self, reason: str) -> None:
        # A close frame has room for 123 bytes.
        self.close(_SERVICE_RESTART, reason.encode()[:120].decode(errors="ignore"))


class EventsWithToken(_Events):
    """In a pool's own server: no page of another site can send a token, or what a session's calls have to carry."""

    caller: Caller
    #: counts it among the caller's open calls no longer
    uncount: Callable[[], None] = staticmethod(lambda: None)
    is_gone = False

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def initialize(self, feed: Feed, tokens: Authenticator) -> None:
        self.feed = feed
        self.tokens = tokens

    async def prepare(self) -> None:
        try:
            self.caller = await who_calls(self.tokens, self.request, self.settings.get("sessions"))
            if self.caller.objection:
                raise Unauthenticated(self.caller.objection)
            limits: RateLimits | None = self.settings.get("rate_limits")
            if limits is not None:
                limits.admit(self.caller, "reads")
            self.count()
            if self.feed.view(self.caller.scope).watched >= _MAX_WATCHERS:
                raise TooManyAttempts(
                    f"{_MAX_WATCHERS} connections watch with tokens of this owner already; close one of them"
                )
        except PoolError as e:
            self.set_status(e.status)
            if isinstance(e, TooManyRequests):
                self.set_header("Retry-After", str(math.ceil(e.retry_after_s)))
            self.finish({"error": type(e).__name__, "message": str(e)})
            return
        self.settings.get("admitted", lambda request: None)(self.request)

    def count(self) -> None:
        """Count it among the caller's open calls until its connection ends. Raises TooManyRequests."""
        limits: OpenCallLimits | None = self.settings.get("open_calls")
        if limits is not None and not self.is_gone:
            self.uncount = limits.open(self.caller)

    def on_close(self) -> None:
        self.is_gone = True  # perhaps before it was counted
        super().on_close()
        self.uncount()

    def on_finish(self) -> None:
        super().on_finish()
        if self.get_status() != 101:  # it never became an event stream
            self.uncount()

    def send(self, message: str) -> None:
        sessions: BrowserSessions | None = self.settings.get("sessions")
        is_open = sessions is None or sessions.is_open(self.request)
        if is_open and self.tokens.is_still_valid(self.caller):
            super().send(message)
        else:
            self.close(_POLICY_VIOLATION, "the token is not valid any more")

    def check_origin(self, origin: str) -> bool:
        return True

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return PROTOCOL if PROTOCOL in subprotocols else None  # never the one that carries the token

    def owner(self) -> str | None:
        return self.caller.scope


class EventsInJupyter(WebSocketMixin, _Events, JupyterHandler):
    """In Jupyter Server: its identity, its authorizer (``execute`` on ``gpupool``), its rules on origins."""

    auth_resource = "gpupool"

    def initialize(self, feed: Feed) -> None:
        self.feed = feed

    @ws_authenticated
    @authorized("execute")  # type: ignore[untyped-decorator]
    async def get(self, *args: str, **kwargs: str) -> None:  # type: ignore[override]  # the decorators are untyped
        await super().get(*args, **kwargs)

    def owner(self) -> str | None:
        name: str = self.current_user.username
        return name
