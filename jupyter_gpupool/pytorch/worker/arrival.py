"""The worker at which a lease arrives: takes everything from the worker before, and serves once the engine says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from jupyter_gpupool.transport import frames, tls
from jupyter_gpupool.transport.resumption import BadNumbers, Frame, Numbers, WorkerEnd, session_id

from . import lease_state
from .served_session import ServedSession
from .state_stream import read_state

if TYPE_CHECKING:
    from .device import Device
    from .executor import WorkerSession
    from .other_frameworks import OtherSession
    from .worker import Worker

#: How long the worker before may take to go on sending, in seconds: it waits until its sessions rest.
_PROGRESS_TIMEOUT_S = 60.0


class Arrival:
    """``is_whole``: everything is here, and nobody is served yet."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._begun = False
        self.is_whole = False
        self._sessions: list[ServedSession] = []
        self._more: Any = None

    @torch.inference_mode()
    def receive(self, conn: tls.Connection) -> None:
        """Take everything from a connection of the worker before, once."""
        worker = self._worker
        if self._begun or not worker.spec.awaits_state:
            frames.send(conn, frames.Kind.STATE, {"failed": "it waits for no state"})
            return
        self._begun = True
        conn.settimeout(_PROGRESS_TIMEOUT_S)
        frames.send(conn, frames.Kind.STATE, {"failed": ""})
        try:
            devices = worker.devices()
            description, memories = read_state(devices, lambda view: frames.receive_into(conn, view))
            lease_state.put(description, memories, devices, worker.shared, self._new_session, self._new_other)
            kind, self._more, _ = frames.receive(conn)
            if kind is not frames.Kind.STATE:
                raise frames.WireError(f"unexpected {kind.name}")
            worker.check_description(self._more)
        except (lease_state.BadState, frames.WireError, BadNumbers, OSError) as e:
            frames.send(conn, frames.Kind.STATE, {"failed": str(e)})
            return
        self.is_whole = True
        frames.send(conn, frames.Kind.STATE, {"failed": ""})

    def serve(self, go_on: Callable[[ServedSession], None]) -> None:
        """Go on where the worker before stopped: call ``go_on`` with each session, and let clients in.

        Raises ValueError if not everything is here.
        """
        if not self.is_whole:
            raise ValueError("the lease has not arrived whole")
        if not self._worker.spec.awaits_state:
            return
        self._worker.take_over(self._more)
        for served in self._sessions:
            go_on(served)
        self._worker.admission.open()

    def _new_session(self, identity: Any, numbered: dict[int, Device]) -> WorkerSession:
        return self._worker.new_session(self._described(identity), numbered)

    def _new_other(self, identity: Any, numbered: dict[int, Device], framework: str) -> OtherSession:
        try:
            return self._worker.new_other(self._described(identity), numbered, framework)
        except ImportError as e:
            raise ValueError(str(e)) from None

    def _described(self, identity: Any) -> ServedSession:
        try:
            served = described(identity, self._worker.new_served)
        except BadNumbers as e:
            raise ValueError(str(e)) from None
        self._sessions.append(served)
        return served


def described(identity: Any, new: Callable[[str, Any], ServedSession]) -> ServedSession:
    """The session that :meth:`ServedSession.describe` described. Raises BadNumbers."""
    if not isinstance(identity, dict) or not isinstance(identity.get("kept"), list):
        raise BadNumbers("a session without an identity")
    numbers = Numbers.from_json(identity.get("numbers") or {})
    kept = []
    for number, entry in enumerate(identity["kept"], numbers.acknowledged + 1):
        head, payload = entry
        if not isinstance(head, bytes) or not (payload is None or isinstance(payload, bytes)):
            raise BadNumbers("an answer that is none")
        frame = Frame(head, None if payload is None else memoryview(payload))
        frame.number = number
        kept.append(frame)
    if numbers.acknowledged + len(kept) != numbers.sent:
        raise BadNumbers(f"{len(kept)} answers of those from {numbers.acknowledged} to {numbers.sent}")
    served = new(session_id(identity.get("id")), identity.get("process"))
    served.end = WorkerEnd(served.id, numbers, kept)
    served.incoming.received = numbers.received
    return served
