"""The engine's end of the control sockets of its workers, see transport/control.py."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.transport import control

from . import worker_files


class WorkerChannel:
    """The connection to one worker. ``on_notice`` is called with what it sends unasked."""

    def __init__(self, folder: str, lease_id: str, on_notice: Callable[[dict[str, Any]], None]) -> None:
        """Raises OSError if there is no such worker."""
        self._on_notice = on_notice
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        #: serves one question after the other
        self._asking = asyncio.Lock()
        self._sock: socket.socket | None = control.connect(folder, lease_id + worker_files.CONTROL)
        self._sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read, self._sock)

    @property
    def is_open(self) -> bool:
        """Whether the worker is at the other end."""
        return self._sock is not None

    async def ask(self, what: str, descriptors: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Ask the worker for something, and return its answer. Raises EngineError with its reason."""
        async with self._asking:
            if self._sock is None:
                raise EngineError("its worker has ended")
            self._number += 1
            answer = asyncio.get_running_loop().create_future()
            self._answers[self._number] = answer
            try:
                control.send(self._sock, {"do": what, "id": self._number, **fields}, descriptors)
                found: dict[str, Any] = await answer
            except OSError as e:
                raise EngineError(f"its worker cannot be asked: {e.strerror}") from None
            finally:
                self._answers.pop(self._number, None)
        if "failed" in found:
            raise EngineError(str(found["failed"]))
        return found

    async def lend(self, descriptors: Sequence[int]) -> None:
        """Lend the worker memory. Raises EngineError."""
        most = control.MAX_DESCRIPTORS
        for k in range(0, len(descriptors), most):
            await self.ask("lend", descriptors[k : k + most])

    def close(self) -> None:
        """Hang up. Questions that are not answered raise EngineError."""
        sock, self._sock = self._sock, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineError("its worker has ended"))

    def _read(self, sock: socket.socket) -> None:
        try:
            message, descriptors = control.receive(sock)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        assert not descriptors, "a worker sends none"
        waiting = self._answers.get(message.get("id", 0))
        if waiting is None:
            self._on_notice(message)
        elif not waiting.done():
            waiting.set_result(message)
