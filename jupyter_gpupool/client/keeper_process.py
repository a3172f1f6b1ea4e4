"""What runs in the keeper's process; see :mod:`.keeper`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import LeaseEnded, PoolError, UnknownLease
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec

from .http import PoolClient
from .requests import current_spec

#: How often a system without pidfd is asked whether the program lives, in seconds.
_LOOK_INTERVAL_S = 1.0
#: What is read at once of the messages of the program, in bytes.
_READ_BYTES = 64 * 1024


class _Kept:
    """The lease as this process holds it: heartbeats first, lifelines once it is attached."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._client: PoolClient | None = None
        self._lease_id = ""
        self._lifeline: Lifeline | None = None
        self._config = ""

    def obey(self, message: dict[str, Any]) -> None:
        """Act on a message of the program."""
        self.remember(message)
        if "ttl_s" in message:
            beats = threading.Thread(target=self._send_heartbeats, args=(message["ttl_s"],), daemon=True)
            beats.start()
        if "spec" in message:
            # The program holds the lease too, and is who is told why it ends.
            with contextlib.suppress(Refused, OSError, WireError):
                spec = AttachSpec.from_json(message["spec"])
                self._lifeline = Lifeline(spec, lives=processes.vouched, locate=lambda: self._locate(spec))
        if "leave" in message:
            if self._lifeline is not None:
                self._lifeline.release()
            self.over.set()

    def remember(self, message: dict[str, Any]) -> None:
        """Note what is undone when the program is dead: its request, and the lease's file."""
        if "pool" in message:
            self._client = PoolClient(**message["pool"])
            self._lease_id = message["lease"]
        self._config = message.get("config", self._config)

    def abandon(self) -> None:
        """The program is dead: report it to the workers, which end, or end what it has requested."""
        if self._config:
            with contextlib.suppress(OSError):
                os.unlink(self._config)
        if self._lifeline is not None:
            self._lifeline.release(died=True)
        elif self._client is not None:
            with contextlib.suppress(PoolError):
                self._client.release(self._lease_id)

    def _locate(self, spec: AttachSpec) -> AttachSpec | None:
        """Ask the pool where the lease is, which may have moved."""
        if self._client is None:
            return None
        try:
            return current_spec(spec, self._client.lease(self._lease_id))
        except PoolError:
            return None

    def _send_heartbeats(self, ttl_s: float) -> None:
        assert self._client is not None
        while not self.over.wait(ttl_s / 4):
            try:
                self._client.heartbeat(self._lease_id)
            except (LeaseEnded, UnknownLease):
                return
            except PoolError:
                pass  # the pool may be restarting


def main() -> None:
    """Keep a lease until the program at the other end of the socket leaves it or dies."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    program = json.loads(sock.makefile("rb", buffering=0).readline())
    pid, born = program["program"], program["born"]
    death = _watch(pid)
    kept = _Kept()
    unfinished = b""
    ready = select.poll()
    ready.register(sock, select.POLLIN)
    if death is not None:
        ready.register(death, select.POLLIN)
    while not kept.over.is_set():
        woken = dict(ready.poll(None if death is not None else _LOOK_INTERVAL_S * 1000))
        if death in woken or not processes.lives(pid, born):
            *lines, _ = (unfinished + _unread(sock)).split(b"\n")
            for line in lines:
                kept.remember(json.loads(line))
            kept.abandon()
            break
        if sock.fileno() in woken:
            received = sock.recv(_READ_BYTES)
            if not received:  # the program executes another one, which has no lease
                kept.abandon()
                break
            *lines, unfinished = (unfinished + received).split(b"\n")
            for line in lines:
                kept.obey(json.loads(line))
    os._exit(0)


def _unread(sock: socket.socket) -> bytes:
    """Return what a program that is dead has sent and nobody has read."""
    sock.setblocking(False)
    found = b""
    with contextlib.suppress(OSError):
        while received := sock.recv(_READ_BYTES):
            found += received
    return found


def _watch(pid: int) -> int | None:
    """Return a descriptor that can be read once the process has ended; None where there is no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


if __name__ == "__main__":
    main()
