"""The client's end of a session with a worker: queues commands, sends them in batches, receives answers.

:meth:`CommandStream.push` and uploads return at once. Only :meth:`CommandStream.ask` waits for the worker. When the
connection is lost, a call waits until there is another one.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.commands import ALLOCATE, FREE, WAIT, WRITE
from jupyter_gpupool.pytorch.protocol.sizes import rounded
from jupyter_gpupool.transport import frames
from jupyter_gpupool.transport.resumable_connection import COPY_BYTES, ResumableConnection, SessionLost
from jupyter_gpupool.transport.resumption import Frame
from jupyter_gpupool.transport.specs import DeviceSpec

from .call_sites import Sites
from .device_memory import DeviceMemory
from .tensor import Storage, TensorLayout

#: Host-to-device copies up to this many bytes travel inside a batch.
SMALL_UPLOAD = 16 * 1024

#: Storage numbers. A process uses each once, so a later worker cannot mistake a tensor of an ended lease.
ids = itertools.count(1)

#: Exceptions that a worker's report may name. All others become RuntimeError.
_EXCEPTIONS: dict[str, type[Exception]] = {
    t.__name__: t
    for t in (
        RuntimeError,
        IndexError,
        ValueError,
        TypeError,
        NotImplementedError,
        torch.OutOfMemoryError,
        torch.linalg.LinAlgError,
    )
}


class WorkerGone(RuntimeError):
    """The worker of the lease cannot be reached any more. Its tensors are lost."""


class CommandStream:
    """The session of one process with a worker of its lease. Safe to use from several threads.

    An exception of a signal handler, such as KeyboardInterrupt, may leave any method at any point: no command is lost
    or sent twice, and nobody takes an answer that the interrupted call was waiting for.
    """

    def __init__(
        self,
        connection: ResumableConnection,
        devices: tuple[DeviceSpec, ...],
        batch: int = 320,
    ) -> None:
        #: Commands that are not sent yet. One bytecode appends a whole command, so a copy made at any
        #: moment ends between two commands. The first may be a frame of commands that is being sent.
        self.buffer: list[Any] = []
        self.batch = batch
        overheads = _overheads(connection.welcome)
        self.memory = {d.index: DeviceMemory(d, overheads.get(d.uuid, 0)) for d in devices}
        self.connection = connection
        connection.on_error = self._note
        self._lock = threading.Lock()
        self._trouble: list[Exception] = []
        #: how many errors the worker has reported
        self.reports = 0
        self.sites = Sites()
        self._gone = ""
        #: when the session broke by itself, on a monotonic clock
        self.broken_at: float | None = None
        #: whether the worker said that another one takes its place
        self.is_replaced = False
        #: whether the program has got the exception that says so
        self.is_told = False
        #: whether the lease is known to have ended, so that there is no other session
        self.is_over = False
        #: called once, in any thread, when the session has broken by itself
        self.on_broken: Callable[[], None] = lambda: None
        #: opens another session in place of this one, and returns whether there is one
        self.renew: Callable[[], bool] = lambda: False
        #: names the operators of frames that the worker has not acknowledged, newest first
        self.unfinished: Callable[[Sequence[Frame]], list[dict[str, Any]]] = lambda frames: []
        self._under_way: list[dict[str, Any]] = []
        self._limit = batch
        self._armed = False
        self._arm = threading.Event()
        self._closed = False
        #: counters for benchmarks and tests
        self.frames = self.questions = self.bytes_up = self.bytes_down = 0
        if hasattr(os, "register_at_fork"):  # a system without it has no fork either
            os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._pump, name="gpupool-stream", daemon=True).start()

    # -- storages

    def new_storage(self, nbytes: int, index: int) -> Storage:
        """A storage of ``nbytes`` bytes that the next command creates. Raises torch.OutOfMemoryError."""
        self.memory[index].take(rounded(nbytes))
        return Storage(next(ids), nbytes, index, self)

    def known_storage(self, id: int, nbytes: int, index: int) -> Storage:
        """A storage that the worker has created already."""
        self.memory[index].note(rounded(nbytes))
        return Storage(id, nbytes, index, self)

    def allocate(self, nbytes: int, index: int) -> Storage:
        """Create a storage of ``nbytes`` bytes with arbitrary content. Raises torch.OutOfMemoryError."""
        storage = self.new_storage(nbytes, index)
        self.push((ALLOCATE, storage.id, nbytes, index))
        return storage

    def free(self, storage: Storage) -> None:
        """Destructors call this at any moment, so it takes no lock and only appends."""
        self.buffer.extend((FREE, storage.id))
        self.memory[storage.index].freed.append(rounded(storage.nbytes))

    # -- sending

    def push(self, record: tuple[Any, ...]) -> None:
        """Queue a command. Raises the error of an earlier command, if the worker has reported one."""
        buffer = self.buffer
        buffer.extend(record)
        if len(buffer) > self._limit:
            self.flush()
        elif not self._armed:
            self._armed = True
            self._arm.set()

    def append(self, record: tuple[Any, ...]) -> None:
        """Queue a command and raise nothing, for threads in whose place the program hears of errors."""
        self.buffer.extend(record)
        if not self._armed:
            self._armed = True
            self._arm.set()

    def flush(self) -> None:
        """Send the queued commands, and raise the first error that the worker has reported meanwhile."""
        with self._lock:
            self._guarded(self._send_gathered)
            self._guarded(self.connection.listen)
        self._raise_trouble()

    def upload(self, storage: Storage, geom: TensorLayout, elements: memoryview) -> None:
        """Copy ``elements`` (bytes, in row-major order) to the tensor with layout ``geom`` on ``storage``."""
        self.bytes_up += elements.nbytes
        if elements.nbytes <= SMALL_UPLOAD:
            self.push((WRITE, storage.id, geom.wire(), bytes(elements)))
            return
        with self._lock:
            self._guarded(self._send_gathered)
            try:
                for layout, piece in pieces(geom.wire(), elements, COPY_BYTES):
                    self._guarded(self._send_lent, [storage.id, layout], piece)
            finally:
                self._guarded(self.connection.keep_lent)  # the program may change its elements from here on
        self._raise_trouble()

    # -- asking

    def ask(self, record: tuple[Any, ...], into: memoryview | None = None) -> Any:
        """Send everything up to ``record``, wait for its answer and return it. A payload is read into ``into``.

        Raises the error that the worker reports, or :class:`WorkerGone`.
        """
        with self._lock:
            self.questions += 1
            answer = self._guarded(self._ask, record, into)
        self._raise_trouble()
        if isinstance(answer, dict) and "failed" in answer:
            self._end_with(answer["failed"])
            self.is_told = self.is_replaced
            raise exception(answer["failed"], self.sites)
        return answer

    def wait(self, index: int = -1) -> None:
        """Return when the slice ``index`` (-1: every slice) has executed everything that was queued."""
        self.ask((WAIT, index))

    def _ask(self, record: tuple[Any, ...], into: memoryview | None) -> Any:
        answer = self.connection.answer(self._send_gathered(record), into)
        if into is not None:
            self.bytes_down += into.nbytes
        return answer

    def _note(self, report: Any) -> None:
        self._end_with(report)
        self.reports += 1
        self._trouble.append(exception(report, self.sites))
        self._limit = -1  # the next push raises it

    def _end_with(self, report: Any) -> None:
        """End the session if the report is of a failure that has taken the GPU from the worker's process."""
        if isinstance(report, dict) and "under_way" in report:
            self.is_replaced = True
            self._break(str(report.get("message", "")).split(" (")[0])

    # -- failures, and the end

    def _send_gathered(self, question: tuple[Any, ...] = ()) -> int:
        """Send what is queued, and a question after it. Return the number of its frame, 0 if there was nothing."""
        buffer = self.buffer
        if buffer and type(buffer[0]) is Frame:  # an interrupted call has packed it, and perhaps sent it
            self.connection.send(buffer[0])
            del buffer[0]
        n = len(buffer)
        if not n and not question:
            return 0
        self.frames += 1
        frame = Frame(frames.pack(frames.Kind.RECORDS, [*buffer[:n], *question]))
        buffer[:n] = [
            frame
        ]  # one step: from here on the commands are sent, once, by whichever call comes next
        self.connection.send(frame)
        del buffer[0]
        return frame.number

    def _send_lent(self, header: list[Any], elements: memoryview) -> None:
        head = frames.pack(frames.Kind.UPLOAD, header, elements.nbytes)
        self.connection.send(Frame(head, elements, lent=True))

    def _guarded(self, function: Any, *args: Any) -> Any:
        if self._gone:
            return None
        try:
            return function(*args)
        except (SessionLost, frames.WireError) as e:
            if not self._gone:
                self.is_replaced = isinstance(e, SessionLost) and e.is_replaced
                if not self.is_replaced:  # otherwise the worker has named what it was
                    self._under_way = self.unfinished(self.connection.end.kept)
            self._break(str(e))
        return None

    def lose(self, reason: str) -> None:
        """Raise :class:`WorkerGone` with ``reason`` at every call from now on. Wakes a thread that waits."""
        self.is_over = True
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self._gone:
            self._gone = reason
            self._limit = -1
            self.connection.lose(reason)

    def _break(self, reason: str) -> None:
        """The session is over, and the lease perhaps not."""
        if not self._gone:
            self.broken_at = time.monotonic()
            self._lose(reason)
            self.on_broken()

    def raise_reported(self) -> None:
        """Raise the first error that the worker has reported, if there is one."""
        if self._trouble:
            if not self._gone:
                self._limit = self.batch
            self.is_told = bool(self._gone)
            del self._trouble[1:]
            # Not by a local variable: with the traceback it would be a cycle, which keeps the program's tensors.
            raise self._trouble.pop()

    def _raise_trouble(self) -> None:
        self.raise_reported()  # first: it may be the reason why the worker is gone
        if self._gone:
            raise self.gone(not self.is_over and self.renew())

    def gone(self, is_renewed: bool) -> WorkerGone:
        """The exception of every call after the end. The first one names what was under way.

        ``is_renewed``: another session has taken the place of this one.
        """
        self.is_told = True
        calls, self._under_way = self._under_way, []
        listed = f"\n(one of these operators was under way:\n{_listed(calls, self.sites)})" if calls else ""
        if is_renewed:
            return WorkerGone(
                f"the GPU worker of this lease is gone ({self._gone}), and another one has taken its place; the "
                f"former one's tensors are lost. Create them again, or load your last checkpoint.{listed}"
            )
        return WorkerGone(
            f"the GPU worker of this lease is gone ({self._gone}); its tensors are lost. "
            f"Request GPUs again and load your last checkpoint.{listed}"
        )

    def _pump(self) -> None:
        """Send what stays queued while the program does something else, and notice when the connection is lost."""
        pause = threading.Event()
        while not self._closed:
            armed = self._arm.wait(1.0)
            self._arm.clear()
            pause.wait(0.0005)
            self._armed = False
            if self._gone:
                continue
            if self.buffer:
                with self._lock:
                    self._guarded(self._send_gathered)
            elif not armed and self._lock.acquire(blocking=False):
                try:
                    self._guarded(self.connection.listen)
                finally:
                    self._lock.release()

    def abandon(self) -> None:
        """Let its thread end: another session has taken the place of this one."""
        self._closed = True
        self.unfinished = lambda kept: []
        self._arm.set()

    def close(self) -> None:
        """Send what is queued and end the session. The worker then frees its storages."""
        if self._closed:
            return
        self._closed = True
        if not self.connection.connected:
            self.lose("it was released")  # wakes a thread that tries to connect
        with self._lock:
            self._guarded(self._send_gathered)
            self.connection.close()
        self.lose("it was released")
        self._arm.set()

    def _forked(self) -> None:
        # The child must neither keep the connection open after its parent ends, nor send on it.
        self._gone = "this process is a fork of the one that holds the lease"
        self.is_over = True
        self._closed = True
        self.connection.forked(self._gone)
        self._lock = threading.Lock()


