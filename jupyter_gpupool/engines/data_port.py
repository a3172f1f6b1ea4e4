"""The data port as its engine sees it: a listening socket, and an acceptor process that is replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from logging import LoggerAdapter
from typing import Any

from ..pool.errors import EngineFailure
from . import process
from .acceptor import SUCCESSION

#: How many connections the system may keep for an acceptor that is busy.
_BACKLOG = 1024
#: How long the acceptor of this pool's predecessor may take to hand its port over, in seconds.
_SUCCESSION_S = 5.0
#: How long to wait before an acceptor that died is replaced, in seconds; the system keeps who comes meanwhile.
_AGAIN_S = 0.2


class DataPort:
    """Listens from :meth:`start` to :meth:`stop`; a persistent one goes on for the workers that are left."""

    def __init__(self, host: str, port: int, folder: str, persistent: bool, log: Any) -> None:
        self._host = host
        self._wanted = port
        self._folder = folder
        self._persistent = persistent
        self._log: LoggerAdapter = log
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    @property
    def port(self) -> int:
        assert self._listener is not None, "it listens"
        return self._listener.getsockname()[1]

    async def start(self) -> None:
        """Raises EngineFailure where that port cannot be had."""
        inherited = await asyncio.to_thread(self._inherit)
        if inherited is not None and inherited.getsockname()[1] != self._wanted and self._wanted:
            inherited.close()
            inherited = None
        self._listener = inherited or self._bind()
        self._spawn()

    async def stop(self) -> None:
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
            raise EngineFailure(f"cannot listen on the data port {where}: {e.strerror or e}") from None

    def _inherit(self) -> socket.socket | None:
        """The listening socket of an acceptor that outlived its pool; None where there is none."""
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(_SUCCESSION_S)
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
                process.command("jupyter_gpupool.engines.acceptor", *words),
                pass_fds=[self._listener.fileno(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise EngineFailure(f"no process can be started for the data port: {e.strerror}") from e
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
                asyncio.get_running_loop().run_in_executor(None, self._process.wait)  # no zombie is left
        self._log.warning("The acceptor of the data port died; starting another one")
        asyncio.get_running_loop().call_later(_AGAIN_S, self._respawn)

    def _respawn(self) -> None:
        if self._listener is None:
            return  # stopped meanwhile
        try:
            self._spawn()
        except EngineFailure as e:
            self._log.error("The data port is shut: %s", e)
            asyncio.get_running_loop().call_later(_AGAIN_S * 10, self._respawn)
