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


class SecureServer(HTTPServer):
    """Bounds the connections that have not shown a token yet, in number and in time."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self._strangers: dict[IOStream, float] = {}

    def handle_stream(self, stream: IOStream, address: tuple) -> None:
        self._strangers[stream] = time.monotonic()
        if len(self._strangers) > _MOST:
            next(iter(self._strangers)).close()
            self._forget_the_closed()
        super().handle_stream(stream, address)

    def admit(self, request: Any) -> None:
        """That request's connection is somebody's whom the pool knows."""
        self._strangers.pop(request.connection.stream, None)

    async def turn_away_the_late(self) -> None:
        """For as long as the server runs."""
        while True:
            await asyncio.sleep(1.0)
            before = time.monotonic() - _PATIENCE_S
            for stream, came in list(self._strangers.items()):
                if came > before:
                    break
                stream.close()
            self._forget_the_closed()

    def _forget_the_closed(self) -> None:
        for stream in [s for s in self._strangers if s.closed()]:
            del self._strangers[stream]