def pieces(layout: list[Any], elements: memoryview, most: int) -> Iterator[tuple[list[Any], memoryview]]:
    """Cut a copy to a tensor of ``layout``, as commands carry it, into copies of at most ``most`` bytes."""
    size, stride, offset, *rest = layout
    if elements.nbytes <= most:
        yield layout, elements
        return
    row_bytes = elements.nbytes // size[0]
    if row_bytes > most:
        for k in range(size[0]):
            row = elements[k * row_bytes : (k + 1) * row_bytes]
            yield from pieces([size[1:], stride[1:], offset + k * stride[0], *rest], row, most)
        return
    step = most // row_bytes
    for k in range(0, size[0], step):
        count = min(step, size[0] - k)
        part = elements[k * row_bytes : (k + count) * row_bytes]
        yield [(count, *size[1:]), stride, offset + k * stride[0], *rest], part


def _overheads(welcome: Mapping[str, Any]) -> dict[str, int]:
    """What of each slice, by UUID, is not for tensors, as far as the worker says so."""
    found = {}
    for fact in welcome.get("devices", ()):
        overhead = fact.get("overhead_bytes") if isinstance(fact, dict) else None
        if type(overhead) is int and overhead >= 0 and isinstance(fact.get("uuid"), str):
            found[fact["uuid"]] = overhead
    return found


