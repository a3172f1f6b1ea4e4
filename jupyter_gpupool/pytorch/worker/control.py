"""What the engine asks of a running worker: to park its memory, and to bring it back. See transport/control.py."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jupyter_gpupool.transport import control
from jupyter_gpupool.transport.specs import DeviceSpec

from .departure import CannotMove
from .residence import CannotPark, Residence

#: What must not happen to a lease whose state has been sent to another worker.
_OF_MEMORY = ("lend", "clean", "park", "resume", "forget")
#: struct ucred of Linux: pid, uid, gid
_CREDENTIALS = struct.Struct("3i")


class WorkerControl:
    """Answers the engine; its newest connection counts. ``place`` changes the slices, and raises ValueError.

    ``obey`` does what is asked about a move, see Worker.obey. ``is_leaving``: whether the state has
    been sent.
    """

    def __init__(
        self,
        listener: socket.socket,
        residence: Residence,
        place: Callable[[Sequence[DeviceSpec]], None],
        obey: Callable[
            [str, dict[str, Any], list[int]], dict[str, Any] | None
        ] = lambda what, message, given: None,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._listener = listener
        self._residence = residence
        self._place = place
        self._obey = obey
        self._is_leaving = is_leaving
        self._sock: socket.socket | None = None
        self._sending = threading.Lock()
        self._wanted = False
        residence.gate.on_wanted = self._note_wanted

    def run(self) -> None:
        """Serve for as long as the process lives."""
        while True:
            waiting = [self._listener, *([self._sock] if self._sock is not None else [])]
            ready, _, _ = select.select(waiting, [], [])
            if self._sock in ready:
                self._read(self._sock)
            if self._listener in ready:
                self._accept()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            sock.close()
            return
        with self._sending:
            before, self._sock = self._sock, sock
        if before is not None:
            before.close()
        residence = self._residence
        self._send({"parked": residence.gate.parked, "lent": residence.arena.total, "wanted": self._wanted})

    def _read(self, sock: socket.socket | None) -> None:
        assert sock is not None
        try:
            message, descriptors = control.receive(sock)
        except OSError:
            with self._sending:
                self._sock = None
            sock.close()
            return
        try:
            answer = self._do(message, descriptors)
        except (CannotPark, CannotMove, ValueError, RuntimeError) as e:
            answer = {"failed": str(e)}
        except Exception as e:  # whatever it was, the worker goes on, and the engine learns of it
            answer = {"failed": f"{type(e).__name__}: {e}"}
        self._send({**answer, "id": message.get("id")})

    def _do(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        try:
            return self._answer(message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Take the descriptors that are kept out of the list; the others are closed."""
        residence, what = self._residence, message.get("do")
        if what in _OF_MEMORY and self._is_leaving():
            raise CannotPark("it is about to move to another server")
        if what == "lend":
            while descriptors:
                residence.arena.add_chunk(descriptors.pop(0))
            return {}
        if what == "state":
            return {
                "parked": residence.gate.parked,
                "clean": residence.is_clean,
                "bytes": residence.nbytes(),
                "lent": residence.arena.total,
                "idle_s": time.monotonic() - residence.gate.used_at,
            }
        if what == "clean":
            return {"clean": residence.clean()}
        if what == "park":
            self._wanted = False
            return {"bytes": residence.park()}
        if what == "resume":
            self._place([DeviceSpec(**device) for device in message["devices"]])
            self._wanted = False
            residence.resume()
            return {}
        if what == "forget":
            residence.forget()
            return {}
        if what == "hold":
            residence.gate.hold()
            return {}
        if what == "rest":
            resting, uses = residence.gate.rest()
            return {"resting": resting, "uses": uses}
        if what == "release":
            residence.gate.release()
            return {}
        answer = self._obey(str(what), message, descriptors)
        return {"failed": f"this worker does not know how to {what!r}"} if answer is None else answer

    def ask_for_link(self, name: str) -> bool:
        """Ask for a connection to the lease's worker of that name. False where no engine is there to hear it."""
        return self._send({"link": name})

    def _note_wanted(self) -> None:
        self._wanted = True
        self._send({"wanted": True})

    def _send(self, message: dict[str, Any]) -> bool:
        """Return whether there is an engine that has it."""
        with self._sending, contextlib.suppress(OSError):  # the engine has gone; the next one is told again
            if self._sock is not None:
                control.send(self._sock, message)
                return True
        return False
