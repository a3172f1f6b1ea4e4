"""The helpers that compile graphs for workers which may start no program, one for each worker that asks.

A worker is born with one end of a pair of sockets. When its first byte arrives, the process that forks workers forks
the helper, with the other end: it inherits what a worker inherits, and nothing of any worker. It may start compilers,
and has a sandbox and a directory of its own. It belongs to the worker's process group, and so to its bounds, and ends
with it.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.transport.specs import WorkerSpec

from . import worker_files
from .bounds import own_limits
from .sandbox import surroundings
from .sandbox.sandbox import Sandbox

#: The processor time of each of its processes, in seconds; and how much it lets operators go first.
_MAX_CPU_S, _NICENESS = 3600, 10


def pair(sandbox: Sandbox, real: bool) -> tuple[socket.socket, socket.socket] | tuple[None, None]:
    """Return this process's end and that of a worker to be forked, if it needs a helper and can have one."""
    if not sandbox.refuses_programs(real):
        return None, None
    try:
        return socket.socketpair()
    except OSError:  # too many files are open
        return None, None


@dataclass(frozen=True)
class _Waiting:
    """The worker that may ask: its process, and how it was started."""

    pid: int
    spec: WorkerSpec
    bounds: Mapping[str, Any]


class CompileHelpers:
    """What the process that forks workers keeps of them. ``folder``: of the workers' state files."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._waiting: dict[socket.socket, _Waiting] = {}

    def sockets(self) -> Iterator[socket.socket]:
        """Those at which a worker may ask for its helper."""
        return iter(self._waiting)

    def add(self, sock: socket.socket, pid: int, spec: WorkerSpec, bounds: Mapping[str, Any]) -> None:
        """A worker was forked that may ask at the other end."""
        self._waiting[sock] = _Waiting(pid, spec, bounds)

    def forget(self, pid: int) -> None:
        """That worker has ended: its process id may be another one's soon."""
        for sock in [sock for sock, waiting in self._waiting.items() if waiting.pid == pid]:
            del self._waiting[sock]
            sock.close()

    def close(self) -> None:
        """In a fork, which must be able to answer or to ask for nobody."""
        for sock in self._waiting:
            sock.close()
        self._waiting.clear()

    def start(self, sock: socket.socket, sandbox: Sandbox, leave: Callable[[], None]) -> None:
        """Fork the helper for the worker at the other end of ``sock``, if it asks and has not ended.

        ``leave`` is called in the fork, and leaves the process that forks.
        """
        waiting = self._waiting.pop(sock)
        try:
            # Urgent bytes make a socket readable, and are not there for who reads.
            if not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
            parent = os.getpid()
            pid = os.fork()
            if not pid:
                self._become_helper(sock, waiting, sandbox, parent, leave)
            _join_group(pid, waiting.pid)
        except OSError as e:
            print(
                f"gpupool worker: lease {waiting.spec.lease_id} compiles nothing: {e.strerror}",
                file=sys.stderr,
            )
        finally:
            sock.close()

    def _become_helper(
        self,
        sock: socket.socket,
        waiting: _Waiting,
        sandbox: Sandbox,
        parent: int,
        leave: Callable[[], None],
    ) -> None:
        """Never returns."""
        try:
            leave()
            if processes.die_with_parent(parent):
                _serve(sock, waiting, self._folder, sandbox)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(0)


def _join_group(pid: int, group: int) -> None:
    """Put a helper into its worker's group before that worker's end can be noticed: it ends with it."""
    try:
        os.setpgid(pid, group)
    except OSError:
        os.kill(pid, signal.SIGKILL)


def _serve(sock: socket.socket, waiting: _Waiting, folder: str, sandbox: Sandbox) -> None:
    os.setpgid(0, waiting.pid)
    own_limits.enter(waiting.bounds)
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))
    os.nice(_NICENESS)
    own = worker_files.make_compile_directory(worker_files.path(folder, waiting.spec.lease_id))
    real = any(not device.emulated for device in waiting.spec.devices)
    surroundings.use(own)
    from jupyter_gpupool.pytorch.worker import compile_server, devices

    devices.prepare_process(waiting.spec.devices)
    sandbox.enter(own, real, with_programs=True)
    # What compilers say is in the answers; a definition could have them say much.
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silence, descriptor)
    compile_server.serve(sock)
