"""The data port of the engine: a listening socket, and an acceptor process that is replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import EngineError

from .acceptor import SUCCESSION

#: How many connections the kernel may queue for a busy acceptor.
_BACKLOG = 1024
#: How long the acceptor of an earlier pool may take to hand over its port, in seconds.
_SUCCESSION_TIMEOUT_S = 5.0
#: How long to wait before an acceptor that died is replaced, in seconds; the kernel queues connections meanwhile.
_RESPAWN_DELAY_S = 0.2


class DataPort:
    """Listens from :meth:`start` to :meth:`stop`; a persistent port goes on for the workers that are left."""

    def __init__(self, host: str, port: int, folder: str, persistent: bool, log: Any) -> None:
        self._host = host
        self._wanted = port
        self._folder = folder
        self._persistent = persistent
        self._log: LoggerAdapter[Any] = log
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The number of the port."""
        assert self._listener is not None, "it listens"
        return int(self._listener.getsockname()[1])

    async def start(self) -> None:
        """Listen, and start the acceptor. Raises EngineError if the port cannot be used."""
        inherited = await asyncio.to_thread(self._inherit)
        if inherited is not None and inherited.getsockname()[1] != self._wanted and self._wanted:
            inherited.close()
            inherited = None
        self._listener = inherited or self._bind()
        self._spawn()

    async def stop(self) -> None:
        """Stop listening; the acceptor of a persistent port goes on."""
        self._hang_up()
        child, self._process = self._process, None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if child is not None and not self._persistent:
            child.terminate()
            await asyncio.to_thread(child.wait)

    def _bind(self) -> socket.socket:
        everywhere = self._host in ("", "::") and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if everywhere or ":" in self._host else socket.AF_INET
        address = ("::" if everywhere else self._host, self._wanted)
        try:
            return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=everywhere)
        except OSError as e:
            where = f"{self._host or '*'}:{self._wanted}"
            raise EngineError(f"cannot listen on the data port {where}: {e.strerror or e}") from None

    def _inherit(self) -> socket.socket | None:
        """The listening socket of an acceptor that outlived its pool; None if there is none."""
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(_SUCCESSION_TIMEOUT_S)
                sock.connect(f"/proc/self/fd/{folder}/{SUCCESSION}")
                _, descriptors, _, _ = socket.recv_fds(sock, 16, 1)
                return socket.socket(fileno=descriptors[0]) if descriptors else None
        except OSError:
            return None
        finally:
            os.close(folder)

    def _spawn(self) -> None:
        assert self._listener is not None
        ours, theirs = socket.socketpair()
        words = [str(self._listener.fileno()), str(theirs.fileno()), self._folder, str(os.getpid())]
        if self._persistent:
            words.append("--persistent")
        try:
            self._process = subprocess.Popen(
                processes.command("jupyter_gpupool.engines.local.acceptor", *words),
                pass_fds=[self._listener.fileno(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise EngineError(f"no process can be started for the data port: {e.strerror}") from e
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._lost)

    def _hang_up(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    def _lost(self) -> None:
        self._hang_up()
        if self._process is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().run_in_executor(None, self._process.wait)  # leaves no zombie
        self._log.warning("The acceptor of the data port died; starting another one")
        asyncio.get_running_loop().call_later(_RESPAWN_DELAY_S, self._respawn)

    def _respawn(self) -> None:
        if self._listener is None:
            return  # stopped meanwhile
        try:
            self._spawn()
        except EngineError as e:
            self._log.error("The data port is shut: %s", e)
            asyncio.get_running_loop().call_later(_RESPAWN_DELAY_S * 10, self._respawn)
