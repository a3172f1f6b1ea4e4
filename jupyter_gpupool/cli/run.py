"""``gpupool run``"""

from __future__ import annotations

import os
import shlex
import shutil
import threading
from typing import Any

from .acquire_lease import AcquiredLease, LeaseAcquisition, interruptions, new_config, release
from .command import Command, fail
from .options import Parser, UsageError, add_request_options, complete_request, on_linux_only
from .process_supervisor import NOT_EXECUTABLE, ProcessSupervisor

#: A shell's exit code for a command that does not exist.
NOT_FOUND = 127
#: How long the reason for which a lease ended may take to arrive, in seconds.
_REASON_PATIENCE_S = 15.0


class RunApp(Command):
    name = "run"
    usage = "[-n N] [-p F | -m MiB] [options] [--] COMMAND [ARGUMENT ...]"
    description = (
        "Run a command on GPU slices of a pool, which its PyTorch uses as CUDA devices. Waits until GPUs are free,\n"
        "and releases them when the command ends. The exit code is the command's."
    )
    examples = (
        "  gpupool run -- python train.py --epochs 10        one whole GPU\n"
        "  gpupool run -n 2 -p 0.8 -- python train.py        two GPUs with 80 % of their memory\n"
        "  gpupool run -m 4096 --filter name=V100 -- bash    4096 MiB of a V100 for a shell\n"
        "  NUM_GPUS=2 PARTIAL_GPU=0.5 gpupool run python train.py"
    )
    runs_command = True
    _acquired: AcquiredLease | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: the user was told why the lease has ended
        self._told = threading.Event()

    def add_options(self, parser: Parser) -> None:
        add_request_options(parser)
        parser.add_argument(
            "--wait-for-pool",
            action="store_true",
            help="wait while no pool answers, instead of failing; what the pool refuses still fails",
        )

    def check(self) -> None:
        on_linux_only("gpupool run")
        complete_request(self.args)
        if not self.command:
            raise UsageError("which command? Write it after the options: gpupool run -n 1 -- python train.py")

    def act(self) -> int:
        self._find_program()
        config = new_config()
        supervisor = ProcessSupervisor(
            self.command, config
        )  # forks, so it comes before threads and connections
        try:
            with interruptions():
                acquisition = LeaseAcquisition(self, label(self.command), config, self._lost)
                waits = self.args.wait_for_pool
                acquired = acquisition.acquire_when_answered() if waits else acquisition.acquire()
                self._acquired = acquired
                self.tell.info(
                    f"Running client command '{shlex.join(self.command)}' on {len(acquired.holder.spec.devices)} GPUs, "
                    "with the following servers:"
                )
                for line in acquired.servers():
                    self.tell.info(line)
            code = supervisor.run(acquired.environment())
            if code:
                self._explain()
            return code
        finally:
            supervisor.close()
            if self._acquired is not None:
                release(self, self._acquired)

    def _find_program(self) -> None:
        program = self.command[0]
        if shutil.which(program) is None:
            if os.path.dirname(program) and os.path.exists(program):
                fail(f"{program} is not executable", NOT_EXECUTABLE)
            fail(f"command not found: {program}", NOT_FOUND)

    def _lost(self, reason: str) -> None:
        if self._acquired is not None:
            holder = self._acquired.holder
            self.tell.warning(f"Lease {holder.lease.id} has ended while the command runs: {holder.reason()}")
        self._told.set()

    def _explain(self) -> None:
        """Say of a lease that has just ended that it has: the command may have failed for that, and been quicker."""
        if self._acquired is not None:
            self._acquired.holder.look()
            if self._acquired.holder.lost:
                self._told.wait(_REASON_PATIENCE_S)


def label(command: list[str]) -> str:
    """Return the command's program and script; not its options, which may contain secrets."""
    words = [os.path.basename(command[0])]
    if len(command) > 1 and not command[1].startswith("-"):
        words.append(os.path.basename(command[1]))
    text = " ".join(words)
    return "".join(c if c.isprintable() else "?" for c in text)[:80]