def stream_of(storage: Storage) -> CommandStream:
    """The stream that made ``storage``, also when its lease has ended."""
    assert isinstance(storage.owner, CommandStream)
    return storage.owner


def exception(report: dict[str, Any], sites: Sites) -> Exception:
    """The exception that a worker's report describes. It names the operator and the line that called it."""
    kind = _EXCEPTIONS.get(report.get("type", ""), RuntimeError)
    message = str(report.get("message", "the worker gave no reason"))
    operator = report.get("operator")
    under_way = report.get("under_way")
    if isinstance(under_way, list) and under_way:
        return kind(f"{message}\n(one of these operators was under way:\n{_listed(under_way, sites)})")
    if not operator:
        return kind(message)
    arguments = report.get("arguments")
    shapes = f"({', '.join(map(str, arguments))})" if isinstance(arguments, list) else ""
    line = sites.of(report)
    where = f", called at\n{line}" if line else ""
    return kind(f"{message}\n(raised by {operator}{shapes} on the gpupool device{where})")


def _listed(calls: list[Any], sites: Sites) -> str:
    """Reports of calls, newest first: each with the line that made it, and a line of the program only once."""
    shown: dict[str, list[str]] = {}
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("operator"), str):
            names = shown.setdefault(sites.of(call) or "  at a line that is not known any more", [])
            if call["operator"] not in names:
                names.append(call["operator"])
    return "\n".join(f"{line}\n      {', '.join(names)}" for line, names in shown.items())
