"""Functions of this process that programs on a slice call: they run here, in a thread of their own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.arrays import packed, unpacked
from jupyter_gpupool.jax.protocol.status import FAILED_PRECONDITION, StatusError

from .session import SliceSession

#: The environment variable with the seconds that a call may take, and what it is without it.
TIMEOUT = "GPUPOOL_JAX_CALL_TIMEOUT_S"
_TIMEOUT_S = 300.0
#: What a program's options have of its functions, see :meth:`Functions.named`.
_NAME = "gpupool-functions-"
_NAMED = re.compile(_NAME.encode() + rb"([0-9a-f]{32})")


class Group:
    """The functions of one program, by their numbers."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self.functions = tuple(functions)


class Functions:
    """Finds the functions of a program, and calls them when its worker asks for it.

    ``connect`` opens another session with the worker.
    """

    def __init__(self, connect: Callable[[], SliceSession]) -> None:
        self._connect = connect
        self._named: dict[str, Group] = {}
        self._of_programs: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()
        self._starting = threading.Lock()
        self._session: SliceSession | None = None
        self._here = threading.local()

    @contextlib.contextmanager
    def named(self, functions: Sequence[Callable[..., Any]]) -> Iterator[str]:
        """Within, a program whose options have that name calls these functions."""
        name = secrets.token_hex(16)
        self._named[name] = Group(functions)
        try:
            yield _NAME + name
        finally:
            del self._named[name]

    def of(self, options: bytes) -> Group | None:
        """Return the functions that a program's options name."""
        found = _NAMED.search(options)
        return self._named.get(found[1].decode()) if found else None

    def serve(self, session: SliceSession, program: int, group: Group) -> None:
        """Let a program of a session call these functions, as long as somebody has the group. Raises StatusError."""
        self._of_programs[program] = group
        with self._starting:
            if self._session is None:
                (token,) = session.answer(commands.SERVE, _timeout_s())
                self._session = taking = self._connect()
                threading.Thread(
                    target=self._take, args=(taking, token), name="gpupool jax calls", daemon=True
                ).start()

    def refuse_inside(self) -> None:
        """Raise StatusError in a function that a program calls: the program waits for it, and it for the program."""
        if getattr(self._here, "inside", False):
            raise StatusError(
                FAILED_PRECONDITION,
                "a function that a program calls cannot wait for arrays of a slice, because the program waits for it; "
                "pass it what it needs as an argument",
            )

    def close(self) -> None:
        """End the session by which calls come."""
        if self._session is not None:
            self._session.close()

    def forked(self) -> None:
        """In a forked child: leave the connection to the parent."""
        if self._session is not None:
            self._session.forked()

    def _take(self, session: SliceSession, token: str) -> None:
        self._here.inside = True
        failed, reason = 0, ""
        with contextlib.suppress(StatusError):  # the worker has gone
            while True:
                answer, data = session.answer_with_data(commands.TAKE, token, failed, reason)
                number, program, function, facts = answer
                failed, reason = 0, ""
                if not number:
                    if self._end_if_unused(session):
                        return
                    continue
                try:
                    results = packed(self._call(program, function, unpacked(facts, data)))
                except BaseException:  # whatever it is, it ends the program, and not this thread
                    failed, reason = number, traceback.format_exc()
                else:
                    session.send_results(number, *results)

    def _end_if_unused(self, session: SliceSession) -> bool:
        """Take no more calls if no program is left that calls: the lease may move then. Return whether that is so."""
        with self._starting:
            if self._of_programs:
                return False
            self._session = None
            session.close()
            return True

    def _call(self, program: int, function: int, operands: list[Any]) -> Sequence[Any]:
        group = self._of_programs.get(program)
        if group is None:
            raise RuntimeError("the program is gone")
        for operand in operands:
            if operand is not None:
                operand.flags.writeable = False  # as those that JAX calls functions with
        return group.functions[function](*operands)


def _timeout_s() -> float:
    try:
        return max(0.0, float(os.environ.get(TIMEOUT, "")))
    except ValueError:
        return _TIMEOUT_S
