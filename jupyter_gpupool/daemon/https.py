"""Control over HTTPS: a certificate that can change, and room for those who are known before those who are not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from ..engines.addresses import network
from ..pool.errors import PoolError

#: How long a connection may take until it has shown a token, in seconds, and how many may be about to;
#: the oldest make room.
_PATIENCE_S = 10.0
_MOST = 1024


class Certificate:
    """A server's certificate and key, in files that may be replaced. ``context`` always has the last good ones."""

    def __init__(self, certfile: str, keyfile: str) -> None:
        """Raises PoolError for files that cannot be used."""
        self._files = (certfile, keyfile)
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self._seen = self._stamp()

    def changed(self) -> bool:
        """Whether the files are others than those that were last looked at."""
        return self._stamp() != self._seen

    def reload(self) -> None:
        """Connections from now on see what the files hold. Raises PoolError, and then keeps what there was."""
        self._seen = self._stamp()
        self._load(
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        )  # a pair that does not fit must not spoil the good one
        self._load(self.context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        certfile, keyfile = self._files
        try:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(certfile, keyfile)
        except ssl.SSLError:
            raise PoolError(f"{certfile} and {keyfile} are no certificate and its key (PEM)") from None
        except OSError as e:
            raise PoolError(f"{certfile} and {keyfile} cannot be read: {e.strerror or e}") from None
        return context

    def _stamp(self) -> list[tuple[int, int]]:
        found = []
        for file in self._files:
            with contextlib.suppress(OSError):
                status = os.stat(file)
                found.append((status.st_mtime_ns, status.st_ino))
        return found


class _Crowd:
    """Connections by the address that they came from, oldest first, and when they came."""

    def __init__(self) -> None:
        self._of: dict[str, dict[IOStream, float]] = {}
        self.count = 0

    def add(self, address: str, stream: IOStream) -> None:
        self._of.setdefault(address, {})[stream] = time.monotonic()
        self.count += 1

    def drop(self, address: str, stream: IOStream) -> None:
        """Harmless where it is not among them."""
        streams = self._of.get(address, {})
        if streams.pop(stream, None) is not None:
            self.count -= 1
            if not streams:
                del self._of[address]

    def first_of_most(self) -> IOStream:
        """The oldest connection of the address that has most of them."""
        most = max(self._of, key=lambda address: len(self._of[address]))
        return next(iter(self._of[most]))

    def before(self, at: float) -> list[IOStream]:
        return [stream for streams in self._of.values() for stream, came in streams.items() if came <= at]


class SecureServer(HTTPServer):
    """Bounds the connections that have not shown a token yet, in number and in time, and all of them in number.

    Where room is short, the oldest connection of the address that has most of them makes it: whoever floods the
    server is in nobody's way but their own.
    """

    def initialize(self, *args: Any, most: int = 1 << 14, **kwargs: Any) -> None:
        """``most``: how many connections there may be in all."""
        super().initialize(*args, **kwargs)
        self._most = most
        self._addresses: dict[IOStream, str] = {}
        self._all, self._strangers = _Crowd(), _Crowd()

    def handle_stream(self, stream: IOStream, address: tuple) -> None:
        came_from = self._addresses[stream] = network(str(address[0]))
        for crowd, most in ((self._strangers, _MOST), (self._all, self._most)):
            crowd.add(came_from, stream)
            if crowd.count > most:
                self._turn_away(crowd.first_of_most())
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        super().on_close(server_conn)
        self._forget(server_conn.stream)

    def admit(self, request: Any) -> None:
        """That request's connection is somebody's whom the pool knows."""
        stream = request.connection.stream
        self._strangers.drop(self._addresses.get(stream, ""), stream)

    async def turn_away_the_late(self) -> None:
        """For as long as the server runs."""
        while True:
            await asyncio.sleep(1.0)
            for stream in self._strangers.before(time.monotonic() - _PATIENCE_S):
                self._turn_away(stream)

    def _turn_away(self, stream: IOStream) -> None:
        stream.close()
        self._forget(stream)

    def _forget(self, stream: IOStream) -> None:
        came_from = self._addresses.pop(stream, None)
        if came_from is not None:
            self._strangers.drop(came_from, stream)
            self._all.drop(came_from, stream)
