"""``gpupool request``: a lease for a shell.

A lease lives and dies with its holder. Here that is a process in the background, which ends with the
terminal session that asked, with the lease, or when it is told to; or this command itself (``--foreground``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shlex
import subprocess
import sys
from typing import Any

from ..engines import process
from .base import Command
from .obtain import Interrupted, Obtained, Obtaining, interruptions, new_config, release
from .options import Parser, UsageError, add_request_options, complete_request


def process_id(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a process id is a number from 1 up, not {text!r}")
    return value


class RequestApp(Command):
    name = "request"
    description = (
        "Take a lease and keep it for a shell. Prints what the shell has to execute, so that every PyTorch program\n"
        "started from it finds the slices:\n\n"
        '  eval "$(gpupool request -n 1 -p 0.5)"\n\n'
        "A process in the background holds the lease until `gpupool release`, or until the terminal session ends\n"
        "in which it was requested."
    )
    examples = (
        '  eval "$(gpupool request -n 2)"; python train.py; gpupool release --all\n'
        '  eval "$(gpupool request --for $$)"       for this shell or script only\n'
        "  gpupool request --foreground             hold it here, until Ctrl-C"
    )
    lists = True
    _given: tuple[str, ...] = ()
    _alarm = -1

    def add_options(self, parser: Parser) -> None:
        add_request_options(parser)
        group = parser.add_argument_group("how long to keep it")
        group.add_argument(
            "--foreground", action="store_true", help="hold the lease in this process, until Ctrl-C"
        )
        group.add_argument(
            "--for",
            dest="owner",
            metavar="PID",
            type=process_id,
            help="until that process ends (default: the leader of this terminal session)",
        )
        parser.add_argument("--in-background", action="store_true", help=argparse.SUPPRESS)

    def parse_command_line(self, argv: Any = None) -> None:
        self._given = tuple(argv or ())
        super().parse_command_line(argv)

    def check(self) -> None:
        complete_request(self.args)
        if self.args.owner is not None:
            try:
                os.close(os.pidfd_open(self.args.owner))
            except OSError:
                raise UsageError(f"there is no process {self.args.owner} to keep a lease for") from None

    def act(self) -> int:
        if self.args.foreground or self.args.in_background:
            return self._hold()
        return self._start_holder()

    # -- in front

    def _start_holder(self) -> int:
        """Start this command again as a background process, and pass on what it prints."""
        owner = [] if self.args.owner is not None else [f"--for={_session_leader()}"]
        holder = subprocess.Popen(
            process.command("jupyter_gpupool", self.name, *self._given, *owner, "--in-background"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert holder.stdout is not None
        try:
            with interruptions():
                said = holder.stdout.read()  # until it has detached itself, or ended
        except Interrupted as e:
            holder.terminate()
            holder.wait()
            return 128 + e.signum
        if not said:
            return holder.wait()
        holder.returncode = 0  # it stays, and is nobody's to wait for
        sys.stdout.write(said.decode())
        sys.stdout.flush()
        return 0

    # -- the holder

    def _hold(self) -> int:
        ended, self._alarm = os.pipe()
        obtained: Obtained | None = None
        config = new_config()
        try:
            with interruptions():
                obtained = Obtaining(self, "shell", config, lambda reason: self._ring()).obtain()
                self._print(obtained)
                if self.args.in_background:
                    _detach()
                else:
                    self.tell.info("Holding the lease until Ctrl-C, or until it is released")
                watched = [ended]
                if self.args.owner is not None:
                    watched.append(os.pidfd_open(self.args.owner))
                select.select(watched, [], [])
        except Interrupted:
            if obtained is None:
                raise
        except OSError:
            # Nobody reads what was printed, or the owner has ended: there is nobody to hold it for.
            if obtained is None:
                raise
        finally:
            if obtained is not None:
                if obtained.hold.lost:
                    self.tell.warning(f"Lease {obtained.hold.lease.id} has ended: {obtained.hold.reason()}")
                release(self, obtained)
            config.unlink(missing_ok=True)
        return 0

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._alarm, b"x")

    def _print(self, obtained: Obtained) -> None:
        environment = obtained.environment()
        if self.args.json:
            self.print_json({"lease": obtained.hold.lease.id, "environment": environment})
        else:
            for name, value in environment.items():
                print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()


def _session_leader() -> int:
    """The process with which this terminal session ends; the caller, where that cannot be seen from here."""
    leader = os.getsid(0)
    return leader if leader not in (0, os.getpid()) else os.getppid()


def _detach() -> None:
    """Leave the terminal and the pipe, so that nobody waits for this process."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
