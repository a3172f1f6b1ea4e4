"""Runs the command for ``gpupool run``, and makes sure that none of it is left when `gpupool run` is killed.

Linux cannot tell a process's descendants that it died, only its children. So between `gpupool run`
and the command stands a small process, the keeper, to which every orphan among the command's
descendants is handed; it is forked first of all, while there are no threads and few things in memory.
When `gpupool run` ends without a word, the keeper kills them. In any case it removes the configuration file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

#: Handed on to the command when they are sent to `gpupool run`.
FORWARDED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

#: What a shell answers for a command that cannot be executed.
NOT_EXECUTABLE = 126
#: More than a message ever has; the environment is not sent, only what is added to it.
_MESSAGE = 64 * 1024


class Keeper:
    """Starts as a child of this process and waits. Use :meth:`run` once, and :meth:`close` in any case."""

    def __init__(self, command: Sequence[str], config: Path) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ignored = {s for s in FORWARDED if signal.getsignal(s) is signal.SIG_IGN}
        #: a command under nohup, say, is to ignore what its caller ignored
        self._forwarded = FORWARDED - ignored
        self._pid = os.fork()
        if self._pid == 0:
            self._sock.close()
            _keep(theirs, list(command), config, self._forwarded)
        theirs.close()

    def run(self, added: Mapping[str, str]) -> int:
        """Run the command with ``added`` in its environment, hand signals on, return its exit code:
        128 + n when signal n ended it."""
        watched = self._forwarded | {signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        try:
            self._sock.send(json.dumps({"environment": dict(added)}).encode())
            while True:
                code = self._code()
                if code is not None:
                    return code
                arrived = signal.sigwaitinfo(watched)
                # What a terminal sends (positive code) goes to the command too; what a process sends does not.
                if arrived.si_signo != signal.SIGCHLD and arrived.si_code <= 0:
                    with contextlib.suppress(OSError):
                        self._sock.send(json.dumps({"signal": arrived.si_signo}).encode())
        finally:
            for sig in self._forwarded & signal.sigpending():
                signal.sigwait({sig})  # came too late for the command, and is not meant for us
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the keeper, and the command if it runs."""
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _code(self) -> int | None:
        """The command's exit code if it has ended."""
        try:
            message = self._sock.recv(_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:  # the keeper was killed, and the command with it
            return 128 + signal.SIGKILL
        return int(json.loads(message)["code"])


def _keep(
    sock: socket.socket, command: list[str], config: Path, forwarded: frozenset[signal.Signals]
) -> NoReturn:
    """The keeper's whole life."""
    code = 0
    try:
        for sig in forwarded:
            signal.signal(sig, signal.SIG_IGN)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker)
        message = sock.recv(_MESSAGE)
        if message:
            pid = _start(command, json.loads(message)["environment"], forwarded)
            ended = _watch(sock, wake, pid) if pid else NOT_EXECUTABLE
            config.unlink(missing_ok=True)  # before anybody may think that all is over
            _tell(sock, {"code": ended})
    except BaseException:  # a bug: the command is killed with its keeper; no traceback reaches the user
        code = 70
    finally:
        config.unlink(missing_ok=True)
        os._exit(code)


def _start(command: list[str], added: dict[str, str], forwarded: frozenset[signal.Signals]) -> int:
    """Returns the command's process; 0, having said why, when it cannot be executed."""
    keeper = os.getpid()

    def in_child() -> None:
        for sig in forwarded:
            signal.signal(sig, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:  # it died before the line above
            os._exit(1)

    try:
        # The caller's own open files stay open for the command, as in a shell; ours are not inheritable.
        process = subprocess.Popen(
            command,
            env={**os.environ, **added},
            preexec_fn=in_child,
            close_fds=False,  # no thread runs here
        )
    except OSError as e:
        os.write(2, f"gpupool: cannot run {command[0]}: {e.strerror}\n".encode())
        return 0
    process.returncode = 0  # it is reaped below
    return process.pid


def _watch(sock: socket.socket, wake: int, command: int) -> int:
    """Until the command ends, or nobody is left to tell its exit code."""
    while True:
        status = _reap(command)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        ready, _, _ = select.select([sock.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if sock.fileno() in ready:
            message = sock.recv(_MESSAGE)
            if not message:
                _kill_all()
                return 128 + signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(command, json.loads(message)["signal"])


def _reap(command: int) -> int | None:
    """Bury the dead, adopted ones too; the command's status if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == command:
                found = status
    return found


def _kill_all() -> None:
    """Kill every descendant; those that are orphaned by it become children and are found again."""
    me = psutil.Process()
    while True:
        with contextlib.suppress(psutil.Error):
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _tell(sock: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody is left who wants to know
        sock.send(json.dumps(message).encode())
