"""What a client does when a connection is lost amid a call."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core import errors


class Silent:
    """A server that hears each call and hangs up."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                said = connection.recv(65536)
                if not said:
                    return
                self.heard.append(said.split(b"\r\n")[0])

    def stop(self) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.stop()


def test_a_token_is_asked_for_once(silent: Silent) -> None:
    # The first address lets nobody in, so nothing was asked there, and the second one is.
    client = PoolClient("http://127.0.0.1:1", "token", also=[silent.url], patience_s=5.0)
    advice = "may have been created; look for it with `gpupool token list`"
    with client, pytest.raises(errors.PoolUnreachable, match=advice):
        client.create_token("a laptop", None)
    assert silent.heard == [b"POST /gpupool/api/v1/tokens HTTP/1.1"]


def test_other_calls_are_repeated(silent: Silent) -> None:
    client = PoolClient(silent.url, "token", patience_s=5.0)
    with client, pytest.raises(errors.PoolUnreachable, match="no GPU pool answers"):
        client.pool()
    assert len(silent.heard) > 1
