"""The session with the lease's worker: sends commands in order, and waits for answers in a thread of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.environment import LEASE
from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.status import INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE, StatusError
from jupyter_gpupool.transport import frames, handshake
from jupyter_gpupool.transport.resumable_connection import ResumableConnection, SessionLost
from jupyter_gpupool.transport.resumption import Frame
from jupyter_gpupool.transport.specs import AttachSpec
from jupyter_gpupool.transport.tls import Connection

from .call_sites import Sites
from .native import Native

#: How long freed buffers wait for a command that takes their ids along, in seconds.
_FREE_AFTER_S = 0.25
#: The most ids that are freed with one command.
_MAX_FREED = 4096
#: Arrays of up to so many bytes are copied at once, before they are sent.
_SMALL_BYTES = 1 << 16

#: Called with an answer's fields after the message, or with the error.
Done = Callable[[Any, "StatusError | None"], None]


@dataclass
class _Question:
    done: Done
    into: memoryview | None
    #: whether the answer may have a payload of any size, which comes after the answer's fields
    has_data: bool = False


class SliceSession:
    """Commands to the worker of a lease. Every method may be called from any thread.

    ``native``: what knows which handles XLA has destroyed, for the session that frees them.
    Raises StatusError where there is no worker, or none that serves JAX.
    """

    def __init__(self, spec: AttachSpec, version: str, native: Native | None) -> None:
        self._native = native
        self._lock = threading.Lock()
        self._questions: dict[int, _Question] = {}
        self._finished: list[tuple[Done, Any, StatusError | None]] = []
        self._why_over = ""
        self._last_id = 0
        self._sites = Sites()
        self._ids = (ctypes.c_int64 * _MAX_FREED)()
        self.spec = spec
        #: what no array exceeds: the worker ends a session that sends more
        self._max_bytes = max(device.limit_mib for device in spec.devices) << 20
        #: called with the ids of handles that XLA has destroyed, see handles.c
        self.on_destroyed: Callable[[list[int]], None] = lambda ids: None
        facts = {
            "framework": "jax",
            "jax": version,
            "process": processes.identity(),
            "devices": {device.uuid: device.index for device in spec.devices},
        }

        def connect(fields: dict[str, Any], timeout_s: float) -> tuple[Connection, dict[str, Any]]:
            while True:
                here = self.spec
                try:
                    return handshake.connect(here, "session", {**facts, **fields}, timeout_s)
                except handshake.MovedAway as e:
                    self._follow(e)
                except (frames.NoWorker, frames.Unreachable):
                    if not self._read_file() or (self.spec.host, self.spec.port) == (here.host, here.port):
                        raise

        try:
            self._connection = ResumableConnection(connect, spec.host, spec.ttl_s, on_moved=self._follow)
        except (handshake.Refused, OSError, frames.WireError) as e:
            raise StatusError(UNAVAILABLE, str(e)) from None
        self._connection.on_answer = self._take_answer
        self._thread = threading.Thread(target=self._listen, name="gpupool jax", daemon=True)
        self._thread.start()

    # -- where the lease is

    def _follow(self, where: handshake.MovedAway) -> None:
        self.spec = replace(self.spec, host=where.host, port=where.port)

    def _read_file(self) -> bool:
        """Read the lease's file, where the holder notes where the lease is. Whether it tells of this lease."""
        found = AttachSpec.read(os.environ.get(LEASE))
        if found is None or found.lease_id != self.spec.lease_id or found.addresses:
            return False  # of one that spans servers the worker itself says where it goes
        self.spec = replace(self.spec, host=found.host, port=found.port)
        return True

    # -- ids

    def new_ids(self, count: int = 1) -> int:
        """Return the first of ``count`` new ids."""
        with self._lock:
            first = self._last_id + 1
            self._last_id += count
            return first

    def execute(self, program: int, inputs: list[int], num_outputs: int, kept: list[int]) -> int:
        """Run a program, and return the id of its first output."""
        with self._lock:
            first = self._last_id + 1
            self._last_id += num_outputs
            self._sites.made(first)
            self._send(commands.EXECUTE, program, inputs, first, kept)
        self._finish()
        return first

    # -- commands

    def tell(self, code: int, *fields: Any) -> None:
        """Send a command that has no answer. Raises StatusError."""
        with self._lock:
            self._send(code, *fields)
        self._finish()

    def free(self, ids: list[int]) -> None:
        """Free buffers now."""
        with self._lock:
            self._send(commands.FREE, freed=ids)

    def upload(self, id: int, dtype: str, dims: tuple[int, ...], device: int, data: memoryview) -> None:
        """Send an array's elements; ``data`` may change once this returns. Raises StatusError."""
        if data.nbytes > self._max_bytes:
            raise StatusError(
                RESOURCE_EXHAUSTED,
                f"Out of memory while trying to allocate {data.nbytes} bytes on slice {device}, which has "
                f"{self._max_bytes} bytes. Request GPUs with more memory (-p or -m).",
            )
        with self._lock:
            self._sites.made(id)
            head = frames.pack(frames.Kind.UPLOAD, [id, [self._freed(), dtype, dims, device]], data.nbytes)
            if data.nbytes <= _SMALL_BYTES:
                self._transmit(Frame(head, memoryview(bytes(data)) if data.nbytes else None))
                return
            try:
                self._transmit(Frame(head, data, lent=True))
            finally:
                self._guarded(self._connection.keep_lent)

    def send_results(self, call: int, facts: list[Any], data: bytes) -> None:
        """Answer a call of a function of this process. Raises StatusError."""
        with self._lock:
            head = frames.pack(frames.Kind.UPLOAD, [call, facts], len(data))
            self._transmit(Frame(head, memoryview(data) if data else None))

    def ask(
        self, done: Done, code: int, *fields: Any, into: memoryview | None = None, has_data: bool = False
    ) -> None:
        """Send a question, and call ``done`` when its answer is there. Its payload goes into ``into``.

        Raises StatusError where it cannot be sent; then ``done`` is not called.
        """
        with self._lock:
            # The answer cannot be taken before the lock is free.
            number = self._send(code, *fields)
            self._questions[number] = _Question(done, into, has_data)

    def answer(self, code: int, *fields: Any) -> list[Any]:
        """Send a question, and return the answer's fields. Raises StatusError."""
        return self._wait_for(code, fields, has_data=False)

    def answer_with_data(self, code: int, *fields: Any) -> tuple[list[Any], bytearray]:
        """Send a question, and return the answer's fields and its payload. Raises StatusError."""
        *answer, data = self._wait_for(code, fields, has_data=True)
        return answer, data

    def _wait_for(self, code: int, fields: tuple[Any, ...], has_data: bool) -> list[Any]:
        arrived = threading.Event()
        found: list[Any] = []

        def done(answer: Any, error: StatusError | None) -> None:
            found.extend((answer, error))
            arrived.set()

        self.ask(done, code, *fields, has_data=has_data)
        arrived.wait()
        answer, error = found
        if error is not None:
            raise error
        return list(answer)

    def close(self) -> None:
        """End the session in words. Who waits for an answer gets an error."""
        with self._lock:
            if not self._why_over:
                self._lose("the process ends")
                with contextlib.suppress(OSError, SessionLost, frames.WireError):
                    self._connection.close()
        self._finish()

    def forked(self) -> None:
        """In a forked child: leave the connection to the parent."""
        self._lock = threading.Lock()
        self._why_over = "JAX does not work in a forked process that used GPUs before; start it by 'spawn'"
        self._connection.forked(self._why_over)

    # -- sending; called with the lock

    def _freed(self) -> list[int]:
        count = self._native.destroyed(self._ids, _MAX_FREED) if self._native is not None else 0
        if not count:
            return []
        ids = self._ids[:count]
        self.on_destroyed(ids)
        return [id for id in ids if id > 0]  # negative: the worker has forgotten it already

    def _send(self, code: int, *fields: Any, freed: list[int] | None = None) -> int:
        header = commands.command(code, [*(freed or ()), *self._freed()], *fields)
        frame = Frame(frames.pack(frames.Kind.RECORDS, header))
        self._transmit(frame)
        return frame.number

    def _transmit(self, frame: Frame) -> None:
        self._guarded(self._connection.send, frame)

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        if self._why_over:
            raise StatusError(UNAVAILABLE, self._why_over)
        try:
            function(*args)
        except (SessionLost, frames.WireError) as e:
            self._lose(str(e))
            raise StatusError(UNAVAILABLE, self._why_over) from None

    def _lose(self, reason: str) -> None:
        host = self.spec.host
        self._why_over = f"the session with the worker on {host} has ended: {reason}; its arrays are gone"
        questions, self._questions = self._questions, {}
        for question in questions.values():
            self._finished.append((question.done, None, StatusError(UNAVAILABLE, self._why_over)))

    # -- receiving

    def _listen(self) -> None:
        while not self._why_over:
            self._wait()
            with self._lock:
                if self._why_over:
                    break
                try:
                    self._connection.listen()
                    freed = self._freed()
                    if freed:
                        self._send(commands.FREE, freed=freed)
                except StatusError:
                    pass  # it is lost
                except (SessionLost, frames.WireError) as e:
                    self._lose(str(e))
            self._finish()
        self._finish()

    def _wait(self) -> None:
        """Wait until something arrives, or it is time to free what nobody uses."""
        descriptor = self._connection.fileno()
        if descriptor < 0:
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(_FREE_AFTER_S * 1000)

    def _take_answer(
        self, number: int, answer: Any, length: int, receive: Callable[[memoryview], None]
    ) -> None:
        question = self._questions.get(number)
        if question is None or not isinstance(answer, list) or len(answer) < 2:
            raise frames.WireError("an answer to no question")
        data = bytearray(length if question.has_data else 0)
        if question.has_data:
            if length:
                receive(memoryview(data))
        elif length:
            if question.into is None or length != question.into.nbytes:
                raise frames.WireError(f"an unexpected answer of {length} bytes")
            receive(question.into)
        del self._questions[number]
        code, message, *fields = answer
        if question.has_data:
            fields.append(data)
        line = self._sites.of(fields[0]) if code and fields else ""
        if line:  # not where the program looks at a result
            message = f"{message}\n(raised by what was called at\n{line})"
        error = StatusError(code, message) if code else None
        if not error and question.into is not None and question.into.nbytes != length:
            error = StatusError(INTERNAL, f"the worker sent {length} bytes of {question.into.nbytes}")
        self._finished.append((question.done, fields, error))

    def _finish(self) -> None:
        """Call those whose answers are there. Without the lock: XLA may call the plugin again from within."""
        while self._finished:
            try:
                done, answer, error = self._finished.pop(0)
            except IndexError:
                return  # another thread was faster
            done(answer, error)
