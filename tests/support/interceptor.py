"""Somebody between a client and a worker, who can redirect connections and has a certificate of their own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from jupyter_gpupool.engines.local.worker_certificate import new_certificate
from jupyter_gpupool.transport import frames, tls


class Interceptor:
    """Speaks TLS with who connects to ``port``, and goes on as ``play`` does, which gets that connection.

    Without ``play`` it speaks TLS with the worker at ``address``, too, and passes on what each end says. ``heard`` has
    all that clients have said. ``protocols``: the application protocols that it agrees to.
    """

    def __init__(
        self,
        address: tuple[str, int],
        protocols: list[str],
        play: Callable[[ssl.SSLSocket], None] | None = None,
    ) -> None:
        self._address, self._protocols = address, protocols
        self._play = play or self._pass_on
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pem")
            file.write_bytes(new_certificate("interceptor"))
            self._context = tls.server_context(str(file), str(file))
        self._context.set_alpn_protocols(protocols)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Interceptor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.settimeout(60.0)
                with self._context.wrap_socket(sock, server_side=True) as near:
                    self._play(near)

    def _pass_on(self, near: ssl.SSLSocket) -> None:
        context = tls.client_context()
        context.set_alpn_protocols(self._protocols)
        far = context.wrap_socket(socket.create_connection(self._address), server_hostname="localhost")
        with far:
            up = threading.Thread(target=self._copy, args=(near, far), daemon=True)
            up.start()
            with contextlib.suppress(OSError):
                while data := far.recv(65536):
                    near.sendall(data)
            for end in (near, far):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            up.join()

    def _copy(self, near: ssl.SSLSocket, far: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                self.heard += data
                far.sendall(data)


def welcoming(**fields: object) -> Callable[[ssl.SSLSocket], None]:
    """What plays a worker that welcomes everybody, with these fields of the welcome."""
    return answering(frames.Kind.WELCOME, fields)


def answering(kind: frames.Kind, header: object) -> Callable[[ssl.SSLSocket], None]:
    """What answers every hello by that frame."""

    def play(near: ssl.SSLSocket) -> None:
        frames.receive(near)
        frames.send(near, kind, header)
        with contextlib.suppress(OSError):
            near.recv(1)  # until the client goes

    return play
