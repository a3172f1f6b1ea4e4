"""Keeps a program's lease while the program itself cannot: stopped, or busy in code that holds the interpreter's lock.

A program that attaches itself holds its lease by threads, and a thread sends no heartbeat while one long call into C
holds the lock of the interpreter. So a small process, the keeper, holds the lease beside the program for as long as
the program lives. It has no PyTorch, and starts while the program waits for its GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.transport.specs import AttachSpec

from .http import PoolClient

#: How long the keeper may take to leave its workers when the program releases, in seconds.
_LEAVE_TIMEOUT_S = 5.0


class Keeper:
    """The keeper of this process: :meth:`expect`, then :meth:`beat` and :meth:`hold`, and :meth:`leave` in any case.

    Raises PoolError if the process cannot be started.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._sock, theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._beats = False
        if (
            os.name != "posix"
        ):  # no descriptor can be passed on there: the threads of this process hold the lease alone
            theirs.close()
            return
        try:
            with theirs:
                self._process = subprocess.Popen(
                    processes.command("jupyter_gpupool.client.keeper_process", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # neither Ctrl-C nor the end of a kernel's group is for it
                )
            self._tell({"program": self._pid, "born": processes.birth(self._pid)})
        except OSError as e:
            self._sock.close()
            raise PoolError(f"the process that keeps the lease cannot be started: {e}") from e

    def expect(self, client: PoolClient, lease_id: str) -> None:
        """Note the request that this process is about to send: it is withdrawn if the process dies."""
        self._tell({"pool": client.settings(), "lease": lease_id})

    def beat(self, ttl_s: float) -> None:
        """Send heartbeats from now on, also while the request is queued. Later calls do nothing."""
        if not self._beats:
            self._beats = True
            self._tell({"ttl_s": ttl_s})

    def hold(self, spec: AttachSpec, config: Path | None = None) -> None:
        """Hold the workers of the lease, which this process holds already.

        ``config``: the lease's file for the program's children, which goes with the program.
        """
        self._tell({"spec": spec.to_json(), "config": str(config or "")})

    def leave(self) -> None:
        """End the keeper. Its connections to the workers are closed on purpose. Harmless when called again."""
        if os.getpid() != self._pid:
            return
        self._tell({"leave": True})
        self._sock.close()
        if self._process is None:
            return
        try:
            self._process.wait(_LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forked(self) -> None:
        """In a forked child: the keeper is the parent's."""
        self._sock.close()
        if self._process is not None:
            self._process.returncode = 0

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it was killed: the program goes on without it
            self._sock.sendall(json.dumps(message).encode() + b"\n", getattr(socket, "MSG_NOSIGNAL", 0))
