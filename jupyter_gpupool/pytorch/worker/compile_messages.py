"""What a worker and its compile helper say to each other, by a pair of sockets: msgpack after its length in 8 bytes.

The worker asks ``{"definition": as DEFINE_GRAPH has it, "device": "cpu" or "cuda:0", "threads": of an operator}``, and
asks again when it has its answer: ``{"files": {name: bytes}}``, of which one is LIBRARY, or ``{"failed": why}``.
Neither trusts the other: lengths and forms are checked at both ends, and nothing is unpickled.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from typing import Any

import msgpack

#: How long a graph may take to compile, in seconds.
TIME_LIMIT_S = 300
#: The name of the shared object that computes the graph. What it needs besides has names of this form.
LIBRARY = "graph.so"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}\.(so|json|cubin|hsaco)")
_MAX_FILES = 4096
#: The longest messages, in bytes.
MAX_DEFINITION_BYTES, MAX_PRODUCT_BYTES = 64 << 20, 512 << 20
_MAX_THREADS = 4096
_MAX_REASON_CHARACTERS = 500
_LENGTH = struct.Struct("!Q")


class BadMessage(Exception):
    """The other end says what it should not, or nothing any more."""


def send(sock: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message. Raises OSError."""
    packed = msgpack.packb(message)
    sock.sendall(_LENGTH.pack(len(packed)))
    sock.sendall(packed)


def receive(sock: socket.socket, max_bytes: int) -> dict[str, Any]:
    """Return the next message. Raises BadMessage, and OSError."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if length > max_bytes:
        raise BadMessage(f"a message of {length} bytes")
    try:
        message = msgpack.unpackb(_exactly(sock, length))
    except (ValueError, msgpack.UnpackException) as e:
        raise BadMessage(f"no msgpack: {e}") from None
    if not isinstance(message, dict):
        raise BadMessage("no message")
    return message


def question(message: Mapping[str, Any]) -> tuple[Any, str, int]:
    """Return the definition, which is not checked yet, the device and the threads. Raises BadMessage."""
    device, threads = message.get("device"), message.get("threads")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda:[0-9]{1,3}", device):
        raise BadMessage(f"a device {device!r:.80}")
    if type(threads) is not int or not 0 < threads <= _MAX_THREADS:
        raise BadMessage(f"{threads!r:.80} threads")
    return message.get("definition"), device, threads


def products(message: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files by their names, LIBRARY among them. Raises BadMessage, also with the helper's reason."""
    if "failed" in message:
        raise BadMessage(reason(message["failed"]))
    files = message.get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= _MAX_FILES or LIBRARY not in files:
        raise BadMessage("an answer without a compiled graph")
    for name, content in files.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(content, bytes):
            raise BadMessage(f"a file {name!r:.80}")
    return files


def is_name(name: str) -> bool:
    """Whether a file of that name may be among the products."""
    return bool(_NAME.fullmatch(name))


def reason(given: Any) -> str:
    """Why something failed, in one line for people."""
    line = " ".join(str(given).split())
    return "".join(c for c in line if c.isprintable())[:_MAX_REASON_CHARACTERS]


def _exactly(sock: socket.socket, length: int) -> bytearray:
    found = bytearray()
    while len(found) < length:
        more = sock.recv(min(length - len(found), 1 << 20))
        if not more:
            raise BadMessage("it has ended")
        found += more
    return found
