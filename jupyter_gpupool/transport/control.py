"""Messages between an engine and a worker of the same machine: one in a packet, with descriptors of files.

JSON on a SOCK_SEQPACKET socket, which the worker listens on in the folder of the state files. The engine asks
``{"do": what, "id": number, …}`` and gets ``{"id": number, …}``, with ``failed`` if it did not work: a line for people.

- ``lend``: descriptors of memory that the worker may use for copies, of which it maps each as a whole.
- ``state``: the answer is {"parked", "clean", "bytes": of a copy of everything, "lent": bytes, "idle_s"}.
- ``clean``: copy everything while the sessions go on; the answer is {"clean"}.
- ``park``: copy everything and let the devices' memory go.
- ``resume``: {"devices": [DeviceSpec, …]}: what it may use from now on.
- ``forget``: give all that was lent back.
- ``send``: {"to": [host, port], "secure"}, with the descriptor of a connection to there: send everything to the
  lease's other worker, and let the sessions rest before the last of it; the answer is {"bytes", "rest_s", "ahead": the
  bytes before that}. Then ``stay``: go on here; or ``leave``: {"to"}: send the clients there.
- ``hold``: let a session go on only while another one, here or at a worker of the lease on another server, waits for it
  in an exchange. ``rest``: the answer is {"resting": whether all sessions are between two frames, and are held,
  "uses": how many frames there were}. ``release``: let all go on.
- ``serve``: go on with what has arrived from the lease's other worker.
- ``send_ahead``: what ``send`` does while the sessions go on; then ``send_rest``: what it does afterwards.
- ``name``: the answer is {"name": by which the lease's workers on other servers know this one, and the one that follows
  it}. ``expect``: {"peer": name}: that one is about to move, and its next worker is linked besides; ``linked``: the
  answer of that next worker is {"missing": the links that are not there yet}; ``replace``: {"done": whether that worker
  has moved, so that its new link takes the place of the old one}.
- ``peers``: {"names": of the lease's workers on other servers}.
- ``link``: {"peer": name, "to": [host, port], "secure"}, with the descriptor of a connection to there: the lease's
  worker of that name, which the worker has asked for; or {"peer", "failed": why}.

The worker sends ``{"wanted": true}`` unasked when a session waits for what is parked, ``{"link": name}`` when its ranks
are to exchange tensors with those of that worker, and to each new connection ``{"parked", "lent", "wanted"}``. It can
neither ask for anything else, nor about another lease.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

#: The longest message, in bytes, and the most descriptors that come with one.
MAX_BYTES = 64 << 10
MAX_DESCRIPTORS = 200


def connect(folder: str, name: str) -> socket.socket:
    """Connect to a socket in a folder, whose own path may be longer than that of a socket can be. Raises OSError."""
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(f"/proc/self/fd/{parent}/{name}")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(parent)
    return sock


def listen(folder: str, name: str) -> socket.socket:
    """Listen on a socket in a folder, for its owner alone. Raises OSError."""
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(f"/proc/self/fd/{parent}/{name}")
        os.chmod(name, 0o600, dir_fd=parent)
        sock.listen(4)
    except OSError:
        sock.close()
        raise
    finally:
        os.close(parent)
    return sock


def send(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises OSError."""
    packet = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(sock, [packet], list(descriptors))
    else:
        sock.send(packet)


def receive(sock: socket.socket, most_descriptors: int = MAX_DESCRIPTORS) -> tuple[dict[str, Any], list[int]]:
    """The next message and its descriptors, which are the caller's to close.

    Raises OSError, also at the end, and for a message with more descriptors than that.
    """
    packet, descriptors, flags, _ = socket.recv_fds(sock, MAX_BYTES, most_descriptors)
    try:
        if not packet:
            raise ConnectionError("the other end has gone")
        message = json.loads(packet)
        if not isinstance(message, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ConnectionError("this is no message")
    except (ValueError, RecursionError, ConnectionError) as e:
        for descriptor in descriptors:
            os.close(descriptor)
        raise e if isinstance(e, ConnectionError) else ConnectionError("this is no message") from None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return message, descriptors
