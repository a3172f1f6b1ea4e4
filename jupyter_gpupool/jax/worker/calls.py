"""Calls of a client's own functions, which its programs make: each waits here until the client has answered it.

A program that calls a function waits for it in a thread of XLA's, and so may the session whose program it is. The
client therefore takes its calls by a session of their own.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jupyter_gpupool.jax.protocol.dtypes import DTYPES, TOKEN
from jupyter_gpupool.jax.protocol.status import INTERNAL, StatusError

from .custom_calls import Array

#: The longest that a client may let a call take, in seconds.
MAX_BOUND_S = 3600.0
#: How XLA begins its message, and where the client's own words begin within.
_MESSAGE = re.compile(r"\A(.*?)Traceback \(most recent call last\):\n.*?CallFailed: ", re.DOTALL)


class CallFailed(Exception):
    """A function of the client failed; the message is what the client says of it."""


class Call:
    """One call. ``operands``: an array each, None for a token."""

    def __init__(self, number: int, program: int, function: int, operands: Sequence[Any]) -> None:
        self.number = number
        self.program = program
        self.function = function
        self.operands = operands
        #: what the function returned, or why it did not
        self.outcome: list[Any] | str | None = None


class CallDesk:
    """Where a client's calls wait. Every method may be called from any thread."""

    def __init__(self, bound_s: float) -> None:
        if not bound_s >= 0:
            raise ValueError("no bound in seconds")
        self.token = secrets.token_hex(16)
        self._bound_s = min(bound_s, MAX_BOUND_S)
        self._changed = threading.Condition()
        self._last = 0
        self._waiting: deque[Call] = deque()
        self._open: dict[int, Call] = {}
        self._is_closed = False

    def call(
        self, program: int, function: int, operands: Sequence[Any], results: Sequence[Array]
    ) -> tuple[Any, ...]:
        """Let the client call a function, and return its results, which fit ``results``. Raises CallFailed."""
        until = time.monotonic() + self._bound_s
        kept = [None if x is None else np.array(x, order="C") for x in operands]
        with self._changed:
            self._last += 1
            call = self._open[self._last] = Call(self._last, program, function, kept)
            self._waiting.append(call)
            self._changed.notify_all()
            while call.outcome is None and not self._is_closed:
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    break
            self._open.pop(call.number)
            if call in self._waiting:
                self._waiting.remove(call)
        if call.outcome is None:
            if self._is_closed:
                raise CallFailed("the program whose function is called has gone")
            raise CallFailed(f"the program's function took longer than {self._bound_s:g} s")
        if isinstance(call.outcome, str):
            raise CallFailed(call.outcome)
        return _fitting(call.outcome, results)

    def take(self, timeout_s: float) -> Call | None:
        """Return the next call, waiting for one; None if there is none. Raises StatusError once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed, timeout_s)
            if self._is_closed:
                raise StatusError(INTERNAL, "nobody calls any more")
            return self._waiting.popleft() if self._waiting else None

    def give(self, number: int, outcome: list[Any] | str) -> None:
        """Answer a call: with results, or with what went wrong. One that nobody waits for any more is forgotten."""
        with self._changed:
            call = self._open.get(number)
            if call is not None:
                call.outcome = outcome
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody takes calls any more: whoever waits for one is told so."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _fitting(arrays: Sequence[Any], results: Sequence[Array]) -> tuple[Any, ...]:
    """Return the arrays, which XLA copies without a look at their sizes. Raises CallFailed if they do not fit."""
    found = [Array(TOKEN, ()) if x is None else Array(str(x.dtype), tuple(x.shape)) for x in arrays]
    if found != list(results):
        raise CallFailed(f"the program's function returned {_named(found)} in place of {_named(results)}")
    return tuple(arrays)


def _named(arrays: Sequence[Array]) -> str:
    return ", ".join(f"{array.dtype}{list(array.dims)}" for array in arrays) or "nothing"


def results_by_function(calls: Sequence[tuple[int, tuple[Array, ...]]]) -> Mapping[int, tuple[Array, ...]]:
    """Return what each function returns. Raises ValueError where two calls of it differ, or a type is unknown."""
    found: dict[int, tuple[Array, ...]] = {}
    for function, results in calls:
        if found.setdefault(function, results) != results:
            raise ValueError(
                "a function of the program that returns different arrays is not supported on a slice"
            )
        for array in results:
            if array.dtype != TOKEN and array.dtype not in DTYPES:
                raise ValueError(f"a function that returns {array.dtype} is not supported on a slice yet")
    return found


def failure_of(error: BaseException) -> str:
    """Return XLA's message, with the client's own words where a function of the client has failed."""
    return _MESSAGE.sub(r"\1", str(error))


#: The desks of this process by their tokens.
_desks: dict[str, CallDesk] = {}


def open_desk(bound_s: float) -> CallDesk:
    """Open a desk, at which calls take up to ``bound_s`` seconds."""
    desk = CallDesk(bound_s)
    _desks[desk.token] = desk
    return desk


def find_desk(token: Any) -> CallDesk:
    """Return the desk with a token. Raises StatusError."""
    desk = _desks.get(token) if isinstance(token, str) else None
    if desk is None:
        raise StatusError(INTERNAL, "there are no calls to take")
    return desk


def close_desk(desk: CallDesk) -> None:
    """Close a desk for good."""
    desk.close()
    _desks.pop(desk.token, None)
