"""``gpupool request``: a lease for a shell.

A lease lasts as long as its holder. The holder is a background process, which ends with the terminal session of
the request, with the lease, or on a signal; with ``--foreground`` it is this command itself.
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

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.environment import LEASE

from .acquire_lease import AcquiredLease, Interrupted, LeaseAcquisition, interruptions, new_config, release
from .command import Command
from .options import Parser, UsageError, add_request_options, complete_request, on_linux_only


def process_id(text: str) -> int:
    """Parse the id of a process. Raises ArgumentTypeError."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a process id is a number from 1 up, not {text!r}")
    return value


class RequestApp(Command):
    name = "request"
    description = (
        "Request GPUs for a shell and keep them. Prints lines for the shell to execute, so that every PyTorch program\n"
        "started from it finds the GPU slices:\n\n"
        '  eval "$(gpupool request -n 1 -p 0.5)"\n\n'
        "A background process holds the lease until `gpupool release`, or until the terminal session of the request\n"
        "ends."
    )
    examples = (
        '  eval "$(gpupool request -n 2)"; python train.py; gpupool release --all\n'
        '  eval "$(gpupool request --for $$)"       for this shell or script only\n'
        "  gpupool request --foreground             hold it in this terminal, until Ctrl-C"
    )
    lists = True
    _given: tuple[str, ...] = ()
    _alarm = -1

    def add_options(self, parser: Parser) -> None:
        add_request_options(parser)
        group = parser.add_argument_group("how long to keep it")
        group.add_argument(
            "--foreground", action="store_true", help="hold the lease in this process until Ctrl-C"
        )
        group.add_argument(
            "--for",
            dest="owner",
            metavar="PID",
            type=process_id,
            help="keep the lease until that process ends (default: the leader of this terminal session)",
        )
        parser.add_argument("--in-background", action="store_true", help=argparse.SUPPRESS)

    def parse_command_line(self, argv: Any = None) -> None:
        self._given = tuple(argv or ())
        super().parse_command_line(argv)

    def check(self) -> None:
        on_linux_only("gpupool request")
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
        """Start this command again as a background process, and print its output."""
        owner = [] if self.args.owner is not None else [f"--for={_session_leader()}"]
        holder = subprocess.Popen(
            processes.command("jupyter_gpupool", self.name, *self._given, *owner, "--in-background"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert holder.stdout is not None
        try:
            with interruptions():
                output = holder.stdout.read()  # until it detaches or ends
        except Interrupted as e:
            holder.terminate()
            holder.wait()
            return 128 + e.signum
        if not output:
            return holder.wait()
        holder.returncode = 0  # it keeps running; Popen must not wait for it
        sys.stdout.write(output.decode())
        sys.stdout.flush()
        return 0

    # -- the holder

    def _hold(self) -> int:
        ended, self._alarm = os.pipe()
        acquired: AcquiredLease | None = None
        config = new_config()
        try:
            with interruptions():
                acquired = LeaseAcquisition(self, "shell", config, lambda reason: self._ring()).acquire()
                self._print(acquired)
                if self.args.in_background:
                    _detach()
                else:
                    self.tell.info("Holding the lease until Ctrl-C, or until it is released")
                watched = [ended]
                if self.args.owner is not None:
                    watched.append(os.pidfd_open(self.args.owner))
                select.select(watched, [], [])
        except Interrupted:
            if acquired is None:
                raise
        except OSError:
            # Nothing reads the output, or the owner has ended: nobody needs the lease.
            if acquired is None:
                raise
        finally:
            if acquired is not None:
                if acquired.holder.lost:
                    self.tell.warning(
                        f"Lease {acquired.holder.lease.id} has ended: {acquired.holder.reason()}"
                    )
                release(self, acquired)
            config.unlink(missing_ok=True)
        return 0

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._alarm, b"x")

    def _print(self, acquired: AcquiredLease) -> None:
        # The shell keeps what it executes after the release: only what then has no effect.
        environment = {
            name: value
            for name, value in acquired.environment().items()
            if name in (LEASE, "CUDA_VISIBLE_DEVICES")
        }
        if self.args.json:
            self.print_json({"lease": acquired.holder.lease.id, "environment": environment})
        else:
            for name, value in environment.items():
                print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()


def _session_leader() -> int:
    """Return the leader of this terminal session; the parent process where the leader is not visible."""
    leader = os.getsid(0)
    return leader if leader not in (0, os.getpid()) else os.getppid()


def _detach() -> None:
    """Close the terminal and the pipe, so that nobody waits for this process."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
