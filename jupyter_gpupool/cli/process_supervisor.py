"""Runs the command of ``gpupool run``, and ends all its processes when `gpupool run` is killed.

Linux can notify only the children of a process of its death, not all descendants. So a small process, the
supervisor, runs between `gpupool run` and the command. It is forked first, while there are no threads and little
memory is in use, and it adopts the orphans among the command's descendants. If `gpupool run` dies, the supervisor
kills them all. In any case it removes the configuration file.
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

#: Signals to `gpupool run` that are forwarded to the command.
FORWARDED = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

#: A shell's exit code for a command that cannot be executed.
NOT_EXECUTABLE = 126
#: The longest message, in bytes; only additions to the environment are sent, not all of it.
_MAX_MESSAGE_BYTES = 64 * 1024


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class ProcessSupervisor:
    """Starts as a child of this process and waits. Use :meth:`run` once, and :meth:`close` in any case."""

    def __init__(self, command: Sequence[str], config: Path) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ignored = {s for s in FORWARDED if signal.getsignal(s) is signal.SIG_IGN}
        #: a command under nohup, for example, ignores the signals that its caller ignored
        self._forwarded = FORWARDED - ignored
        self._pid = os.fork()
        if self._pid == 0:
            self._sock.close()
            _supervise(theirs, list(command), config, self._forwarded)
        theirs.close()

    def run(self, added: Mapping[str, str]) -> int:
        """Run the command with ``added`` in its environment, forward signals, and return its exit code.

        The code is 128 + n if signal n ended the command.
        """
        watched = self._forwarded | {signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        try:
            self._sock.send(json.dumps({"environment": dict(added)}).encode())
            while True:
                code = self._code()
                if code is not None:
                    return code
                arrived = signal.sigwaitinfo(watched)
                if arrived.si_signo != signal.SIGCHLD:
                    # A terminal (positive code) sends its signals to the command too.
                    message = {"signal": arrived.si_signo, "terminal": arrived.si_code > 0}
                    with contextlib.suppress(OSError):
                        self._sock.send(json.dumps(message).encode())
        finally:
            for sig in self._forwarded & signal.sigpending():
                signal.sigwait({sig})  # arrived after the command ended, and is not meant for us
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the supervisor, and the command if it runs."""
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _code(self) -> int | None:
        """Return the command's exit code; None while it runs."""
        try:
            message = self._sock.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:  # the supervisor was killed, and the command with it
            return 128 + signal.SIGKILL
        return int(json.loads(message)["code"])


def _supervise(
    sock: socket.socket, command: list[str], config: Path, forwarded: frozenset[signal.Signals]
) -> NoReturn:
    """Run the supervisor's process from start to end."""
    code = 0
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # see _forward
        _set_title(f"supervisor: {' '.join(command)}")
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker)
        message = sock.recv(_MAX_MESSAGE_BYTES)
        if message:
            pid = _start(command, json.loads(message)["environment"], forwarded, before)
            ended = _watch(sock, wake, pid) if pid else NOT_EXECUTABLE
            config.unlink(missing_ok=True)  # before the caller learns that the command has ended
            _send(sock, {"code": ended})
    except BaseException:  # a bug: the command is killed with the supervisor; no traceback reaches the user
        code = 70
    finally:
        config.unlink(missing_ok=True)
        os._exit(code)


def _start(
    command: list[str],
    added: dict[str, str],
    forwarded: frozenset[signal.Signals],
    mask: set[int | signal.Signals],
) -> int:
    """Start the command and return its process id; print why and return 0 if it cannot be executed."""
    supervisor = os.getpid()

    def in_child() -> None:
        for sig in forwarded:
            signal.signal(sig, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the line above
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
    """Wait for the command and return its exit code; kill it when `gpupool run` is gone."""
    while True:
        status = _reap(command)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        ready, _, _ = select.select([sock.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if sock.fileno() in ready:
            message = sock.recv(_MAX_MESSAGE_BYTES)
            if not message:
                _kill_all()
                return 128 + signal.SIGKILL
            received = json.loads(message)
            _forward(command, received["signal"], received["terminal"])


def _forward(command: int, signum: int, terminal: bool) -> None:
    """Send the command a signal that `gpupool run` has received, unless the command has received it too.

    A signal to the process group reaches this process as well, where it is blocked and stays pending. The kernel
    signals the younger processes of a group first, so it is pending before `gpupool run` can report it.
    """
    reached = signum in signal.sigpending()
    if reached:
        signal.sigwait({signum})
    with contextlib.suppress(ProcessLookupError, PermissionError):
        in_group = os.getpgid(command) == os.getpgrp()
        if not terminal and not (in_group and reached):
            os.kill(command, signum)


def _set_title(title: str) -> None:
    """Show ``title`` as this process's command line, so that ``pkill -f 'gpupool run'`` means its parent alone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        first, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, see proc(5)
        text = title.encode(errors="replace")[: max(0, end - first - 1)]
        if first:
            ctypes.memmove(first, text.ljust(end - first, b"\0"), end - first)


def _reap(command: int) -> int | None:
    """Reap all dead children, adopted ones too; return the command's wait status if it is among them."""
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
    """Kill every descendant; orphans become children and are found again."""
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


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # `gpupool run` is gone
        sock.send(json.dumps(message).encode())
