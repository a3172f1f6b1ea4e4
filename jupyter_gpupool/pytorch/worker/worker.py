"""The process on a GPU server that executes the operators of one lease, until the lease ends."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from jupyter_gpupool.transport import frames, handshake, tls
from jupyter_gpupool.transport.resumption import BadNumbers, number, session_id
from jupyter_gpupool.transport.specs import (
    EXIT_FENCED,
    EXIT_GPU_FAILED,
    EXIT_GPU_UNUSABLE,
    EXIT_HOLDER_LOST,
    EXIT_KERNEL_FAILED,
    EXIT_MOVED,
    EXIT_NEVER_ATTACHED,
    EXIT_RELEASED,
    EXIT_STOPPED,
    DeviceSpec,
    WorkerSpec,
)

from . import devices
from .admission import Admission
from .arrival import Arrival
from .company import Company
from .control import WorkerControl
from .departure import CannotMove, Departure
from .device import Device
from .device_errors import DeviceFailure
from .executor import WorkerSession
from .far_messages import FarMessages, What
from .messages import Messages
from .other_frameworks import Begin, OtherSession
from .peer_links import PeerLink, PeerLinks, Read
from .read_ahead import Frame, SessionOver
from .residence import Residence
from .served_session import ServedSession, patience_s
from .shared_storages import SharedStorages
from .software import software
from .spread_collectives import SpreadMeetings
from .templates import BadRecord

#: Seconds between two checks of the lease.
_CHECK_INTERVAL_S = 0.25
#: A connection must authenticate itself within so many seconds, and so many may be about to at once.
_AUTHENTICATION_TIMEOUT_S = 10.0
_MAX_UNAUTHENTICATED = 64
#: The most processes that may use a lease at once.
_MAX_SESSIONS = 256
#: Seconds between two questions whether a process lives whose connection is lost.
_PROBE_INTERVAL_S = 1.0
#: Seconds between two signs of life to a client that waits until the slices are set up.
_SIGN_INTERVAL_S = 1.0
#: Seconds that frames may take to come to an end at the end of the worker, and then zeros to be written: together less
#: than an engine waits before it kills a worker. A GPU writes 140 GiB in 0.05 s.
_CLEAR_TIMEOUT_S = 0.5
#: The largest number that a process may give a device.
_MAX_DEVICE = 4095


#: Limits the worker to so many MiB for each GPU uuid. Returns the MiB in use where they exceed their limit; then
#: nothing changes.
Limit = Callable[[Mapping[str, int]], dict[str, int]]


def serve(
    spec: WorkerSpec,
    listener: socket.socket,
    report: Callable[[dict[str, Any]], None],
    look: Callable[[Limit], None] = lambda limit: None,
    asked_at: socket.socket | None = None,
    frameworks: Mapping[str, Begin] = {},
    shut_in: Callable[[], None] = lambda: None,
) -> int:
    """Serve one lease until it ends, and return one of the EXIT_* codes.

    ``listener`` listens on TCP, or is a datagram socket of the Unix domain that receives accepted connections
    (SCM_RIGHTS). ``report`` is called with what the lease uses, at most once a second and only when it has
    changed: ``{"allocated_bytes": {uuid: bytes}, "overhead_bytes": {uuid: bytes}, "busy": {uuid: 0 to 1},
    "sessions": n, "held_at": seconds since the epoch, or None, "reconnects": n, "frameworks": their names}``.
    ``look`` is called a few times a second with the function that resizes the lease.
    ``asked_at``: the socket at which an engine asks for parking, see transport/control.py.
    ``frameworks``: what begins sessions of other frameworks than PyTorch, by their names.
    ``shut_in`` is called before a thread is started and before a client is read: from then on files and the network may
    be out of reach. What it raises is raised.

    Afterwards a thread may still be inside an operator: leave the process by ``os._exit``.
    """
    devices.prepare_process(spec.devices)
    worker = Worker(spec, report, look, frameworks)
    shut_in()
    if asked_at is not None:
        answers = WorkerControl(
            asked_at, worker.residence, worker.place, worker.obey, lambda: worker.departure.is_sent
        )
        worker.links.ask = answers.ask_for_link
        threading.Thread(target=answers.run, name="control", daemon=True).start()
    return worker.run(listener)


class _Holder:
    """A holder of the lease, and its newest connection."""

    def __init__(self, sock: tls.Connection | None, follows: bool) -> None:
        self._sock = sock
        #: whether it goes along when the lease moves
        self.follows = follows
        self._saying = threading.Lock()
        #: when something was last heard of it, and since when its connection is lost, on a monotonic clock
        self.heard = time.monotonic()
        self.away_at: float | None = None
        #: whether that connection was closed in order
        self.closed = False

    def say(self, kind: frames.Kind, header: Any) -> None:
        if self._sock is None:
            return
        with self._saying, contextlib.suppress(OSError):  # closed already
            if kind is frames.Kind.BYE:
                self._sock.settimeout(0.2)
            frames.send(self._sock, kind, header)

    def hang_up(self) -> None:
        if self._sock is None:
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class Worker:
    """Admits connections, and decides when the lease ends."""

    def __init__(
        self,
        spec: WorkerSpec,
        report: Callable[[dict[str, Any]], None],
        look: Callable[[Limit], None] = lambda limit: None,
        frameworks: Mapping[str, Begin] = {},
    ) -> None:
        self.spec = spec
        self._frameworks = frameworks
        self._report = report
        self._look = look
        self._devices: list[Device] | None = None
        self.shared = SharedStorages()
        self._meetings = SpreadMeetings()
        self._messages = Messages(self.shared)
        self._far_messages = FarMessages(self._messages, self.shared)
        self.links = PeerLinks(
            spec, lambda: self.secret, self._hear_peer, self._meetings.wake, self._lose_peer
        )
        self.company = Company(self.links, self._meetings)
        self.residence = Residence(self.devices, self.shared)
        self.admission = Admission(is_open=not spec.awaits_state)
        self.certificate = tls.OwnCertificate(spec.certfile, spec.keyfile) if spec.certfile else None
        self.departure = Departure(self)
        self.arrival = Arrival(self)
        #: the lease's secret, as its clients have presented it
        self.secret = ""
        #: the GPUs that the lease had before it was parked, with their positions
        self._former: dict[str, int] = {}
        self._lock = threading.Lock()
        self._over = False
        self._is_closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._code = EXIT_RELEASED
        #: why a device cannot be used any more
        self._failure = ""
        self._unauthenticated: dict[socket.socket, float] = {}
        self._holders: dict[str, _Holder] = {}
        self._held_at: float | None = None
        self._sessions: dict[str, ServedSession] = {}
        self._reconnects = 0
        self._reported: dict[str, Any] = {}

    def run(self, listener: socket.socket) -> int:
        """Serve the lease until it ends, and return one of the EXIT_* codes."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self.end(EXIT_STOPPED))
        threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()
        born = beat = time.monotonic()
        while not self._over:
            if select.select([self._wake], [], [], _CHECK_INTERVAL_S)[0]:
                os.eventfd_read(self._wake)
            now = time.monotonic()
            if self._held_at is not None:
                self._expire_holders(now)
            elif not self.spec.awaits_state and now - born > self.spec.attach_timeout_s:
                self.end(EXIT_NEVER_ATTACHED)
            self._turn_away(now - _AUTHENTICATION_TIMEOUT_S)
            self._expire_sessions(now)
            self._look(self.limit)
            if now - beat >= 1.0:
                self._report_usage(now - beat)
                beat = now
        self._say_goodbye()
        self._clear_memory()
        return self._code

    def _clear_memory(self) -> None:
        """Leave nothing on the GPUs for whoever has them next; within a bounded time, for an operator may hang."""
        if self._code in (EXIT_KERNEL_FAILED, EXIT_GPU_FAILED, EXIT_GPU_UNUSABLE):
            return  # CUDA does nothing more in this process
        if not any(device.clears_memory for device in self._devices or ()):
            return
        clearing = threading.Thread(target=self.residence.clear, args=(_CLEAR_TIMEOUT_S,), daemon=True)
        clearing.start()
        clearing.join(2 * _CLEAR_TIMEOUT_S)

    def end(self, code: int) -> None:
        """End the lease with that EXIT_* code. A signal handler calls this, so it takes no lock."""
        if not self._over:
            self._code = code
            self._over = True
            os.eventfd_write(self._wake, 1)

    def _admit_nobody(self) -> None:
        """Whoever connects from now on is meant for the worker that follows."""
        self._is_closed = True

    def _fail(self, failure: DeviceFailure) -> None:
        """End the lease: this process cannot use its GPU any more. The thread of the session goes no further."""
        if not self._failure:
            self._failure = failure.reason
        self.end(EXIT_KERNEL_FAILED if failure.is_programs else EXIT_GPU_FAILED)
        threading.Event().wait()

    def devices(self) -> list[Device]:
        """The slices. The first session creates them, so CUDA is not used before."""
        with self._lock:
            if self._devices is None:
                self._devices = devices.create_devices(self.spec.devices)
                for d in self._devices:
                    d.reclaim = functools.partial(self.shared.reclaim, d)
            return self._devices

    def limit(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Limit each GPU, by uuid, to so many MiB.

        Where more is in use, change nothing and return the MiB in use by uuid.
        """
        with self._lock, contextlib.ExitStack() as locked:
            created = self._devices or []
            for d in created:
                locked.enter_context(d.recordings.resting())
                locked.enter_context(d.settled())
            in_use = {
                d.spec.uuid: -(-d.in_use >> 20)
                for d in created
                if d.in_use > limits.get(d.spec.uuid, d.spec.limit_mib) << 20
            }
            if not in_use:
                resized = tuple(
                    replace(d, limit_mib=limits.get(d.uuid, d.limit_mib)) for d in self.spec.devices
                )
                self.spec = replace(self.spec, devices=resized)
                for device, spec in zip(created, resized):
                    device.resize(spec)
            return in_use

    def place(self, specs: Sequence[DeviceSpec]) -> None:
        """Go on with these slices, in the order of the lease, while everything is parked. Raises ValueError."""
        placed = self.devices()
        if len(specs) != len(placed):
            raise ValueError(f"{len(specs)} slices for a lease of {len(placed)}")
        with self._lock, contextlib.ExitStack() as locked:
            for device, spec in zip(placed, specs):
                locked.enter_context(device.recordings.resting())
                locked.enter_context(device.settled())
                if not devices.can_become(device, spec):
                    raise ValueError(f"this process cannot go on with another GPU than {device.spec.uuid}")
                if device.allocated > spec.limit_mib << 20:
                    raise ValueError(f"{device.allocated} bytes do not fit into {spec.limit_mib} MiB")
            for k, (device, spec) in enumerate(zip(placed, specs)):
                self._former.setdefault(device.spec.uuid, k)
                device.resize(replace(spec, index=device.spec.index))
            self.spec = replace(self.spec, devices=tuple(device.spec for device in placed))

    def obey(self, what: str, message: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        """Do what an engine asks about a move, and return the answer; None for something else.

        Of the descriptors that came along it takes what it needs. Raises CannotMove, ValueError and OSError.
        """
        if what in ("send", "send_ahead"):
            host, port = message["to"]
            sock = socket.socket(fileno=descriptors.pop()) if descriptors else None
            if what == "send":
                return self.departure.send(host, port, message["secure"], sock)
            self.departure.begin(host, port, message["secure"], sock)
        elif what == "send_rest":
            return self.departure.finish()
        elif what == "name":
            return {"name": self.links.name}
        elif what == "expect":
            self.company.expect(message["peer"])
        elif what == "linked":
            return {"missing": self.company.missing()}
        elif what == "replace":
            self.company.replace(message["done"] is True)
        elif what == "link":
            self.links.obey(message, descriptors)
        elif what == "peers":
            self.links.introduce(message["names"])
        elif what == "stay":
            self.departure.stay()
        elif what == "leave":
            self.departure.leave(*message["to"])
        elif what == "serve":
            self.arrival.serve(self.go_on)
        else:
            return None
        return {}

    # -- connections

    def _accept(self, listener: socket.socket) -> None:
        while not self._over:
            try:
                sock = _arrival(listener)
            except OSError:
                return
            if sock is None:
                continue
            with self._lock:
                self._unauthenticated[sock] = time.monotonic()
                before = (
                    next(iter(self._unauthenticated.values()))
                    if len(self._unauthenticated) > _MAX_UNAUTHENTICATED
                    else 0.0
                )
            self._turn_away(before)
            threading.Thread(target=self._serve, args=(sock,), name="client", daemon=True).start()

    def _forget_pending(self, sock: socket.socket) -> None:
        """A connection has authenticated itself, or is given up."""
        with self._lock:
            self._unauthenticated.pop(sock, None)

    def _turn_away(self, before: float) -> None:
        """Close connections that were accepted at ``before`` or earlier and are not authenticated."""
        with self._lock:
            late = [sock for sock, came in self._unauthenticated.items() if came <= before]
        for sock in late:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _expire_sessions(self, now: float) -> None:
        """End the sessions to which nobody comes back, and ask holders whether somebody could."""
        with self._lock:
            lost = [served for served in self._sessions.values() if served.lost_at is not None]
            holders = [holder for holder in self._holders.values() if holder.away_at is None]
        for served in lost:
            if served.expired(now, self.spec.resume_s):
                served.expire()
            elif served.process is not None and now - served.probed_at >= _PROBE_INTERVAL_S:
                # Not at once: where a holder dies in this moment, its system must be able to close the connection in
                # order, and would reset it for bytes that nobody has read.
                served.probed_at = now
                for holder in holders:
                    holder.say(frames.Kind.PROBE, served.process)

    def _note_verdict(self, header: Any) -> None:
        """A holder has answered whether a process lives."""
        if isinstance(header, dict) and isinstance(header.get("lives"), bool):
            with self._lock:
                for served in self._sessions.values():
                    if served.process is not None and served.process == header.get("process"):
                        served.lives = header["lives"]
            os.eventfd_write(self._wake, 1)

    def _expire_holders(self, now: float) -> None:
        """End the lease when no holder is left, or all are silent."""
        with self._lock:
            for id, holder in list(self._holders.items()):
                if holder.away_at is None:
                    continue
                if now - holder.away_at > patience_s(holder.closed, None, self.spec.resume_s):
                    del self._holders[id]
                    # A wire that was cut lets nobody's system close a connection: who is gone was killed with it.
                    if all(other.away_at is not None for other in self._holders.values()):
                        self._holders.clear()
                        break
            holders = list(self._holders.values())
        if not holders:
            self.end(EXIT_HOLDER_LOST)
        heard = max((holder.heard for holder in holders if holder.away_at is None), default=now)
        if now - heard > max(self.spec.ttl_s, self.spec.resume_s):
            self.end(EXIT_FENCED)

    def _serve(self, sock: socket.socket) -> None:
        opened: list[ServedSession] = []
        admitted = contextlib.ExitStack()
        with contextlib.ExitStack() as closing:
            # With a second descriptor, the connection can be closed while its thread is in TLS.
            accepted = closing.enter_context(sock)
            try:
                twin = sock.dup()
                conn = handshake.secured(twin, self.spec, self.certificate) if self.certificate else twin
                closing.enter_context(conn)

                def let_in(hello: dict[str, Any]) -> dict[str, Any]:
                    self._forget_pending(accepted)
                    if hello["role"] == "session" and self._devices is None:
                        self._set_up(conn, hello)
                    return self._let_in(hello, opened, admitted)

                hello = handshake.admit(conn, self.spec, self._facts(), resume=let_in)
            except (handshake.Refused, ConnectionError, frames.WireError, OSError):
                for served in opened:  # its client never heard of it
                    self._close(served)
                admitted.close()
                if self._failure and self._devices is None:
                    self.end(EXIT_GPU_UNUSABLE)
                return
            finally:
                self._forget_pending(accepted)
                accepted.close()
            if hello["role"] == "worker":
                with contextlib.suppress(
                    OSError
                ):  # the other one has gone, and the engine learns of it there
                    self.arrival.receive(conn)
                return
            if hello["role"] == "peer":
                self.links.serve(hello["peer"], conn, hello.get("next") is True)
                return
            if hello["role"] == "holder":
                self._hold(conn, hello, admitted)
                return
            closing.pop_all()  # the session closes its connections
        with admitted:
            with self._lock:
                known = self._sessions.get(hello.get("session", ""))
            if not opened and known is not None:
                if known.attach(conn, hello["generation"]):
                    with self._lock:
                        self._reconnects += 1
                else:
                    conn.close()
                return
            served = opened[0] if opened else self._open("", hello)
            served.follows = hello.get("follows") is True
            session = self._begin(conn, served, hello)
        if session is not None:
            self._execute(served, session)

    def _let_in(
        self, hello: dict[str, Any], opened: list[ServedSession], admitted: contextlib.ExitStack
    ) -> dict[str, Any]:
        """Let an authenticated client in; it is known when ``admitted`` is closed. Raises BadNumbers, MovedAway."""
        self.secret = hello["secret"]
        if hello["role"] == "peer":
            self.links.admit(hello.get("peer"), hello.get("next") is True)
        if hello["role"] in ("worker", "peer"):
            return {}
        admitted.enter_context(self.admission)
        return self._resume(hello, opened)

    def _resume(self, hello: dict[str, Any], opened: list[ServedSession]) -> dict[str, Any]:
        """Let a client resume its session, or open one, which is added to ``opened``.

        Raises BadNumbers, and ConnectionLost where nobody is admitted any more.

        Returns more fields of the welcome. The session is known before its client hears of it, because the connection
        may be lost in that moment.
        """
        if self._is_closed or self._over:
            raise frames.ConnectionLost("the worker ends")
        if hello["role"] != "session" or "session" not in hello:
            return {}
        id, generation = session_id(hello["session"]), hello.get("generation")
        with self._lock:
            served = self._sessions.get(id)
        if served is None:
            # A client that was never welcomed has nothing here, however often it has tried.
            if number(generation, "generation") > 1 and hello.get("new") is not True:
                raise BadNumbers("it has ended")
            served = self._open(id, hello)
            opened.append(served)
        known = devices.facts(self.spec.devices, self._devices or ())
        return {"devices": known, **served.resume(generation, hello.get("received"))}

    def _set_up(self, conn: tls.Connection, hello: dict[str, Any]) -> None:
        """Set the slices up, for the welcome names what they have for tensors. A client that can wait gets signs.

        Raises Refused if that is not possible.
        """
        done = threading.Event()

        def create() -> None:
            try:
                self.devices()
            except Exception as e:  # CUDA's and NVML's own errors are of many kinds
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
                self._failure = f"the GPU cannot be used: {reason}"
            done.set()

        threading.Thread(target=create, name="set up", daemon=True).start()
        while not done.wait(_SIGN_INTERVAL_S):
            if hello.get("waits") is True:
                frames.send(conn, frames.Kind.PING, None)
        if self._devices is None:
            raise handshake.Refused(self._failure)

    def _open(self, id: str, hello: dict[str, Any]) -> ServedSession:
        return self.new_served(id, hello.get("process"))

    def new_served(self, id: str, process: Any) -> ServedSession:
        """A new session, of a client whose process is that."""
        served = ServedSession(
            id,
            _process(process),
            max(d.limit_mib for d in self.spec.devices) << 20,
            on_change=lambda: os.eventfd_write(self._wake, 1),
        )
        with self._lock:
            self._sessions[served.key] = served
        return served

    def _close(self, served: ServedSession) -> None:
        served.close()
        with self._lock:
            self._sessions.pop(served.key, None)

    def _facts(self) -> dict[str, Any]:
        facts = devices.facts(self.spec.devices)
        return {
            "torch": torch.__version__,
            "devices": facts,
            "software": software(),
            # Without an engine it is linked to nobody.
            "peer": self.links.name if self.links.ask is not None else "",
        }

    def _hear_peer(self, link: PeerLink, header: list[Any], nbytes: int, read: Read) -> None:
        is_message = bool(header) and type(header[0]) is int and header[0] >= What.WANTED
        (self._far_messages if is_message else self._meetings).hear(link, header, nbytes, read)

    def _lose_peer(self, link: PeerLink, why: str) -> None:
        self._meetings.lose(link, why)
        self._far_messages.lose(link)

    def _hold(self, sock: tls.Connection, hello: dict[str, Any], admitted: contextlib.ExitStack) -> None:
        """Serve a connection of a holder. The holder may come back, unless it gave itself no id."""
        given = hello.get("holder")
        id = given if isinstance(given, str) else uuid.uuid4().hex
        holder = _Holder(sock, hello.get("follows") is True and isinstance(given, str))
        with admitted, self._lock:
            before = self._holders.get(id)
            self._holders[id] = holder
            self._held_at = self._held_at or time.time()
        if before is not None:
            before.hang_up()
        code: int | None = None if isinstance(given, str) else EXIT_HOLDER_LOST
        died = False
        try:
            while True:
                kind, header, length = frames.receive(sock, frames.MAX_HELLO)
                if length:
                    break
                holder.heard = time.monotonic()
                if kind is frames.Kind.BYE:
                    died = isinstance(header, dict) and header.get("died") is True
                    code = EXIT_HOLDER_LOST if died else EXIT_RELEASED
                    break
                if kind is frames.Kind.PING:
                    holder.say(kind, None)
                elif kind is frames.Kind.PROBE:
                    self._note_verdict(header)
        except frames.ConnectionClosed:
            holder.closed = True
        except (ConnectionError, frames.WireError, OSError):
            pass  # it may come back
        with self._lock:
            if self._holders.get(id) is not holder:
                return  # it has come back
            if code is None:
                holder.away_at = time.monotonic()
            else:
                del self._holders[id]
            if died:  # the others that have gone are of the same program
                self._holders = {k: h for k, h in self._holders.items() if h.away_at is None}
            if code is not None and not self._holders:
                self.end(code)

    def _begin(
        self, sock: tls.Connection, served: ServedSession, hello: dict[str, Any]
    ) -> WorkerSession | OtherSession | None:
        """Begin a new session on its first connection. Return what executes its frames, or None if it has ended."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._close, served)
            with self._lock:
                full = len(self._sessions) > _MAX_SESSIONS
            if not served.attach(sock, hello["generation"] if served.id else 0):
                sock.close()  # its client has made another one already
            if full:
                served.say(f"{_MAX_SESSIONS} processes use this lease already, and no more are allowed")
                return None
            threads = hello.get("threads")
            if type(threads) is int and 0 < threads <= 1024:
                for device in self.devices():
                    device.match_threads(threads)
            numbers = self._numbers(hello.get("devices"))
            if numbers is None:
                served.say("this client numbers devices that the lease does not have")
                return None
            if "framework" in hello:
                try:
                    self.new_other(served, numbers, hello["framework"])
                except ImportError as e:
                    served.say(str(e))
                    return None
            else:
                self.new_session(served, numbers)
            closing.pop_all()
        return served.session

    def new_other(self, served: ServedSession, numbers: dict[int, Device], framework: Any) -> OtherSession:
        """What executes the frames of a session of another framework. Raises ImportError where there is none."""
        begin = self._frameworks.get(framework) if isinstance(framework, str) else None
        position = {device: k for k, device in enumerate(self.devices())}
        if begin is None:
            raise ImportError("this worker serves PyTorch only")
        positions = {number: position[device] for number, device in numbers.items()}
        executes = begin(numbers, positions, len(position), served.answer)
        served.session = session = OtherSession(str(framework), executes, self.residence, numbers)
        return session

    def new_session(self, served: ServedSession, numbers: dict[int, Device]) -> WorkerSession:
        """What executes the frames of a session whose client numbers the devices so."""
        served.session = session = WorkerSession(
            list(numbers.values()),
            answer=served.answer,
            complain=served.complain,
            shared=self.shared,
            meetings=self._meetings,
            messages=self._messages,
            is_over=lambda: served.is_over,
            numbers=numbers,
            residence=self.residence,
            on_failing=self._admit_nobody,
            on_failure=self._fail,
            links=self.links,
            far=self._far_messages,
        )
        return session

    def _execute(self, served: ServedSession, session: WorkerSession | OtherSession) -> None:
        """Serve a session until it ends, through all its connections."""
        try:
            with torch.inference_mode():
                self._loop(served, session)
        except (BadRecord, frames.WireError) as e:
            served.say(f"the worker ended this session, because the client sent something invalid: {e}")
        except (SessionOver, OSError):
            pass  # nobody has come back
        finally:
            self._close(served)
            session.close()

    # -- moving

    def served(self) -> list[ServedSession]:
        """Every session."""
        with self._lock:
            return list(self._sessions.values())

    def refuse_to_move(self) -> None:
        """Raise CannotMove if somebody could not go along."""
        with self._lock:
            follow = [served.follows and bool(served.id) for served in self._sessions.values()]
            follow += [holder.follows for holder in self._holders.values()]
            others = [s.session for s in self._sessions.values() if isinstance(s.session, OtherSession)]
        for other in others:
            if why := other.executes.objection():
                raise CannotMove(why)
        if not all(follow):
            raise CannotMove("a client of it is of an earlier version, which does not follow its lease")
        if not self.secret:
            raise CannotMove("nobody has attached to it yet")

    def describe(self) -> dict[str, Any]:
        """What belongs to the lease besides its state."""
        now = time.monotonic()
        with self._lock:
            holders = {
                id: [0.0 if holder.away_at is None else now - holder.away_at, holder.closed]
                for id, holder in self._holders.items()
            }
            former = {d.uuid: k for k, d in enumerate(self.spec.devices)}
            return {
                "holders": holders,
                "former": {**self._former, **former},
                "held_at": self._held_at,
                "reconnects": self._reconnects,
                "company": self.company.describe(
                    {
                        served.session.sender: served.id
                        for served in self._sessions.values()
                        if isinstance(served.session, WorkerSession)
                    }
                ),
            }

    def check_description(self, given: Any) -> None:
        """Raise WireError for what is not from :meth:`describe`; begin to be linked to the lease's other workers."""
        if not isinstance(given, dict):
            raise frames.WireError("no description of a lease")
        former, holders = given.get("former"), given.get("holders")
        count = len(self.spec.devices)
        if (
            not isinstance(former, dict)
            or not isinstance(holders, dict)
            or not all(type(k) is int and 0 <= k < count for k in former.values())
            or not all(isinstance(away, list) and len(away) == 2 for away in holders.values())
            or not isinstance(given.get("reconnects"), int)
            or not isinstance(given.get("held_at"), (float, type(None)))
        ):
            raise frames.WireError("no description of a lease")
        if given.get("company") is not None:
            try:
                self.company.arrive(given["company"])
            except ValueError as e:
                raise frames.WireError(f"no description of a lease: {e}") from None

    def take_over(self, given: dict[str, Any]) -> None:
        """Hold the lease for those who held it at the worker before, and who are about to come.

        Raises ValueError if the lease's other workers are not linked.
        """
        with self._lock:
            sessions = {served.id: served.session for served in self._sessions.values()}
        self.company.go_on(
            {id: session.sender for id, session in sessions.items() if isinstance(session, WorkerSession)}
        )
        self._messages.come_from_elsewhere()
        now = time.monotonic()
        with self._lock:
            for id, (away_s, closed) in given["holders"].items():
                self._holders[id] = _Holder(None, follows=True)
                self._holders[id].away_at, self._holders[id].closed = now - away_s, closed
            self._former = dict(given["former"])
            self._held_at = given["held_at"] or time.time()
            self._reconnects = given["reconnects"]
            for served in self._sessions.values():
                served.follows = True
                served.lost_at = served.probed_at = now
            self.spec = replace(self.spec, awaits_state=False)

    def go_on(self, served: ServedSession) -> None:
        """Execute the frames of a session that has arrived, in a thread of its own."""
        assert served.session is not None, "it has arrived with one"
        threading.Thread(
            target=self._execute, args=(served, served.session), name="client", daemon=True
        ).start()

    def _numbers(self, wanted: Any) -> dict[int, Device] | None:
        """The devices by the numbers that a client's hello has for them; None if those make no sense.

        ``wanted``: the number of each device that its CUDA_VISIBLE_DEVICES leaves, by UUID; None: those of the lease.
        """
        if wanted is None:
            return {d.spec.index: d for d in self.devices()}
        # A client may have the GPUs from before the lease was parked.
        devices = self.devices()
        known = {uuid: devices[k] for uuid, k in self._former.items()} | {d.spec.uuid: d for d in devices}
        if (
            not isinstance(wanted, dict)
            or not wanted
            or not all(
                uuid in known and type(number) is int and 0 <= number <= _MAX_DEVICE
                for uuid, number in wanted.items()
            )
        ):
            return None
        numbers = {number: known[uuid] for uuid, number in wanted.items()}
        return numbers if len(numbers) == len(wanted) else None

    def _loop(self, served: ServedSession, session: WorkerSession | OtherSession) -> None:
        incoming = served.incoming
        while True:
            frame = incoming.next()
            if frame.kind is frames.Kind.RECORDS and not frame.length:
                with incoming.meanwhile():
                    session.run(frame.header, lambda: served.finish(frame.nbytes))  # noqa: B023  called at once
            elif frame.kind is frames.Kind.UPLOAD:
                try:
                    self._upload(served, session, frame)
                except ConnectionError:
                    continue  # the rest of the frame is lost, so all of it is sent again
            elif frame.kind is frames.Kind.BYE:
                return
            else:
                raise frames.WireError(f"unexpected {frame.kind.name}")

    def _upload(self, served: ServedSession, session: WorkerSession | OtherSession, frame: Frame) -> None:
        """Execute an UPLOAD frame. A payload that was not read ahead goes directly into the tensor."""
        try:
            id, geom = frame.header
        except (TypeError, ValueError):
            raise BadRecord("an upload that names no tensor") from None
        payload, start = frame.payload, 0

        def receive(view: memoryview) -> None:
            nonlocal start
            if not len(view):
                return
            end = start + len(view)
            if payload is None:
                served.incoming.read_payload(frame, view, is_last=end == frame.length)
            else:
                torch.frombuffer(view, dtype=torch.uint8).copy_(payload[start:end])
            start = end

        session.upload(id, geom, frame.length, receive, lambda: served.finish(frame.nbytes))

    # -- reports

    def _report_usage(self, elapsed: float) -> None:
        created = self._devices or []
        busy = {}
        for d in created:
            busy[d.spec.uuid] = d.measure_busy(elapsed)
        state = {
            "allocated_bytes": {d.spec.uuid: d.used() for d in created},
            "overhead_bytes": {d.spec.uuid: d.overhead for d in created},
            "busy": busy,
            "sessions": len(self._sessions),
            "held_at": self._held_at,
            "reconnects": self._reconnects,
            "frameworks": self._frameworks_in_use(),
        }
        if state != self._reported:
            self._reported = state
            self._report(state)

    def _frameworks_in_use(self) -> list[str]:
        with self._lock:
            sessions = [served.session for served in self._sessions.values()]
        names = (s.framework if isinstance(s, OtherSession) else "torch" for s in sessions if s is not None)
        return sorted(set(names))

    def _say_goodbye(self) -> None:
        reason = {
            EXIT_FENCED: "nothing was heard of its holder",
            EXIT_HOLDER_LOST: "its holder went away",
            EXIT_RELEASED: "the lease was released",
            EXIT_STOPPED: "the pool ended the lease",
            EXIT_KERNEL_FAILED: self._failure,
            EXIT_GPU_FAILED: self._failure,
            EXIT_GPU_UNUSABLE: self._failure,
            EXIT_MOVED: "the lease has moved, and this program does not follow it",
        }.get(self._code, "the lease ended")
        with self._lock:
            holders, sessions = list(self._holders.values()), list(self._sessions.values())
        # Another worker takes its place then, if its engine does that.
        more: dict[str, Any] = {"replaced": self._code in (EXIT_KERNEL_FAILED, EXIT_GPU_FAILED)}
        if self.departure.where is not None:
            more["moved"] = list(self.departure.where)
        for holder in holders:
            holder.say(frames.Kind.BYE, {"message": reason, **more})
        for served in sessions:
            served.say(reason, **more)


def _process(given: Any) -> dict[str, Any] | None:
    """The identity of a client's process, as its hello has it; None if that is none."""
    kinds = {"machine": str, "pid": int, "born": float}
    if not isinstance(given, dict) or given.keys() != kinds.keys():
        return None
    named = all(isinstance(given[name], kind) for name, kind in kinds.items())
    return given if named and len(given["machine"]) <= 200 else None


def _arrival(listener: socket.socket) -> socket.socket | None:
    """The next connection, or None if a message came without one. Raises OSError when the listener is closed."""
    if listener.family != socket.AF_UNIX:
        return listener.accept()[0]
    _, descriptors, _, _ = socket.recv_fds(listener, 16, 1)
    return socket.socket(fileno=descriptors[0]) if descriptors else None
