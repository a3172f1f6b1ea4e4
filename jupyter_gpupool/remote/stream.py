"""A session's side of the data plane: records gather here and go out in batches, answers come back.

Nothing here waits that need not: :meth:`Stream.push` and uploads return at once; only
:meth:`Stream.ask` waits for the worker.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from typing import Any

import torch

from . import wire
from .memory import out_of_memory, rounded
from .records import ALLOCATE, FREE, WAIT, WRITE
from .sites import Sites
from .specs import DeviceSpec
from .tensor import Geometry, Storage
from .tls import Connection, readable

#: Host-to-device copies up to this many bytes travel inside a batch.
SMALL_UPLOAD = 16 * 1024

#: Storage numbers, never used twice in a process: a tensor of an ended lease is unknown to the next worker.
ids = itertools.count(1)

#: Exceptions a worker may name; everything else becomes RuntimeError.
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
    """The lease's worker cannot be reached any more; its tensors are lost."""


class DeviceMemory:
    """What this process has allocated on one slice, in bytes. Freed amounts are collected lazily,
    because a destructor may run in the middle of anything, this class's own arithmetic included."""

    def __init__(self, spec: DeviceSpec) -> None:
        self.index = spec.index
        self.limit = self.whole = spec.limit_mib << 20
        self.freed: list[int] = []
        self.allocated_total = 0
        self.peak = 0
        #: how many allocations there are, and how many there ever were at once
        self.count = self.peak_count = 0
        #: bytes and allocations that were freed, and requests that were refused
        self.freed_total = self.freed_count = self.refused = 0
        #: what there was when the totals were last reset
        self.base_bytes = self.base_count = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Account for one allocation. Raises torch.OutOfMemoryError and changes nothing if it does not fit."""
        with self._lock:
            used = self._settle()
            if used + nbytes > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError(out_of_memory(self.index, nbytes, used, self.limit))
            self.allocated_total = used = used + nbytes
            self.count = count = self.count + 1
            if used > self.peak:
                self.peak = used
            if count > self.peak_count:
                self.peak_count = count

    def expect(self, nbytes: int) -> None:
        """Raises torch.OutOfMemoryError if so much could not be allocated now."""
        with self._lock:
            used = self._settle()
            if used + nbytes > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError(out_of_memory(self.index, nbytes, used, self.limit))
            self.peak = max(self.peak, used + nbytes)

    def note(self, nbytes: int) -> None:
        """Account for what the worker has allocated already."""
        with self._lock:
            self.allocated_total = self._settle() + nbytes
            self.peak = max(self.peak, self.allocated_total)
            self.count += 1
            self.peak_count = max(self.peak_count, self.count)

    def resize(self, limit: int) -> None:
        """The slice has ``limit`` bytes now; a part of it that the program keeps to stays the same part."""
        with self._lock:
            self.limit = self.limit * limit // self.whole
            self.whole = limit

    def reset_peak(self) -> None:
        with self._lock:
            self.peak, self.peak_count = self._settle(), self.count

    def reset_totals(self) -> None:
        with self._lock:
            self.base_bytes, self.base_count = self._settle(), self.count
            self.freed_total = self.freed_count = self.refused = 0

    def allocated(self) -> int:
        with self._lock:
            return self._settle()

    def _settle(self) -> int:
        freed = self.freed
        if freed:
            n = len(freed)
            nbytes = sum(freed[:n])
            del freed[:n]
            self.allocated_total -= nbytes
            self.freed_total += nbytes
            self.count -= n
            self.freed_count += n
        return self.allocated_total


class Stream:
    """The connection of one process to a worker of its lease. Safe to use from several threads."""

    def __init__(self, sock: Connection, devices: tuple[DeviceSpec, ...], batch: int = 320) -> None:
        #: Records not yet sent. Only ever extended by whole records, which one bytecode does, so
        #: that any prefix taken at any moment ends between two of them.
        self.buffer: list[Any] = []
        self.batch = batch
        self.memory = {d.index: DeviceMemory(d) for d in devices}
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._lock = threading.Lock()
        self._trouble: list[Exception] = []
        self.sites = Sites()
        self._gone = ""
        self._limit = batch
        self._armed = False
        self._arm = threading.Event()
        self._closed = False
        #: counters for benchmarks and the curious
        self.frames = self.questions = self.bytes_up = self.bytes_down = 0
        os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._pump, name="gpupool-stream", daemon=True).start()

    # -- storages

    def new_storage(self, nbytes: int, index: int) -> Storage:
        """A number for a storage that the next record creates. Raises torch.OutOfMemoryError."""
        self.memory[index].take(rounded(nbytes))
        return Storage(next(ids), nbytes, index, self)

    def known_storage(self, id: int, nbytes: int, index: int) -> Storage:
        """A storage that the worker has made already."""
        self.memory[index].note(rounded(nbytes))
        return Storage(id, nbytes, index, self)

    def allocate(self, nbytes: int, index: int) -> Storage:
        """A new storage with arbitrary content."""
        storage = self.new_storage(nbytes, index)
        self.push((ALLOCATE, storage.id, nbytes, index))
        return storage

    def free(self, storage: Storage) -> None:
        """Called by destructors at any point, so it only appends."""
        self.buffer.extend((FREE, storage.id))
        self.memory[storage.index].freed.append(rounded(storage.nbytes))

    # -- sending

    def push(self, record: tuple) -> None:
        """Queue a record. Raises what went wrong earlier, if anything did."""
        buffer = self.buffer
        buffer.extend(record)
        if len(buffer) > self._limit:
            self.flush()
        elif not self._armed:
            self._armed = True
            self._arm.set()

    def flush(self) -> None:
        """Send what has gathered, and raise what the worker has complained of meanwhile."""
        with self._lock:
            self._send_gathered()
            self._listen()
        self._raise_trouble()

    def upload(self, storage: Storage, geom: Geometry, elements: memoryview) -> None:
        """Copy ``elements`` (bytes, in order) to the tensor of ``geom`` on ``storage``."""
        self.bytes_up += elements.nbytes
        if elements.nbytes <= SMALL_UPLOAD:
            self.push((WRITE, storage.id, geom.wire(), bytes(elements)))
            return
        with self._lock:
            self._send_gathered()
            self._guarded(wire.send, self._sock, wire.Kind.UPLOAD, [storage.id, geom.wire()], elements)
        self._raise_trouble()

    # -- asking

    def ask(self, record: tuple, into: memoryview | None = None) -> Any:
        """Send everything up to ``record`` and wait for its answer; a payload is read into ``into``.

        Raises what the worker reports, or :class:`WorkerGone`.
        """
        with self._lock:
            self.questions += 1
            self.buffer.extend(record)
            self._send_gathered()
            answer = self._guarded(self._answer, into)
        self._raise_trouble()
        if isinstance(answer, dict) and "failed" in answer:
            raise exception(answer["failed"], self.sites)
        return answer

    def wait(self, index: int = -1) -> None:
        """Return when everything sent so far is done (on one device, or on all)."""
        self.ask((WAIT, index))

    def _answer(self, into: memoryview | None) -> Any:
        while True:
            kind, header, length = wire.receive(self._sock)
            if kind is wire.Kind.VALUE:
                if length:
                    if into is None or length != into.nbytes:
                        raise wire.WireError(f"an answer of {length} bytes that nobody asked for")
                    wire.receive_into(self._sock, into)
                    self.bytes_down += length
                return header
            self._note(kind, header)

    def _listen(self) -> None:
        while not self._gone and readable(self._sock, self._poll, 0):
            kind, header, _ = self._guarded(wire.receive, self._sock) or (None, None, 0)
            if kind is not None:
                self._note(kind, header)

    def _note(self, kind: wire.Kind, header: Any) -> None:
        if kind is wire.Kind.ERROR:
            self._trouble.append(exception(header, self.sites))
            self._limit = -1  # the next push looks
        elif kind is wire.Kind.BYE:
            raise wire.ConnectionLost(str((header or {}).get("message", "the worker ended")))
        else:
            raise wire.WireError(f"unexpected {kind.name}")

    # -- the rest

    def _send_gathered(self) -> None:
        buffer = self.buffer
        n = len(buffer)
        if n:
            records = buffer[:n]
            del buffer[:n]
            self.frames += 1
            self._guarded(wire.send, self._sock, wire.Kind.RECORDS, records)

    def _guarded(self, function: Any, *args: Any) -> Any:
        if self._gone:
            return None
        try:
            return function(*args)
        except ConnectionError as e:
            self.lose(self._last_words() or str(e))
        except wire.WireError as e:
            self.lose(str(e))  # what follows in the stream means nothing any more
        return None

    def _last_words(self) -> str:
        """Why the worker hung up, where it said so before it did."""
        try:
            while readable(self._sock, self._poll, 0):
                kind, header, _ = wire.receive(self._sock)
                if kind is wire.Kind.BYE and isinstance(header, dict):
                    return str(header.get("message", ""))
        except (ConnectionError, wire.WireError):
            pass  # it said nothing
        return ""

    def lose(self, reason: str) -> None:
        """The worker is gone: say so at every call from now on. Wakes a thread that waits for it."""
        if not self._gone:
            self._gone = reason
            self._limit = -1
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is what we wanted

    def _raise_trouble(self) -> None:
        if self._gone:
            raise WorkerGone(
                f"the GPU worker of this lease is gone ({self._gone}); its tensors are lost. "
                "Request a new lease, and load your last checkpoint."
            )
        if self._trouble:
            error = self._trouble[0]
            self._trouble.clear()
            self._limit = self.batch
            raise error

    def _pump(self) -> None:
        """Sends what a program left behind when it went on to do something else."""
        pause = threading.Event()
        while not self._closed:
            self._arm.wait(1.0)
            self._arm.clear()
            pause.wait(0.0005)
            self._armed = False
            if self.buffer and not self._gone:
                with self._lock:
                    self._send_gathered()

    def close(self) -> None:
        """Send what is left and end the session; its storages in the worker are freed."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._send_gathered()
            self._guarded(wire.send, self._sock, wire.Kind.BYE, None)
        self.lose("it was released")
        self._arm.set()
        self._sock.close()

    def _forked(self) -> None:
        # The child must not hold the connection open after its parent, nor ever send on it.
        self._gone = "this process is a fork of the one that holds the lease"
        self._closed = True
        if self._sock.fileno() >= 0:
            os.close(self._sock.detach())
        self._lock = threading.Lock()


def exception(report: dict[str, Any], sites: Sites) -> Exception:
    """The exception that a worker's report describes, naming the operator and the program's own line."""
    kind = _EXCEPTIONS.get(report.get("type", ""), RuntimeError)
    message = str(report.get("message", "the worker gave no reason"))
    operator = report.get("operator")
    if not operator:
        return kind(message)
    arguments = report.get("arguments")
    shapes = f"({', '.join(map(str, arguments))})" if isinstance(arguments, list) else ""
    line = sites.of(report)
    where = f", called at\n{line}" if line else ""
    return kind(f"{message}\n(raised by {operator}{shapes} on the gpupool device{where})")
