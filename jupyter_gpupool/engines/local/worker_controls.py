"""The engine's end of the control sockets of its workers, see transport/control.py.

A worker that was taken over may send anything, or nothing. It is hung up on if it sends what has not the form that it
should have, and nothing waits for it without a limit.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.transport import control

from . import worker_answers, worker_files


class WorkerChannel:
    """The connection to one worker. ``on_notice`` is called with what it sends unasked."""

    def __init__(self, folder: str, lease_id: str, on_notice: Callable[[dict[str, Any]], None]) -> None:
        """Raises OSError if there is no such worker."""
        self._on_notice = on_notice
        #: what is asked, and the answer to come, by the question's number
        self._asked: dict[int, tuple[str, asyncio.Future[dict[str, Any]]]] = {}
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
        """Ask the worker for something, and return its answer.

        Raises EngineError with its reason, and if it does not answer in time.
        """
        async with self._asking:
            if self._sock is None:
                raise EngineError("its worker has ended")
            self._number += 1
            answer = asyncio.get_running_loop().create_future()
            self._asked[self._number] = what, answer
            try:
                control.send(self._sock, {"do": what, "id": self._number, **fields}, descriptors)
            except OSError as e:
                del self._asked[self._number]
                raise EngineError(f"its worker cannot be asked: {e.strerror}") from None
            try:
                found: dict[str, Any] = await asyncio.wait_for(answer, worker_answers.time_limit_s(what))
            except (TimeoutError, asyncio.TimeoutError):
                raise EngineError("its worker does not answer") from None
            finally:
                self._asked.pop(self._number, None)
        if "failed" in found:
            raise EngineError(worker_answers.failure(found))
        return found

    async def lend(self, descriptors: Sequence[int]) -> None:
        """Lend the worker memory. Raises EngineError."""
        most = control.MAX_DESCRIPTORS
        for k in range(0, len(descriptors), most):
            await self.ask("lend", descriptors[k : k + most])

    def close(self, why: str = "its worker has ended") -> None:
        """Hang up. Questions that are not answered raise EngineError with that reason."""
        sock, self._sock = self._sock, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        for _, answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineError(why))

    def _read(self, sock: socket.socket) -> None:
        try:
            message, _ = control.receive(sock, most_descriptors=0)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._take(message):
            self.close("its worker says what it should not")

    def _take(self, message: dict[str, Any]) -> bool:
        """Return False if it is not what a worker says."""
        if "id" not in message:
            if not worker_answers.is_notice(message):
                return False
            self._on_notice(message)
            return True
        number = message["id"]
        if type(number) is not int:
            return False
        if number not in self._asked:  # too late
            return True
        what, answer = self._asked[number]
        if not worker_answers.is_answer(what, message):
            return False
        if not answer.done():
            answer.set_result(message)
        return True
