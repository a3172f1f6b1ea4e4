"""Lets the frames of all sessions run, or none of them: for whoever wants to be alone with a worker's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from jupyter_gpupool.pytorch.protocol import commands as codes

#: Commands that need nothing of a device's memory.
_NEEDLESS = frozenset(
    [
        *(codes.FREE, codes.WAIT, codes.GET_RNG, codes.DONE, codes.AWAIT, codes.ELAPSED, codes.MEMORY),
        *(codes.PROPERTIES, codes.READINGS, codes.TRACE, codes.GRAPHS),
    ]
)

#: How often a frame that waits looks whether somebody waits for it, in seconds.
_LOOK_S = 0.01


def needs_memory(commands: Any) -> bool:
    """Whether a frame's commands use the devices' memory, or may."""
    if not isinstance(commands, list):
        return True
    i = 0
    while i < len(commands):
        code = commands[i]
        if code not in _NEEDLESS:
            return True
        i += 1 + codes.FIELDS[code]
    return False


class Gate:
    """Frames run inside; whoever closes it is alone. While ``parked`` is set, only frames that need nothing go in.

    Before it is closed, and while it is held, only frames go in for which a frame inside waits, here or at another
    worker of the lease: who is in the middle of an exchange with them must come out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._closed = False
        self._closing = False
        self._held = False
        #: whether it is any of these
        self._is_shut = False
        self.parked = False
        self._parks = 0
        #: called when a frame waits for what is parked
        self.on_wanted: Callable[[], None] = lambda: None
        #: when a frame last needed memory, on a monotonic clock
        self.used_at = time.monotonic()
        #: how many frames have
        self.uses = 0

    def enter(self, commands: Any = None, is_due: Callable[[], bool] = lambda: False) -> None:
        """Go in with a frame, or wait. ``commands`` None: it needs memory.

        ``is_due``: whether somebody waits for this frame's session in an exchange.
        """
        with self._lock:  # a condition's own methods would take several times as long
            if not self._is_shut and not self.parked:
                self._inside += 1
                self.uses += 1
                self.used_at = time.monotonic()
                return
            needs: bool | None = True if commands is None else None  # None: it was not looked at yet
            asked = 0
            while True:
                if self.parked and needs is None:
                    needs = needs_memory(commands)
                waits = self.parked and needs
                if not waits and (not self._is_shut or (not self._closed and is_due())):
                    break
                if waits and asked != self._parks:  # also if it was here, and has gone again, meanwhile
                    asked = self._parks
                    self.on_wanted()
                self._changed.wait(None if waits or self._closed else _LOOK_S)
            self._inside += 1
            if needs or not self.parked:
                self.uses += 1
                self.used_at = time.monotonic()

    def leave(self) -> None:
        """Come out."""
        with self._lock:
            self._inside -= 1
            if self._is_shut and not self._inside:
                self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in, and wait until nobody is inside. False, and open again, if that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._closed and not self._closing, timeout_s):
                return False
            self._closing = True
            self._note_shut()
            self._closed = self._changed.wait_for(lambda: not self._inside, timeout_s)
            self._closing = False
            self._note_shut()
            return self._closed

    def open(self, parked: bool | None = None) -> None:
        """Let frames in again."""
        with self._changed:
            self._closed = False
            if parked is not None:
                self._parks += parked and not self.parked
                self.parked = parked
            self._note_shut()

    # -- at several workers at once

    def hold(self) -> None:
        """Let in only what somebody waits for, until :meth:`release`. It may be closed and opened meanwhile."""
        with self._changed:
            self._held = True
            self._note_shut()

    def release(self) -> None:
        """End :meth:`hold`."""
        with self._changed:
            self._held = False
            self._note_shut()

    def rest(self) -> tuple[bool, int]:
        """Whether it is held and nobody is inside, and how many frames have been."""
        with self._changed:
            return self._held and not self._inside, self.uses

    def _note_shut(self) -> None:
        self._is_shut = self._closed or self._closing or self._held
        self._changed.notify_all()
