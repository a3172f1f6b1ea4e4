"""``WS events``: the pool's state and its changes over a WebSocket, in both kinds of server."""

from __future__ import annotations

from typing import Any

from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from ..pool.errors import NotAdmitted, PoolError, TooManyAttempts
from .auth import PROTOCOL, Caller, Doorkeeper, who_calls
from .feed import Feed, View

#: RFC 6455: "policy violation".
_NOT_ADMITTED = 1008
#: RFC 6455: "service restart"; who is told so may come back.
_TRY_AGAIN = 1012
#: How many may watch what one owner sees, or all that administrators see.
_MOST_WATCHERS = 200
#: Who has so many messages unread has lost the connection, or is too slow for it.
_MOST_UNSENT = 60


class _Events(WebSocketHandler):
    """One watcher. Query: ``feed`` and ``seq`` of the last message that it has, after a lost connection."""

    feed: Feed
    view: View | None = None
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
        pass  # nobody has anything to say here; requests are HTTP's

    def on_close(self) -> None:
        if self.view is not None:
            self.view.leave(self)

    def tell(self, message: str) -> None:
        if self.unsent >= _MOST_UNSENT:
            self.close(_TRY_AGAIN, "too slow")
            return
        try:
            sent = self.write_message(message)
        except WebSocketClosedError:
            return
        self.unsent += 1
        sent.add_done_callback(self._sent)

    def _sent(self, future: Any) -> None:
        self.unsent -= 1
        future.exception()  # a connection that is lost is noticed by on_close

    def end(self, reason: str) -> None:
        # A close frame has room for 123 bytes.
        self.close(_TRY_AGAIN, reason.encode()[:120].decode(errors="ignore"))


class EventsWithToken(_Events):
    """In a pool's own server: the token comes in a header, which no page of another site can send."""

    caller: Caller

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def initialize(self, feed: Feed, tokens: Doorkeeper) -> None:
        self.feed = feed
        self.tokens = tokens

    async def prepare(self) -> None:
        try:
            self.caller = await who_calls(self.tokens, self.request)
            if self.caller.objection:
                raise NotAdmitted(self.caller.objection)
            if self.feed.view(self.caller.scope).watched >= _MOST_WATCHERS:
                raise TooManyAttempts(
                    f"{_MOST_WATCHERS} connections watch with tokens of this owner already; close one of them"
                )
        except PoolError as e:
            self.set_status(e.status)
            self.finish({"error": type(e).__name__, "message": str(e)})
            return
        self.settings.get("admitted", lambda request: None)(self.request)

    def tell(self, message: str) -> None:
        if self.tokens.still(self.caller):
            super().tell(message)
        else:
            self.close(_NOT_ADMITTED, "the token is not valid any more")

    def check_origin(self, origin: str) -> bool:
        return True

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return PROTOCOL if PROTOCOL in subprotocols else None  # never the one with the token

    def owner(self) -> str | None:
        return self.caller.scope


class EventsInJupyter(WebSocketMixin, _Events, JupyterHandler):
    """In Jupyter Server: its identity, its authorizer (``execute`` on ``gpupool``), its rules on origins."""

    auth_resource = "gpupool"

    def initialize(self, feed: Feed) -> None:
        self.feed = feed

    @ws_authenticated
    @authorized("execute")
    async def get(self, *args: str, **kwargs: str) -> None:  # type: ignore[override]  # the decorators are untyped
        await super().get(*args, **kwargs)

    def owner(self) -> str | None:
        return self.current_user.username
