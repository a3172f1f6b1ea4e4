"""A bare connection to another process, plain or TLS 1.3: what a worker's connection is measured beside."""

from __future__ import annotations

import multiprocessing
import socket
import ssl

from jupyter_gpupool.transport import tls

from .far_worker import Certificate

#: How many bytes it takes at once.
MOST_BYTES = 256 << 20


class Echo:
    """A process that receives bytes into its own memory, or replies with eight of them."""

    def __init__(self, secured: Certificate | None = None) -> None:
        self._secured = secured

    def __enter__(self) -> Echo:
        listener = socket.create_server(("127.0.0.1", 0))
        files = (self._secured.certfile, self._secured.keyfile) if self._secured else None
        self._process = multiprocessing.get_context("spawn").Process(
            target=_take, args=(listener, files), daemon=True
        )
        self._process.start()
        self._sock = socket.create_connection(listener.getsockname())
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._secured:
            context = tls.client_context()
            self._sock = context.wrap_socket(self._sock, server_hostname="127.0.0.1")
        listener.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()
        self._process.kill()
        self._process.join()

    def up(self, data: memoryview) -> None:
        self._sock.sendall(len(data).to_bytes(8, "big"))
        self._sock.sendall(data)
        self._sock.recv(8)

    def ping(self) -> None:
        self._sock.sendall((0).to_bytes(8, "big"))
        self._sock.recv(8)


def _take(listener: socket.socket, files: tuple[str, str] | None) -> None:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        sock = context.wrap_socket(sock, server_side=True)
    memory = memoryview(bytearray(MOST_BYTES))
    while head := sock.recv(8):
        left = memory[: int.from_bytes(head, "big")]
        while left:
            left = left[sock.recv_into(left) :]
        sock.sendall(head)
