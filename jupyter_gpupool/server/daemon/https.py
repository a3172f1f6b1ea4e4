"""Control over HTTPS: a certificate that can be replaced, and limits for connections that are not authenticated."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from jupyter_gpupool.core.addresses import network
from jupyter_gpupool.core.errors import PoolError

#: The longest time until a connection has sent a valid token, in seconds, and the most connections without one.
#: When there are more, the oldest are closed.
_FIRST_REQUEST_TIMEOUT_S = 10.0
_MAX_UNAUTHENTICATED = 1024


class Certificate:
    """A server's certificate and key, in files that may be replaced. ``context`` has the last valid pair."""

    def __init__(self, certfile: str, keyfile: str) -> None:
        """Load the files. Raises PoolError for files that cannot be used."""
        self._files = (certfile, keyfile)
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self._seen = self._stamp()

    def changed(self) -> bool:
        """Return whether the files have changed since they were last loaded."""
        return self._stamp() != self._seen

    def reload(self) -> None:
        """Use the files for new connections. Raises PoolError, and then keeps the former pair."""
        self._seen = self._stamp()
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # an invalid pair must not replace the valid one
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
    """Connections by their address, oldest first, with the time at which they were opened."""

    def __init__(self) -> None:
        self._of: dict[str, dict[IOStream, float]] = {}
        self.count = 0

    def add(self, address: str, stream: IOStream) -> None:
        self._of.setdefault(address, {})[stream] = time.monotonic()
        self.count += 1

    def drop(self, address: str, stream: IOStream) -> None:
        """Remove a connection, if it is there."""
        streams = self._of.get(address, {})
        if streams.pop(stream, None) is not None:
            self.count -= 1
            if not streams:
                del self._of[address]

    def first_of_most(self) -> IOStream:
        """Return the oldest connection of the address that has most."""
        most = max(self._of, key=lambda address: len(self._of[address]))
        return next(iter(self._of[most]))

    def before(self, at: float) -> list[IOStream]:
        return [stream for streams in self._of.values() for stream, came in streams.items() if came <= at]


class SecureServer(HTTPServer):
    """Limits the number and the age of connections that have not sent a valid token, and the number of all connections.

    Above a limit, the oldest connection of the address that has most is closed, so a client that floods the server
    blocks only itself.
    """

    def initialize(self, *args: Any, most: int = 1 << 14, **kwargs: Any) -> None:
        """``most``: the most connections in all."""
        super().initialize(*args, **kwargs)
        self._most = most
        self._addresses: dict[IOStream, str] = {}
        self._all, self._unauthenticated = _Crowd(), _Crowd()

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        came_from = self._addresses[stream] = network(str(address[0]))
        for crowd, most in ((self._unauthenticated, _MAX_UNAUTHENTICATED), (self._all, self._most)):
            crowd.add(came_from, stream)
            if crowd.count > most:
                self._turn_away(crowd.first_of_most())
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        super().on_close(server_conn)
        self._forget(server_conn.stream)

    def admit(self, request: Any) -> None:
        """Note that the request's connection is authenticated."""
        stream = request.connection.stream
        self._unauthenticated.drop(self._addresses.get(stream, ""), stream)

    async def turn_away_the_late(self) -> None:
        """Close connections that have sent no valid token in time, until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            for stream in self._unauthenticated.before(time.monotonic() - _FIRST_REQUEST_TIMEOUT_S):
                self._turn_away(stream)

    def _turn_away(self, stream: IOStream) -> None:
        stream.close()
        self._forget(stream)

    def _forget(self, stream: IOStream) -> None:
        came_from = self._addresses.pop(stream, None)
        if came_from is not None:
            self._unauthenticated.drop(came_from, stream)
            self._all.drop(came_from, stream)
