"""``gpupool run``"""

from __future__ import annotations

import os
import shlex
import shutil

from .base import Command, fail
from .keeper import NOT_EXECUTABLE, Keeper
from .obtain import Obtained, Obtaining, interruptions, new_config, release
from .options import Parser, UsageError, add_request_options, complete_request

#: What a shell answers for a command that does not exist.
NOT_FOUND = 127


class RunApp(Command):
    name = "run"
    usage = "[-n N] [-p F | -m MiB] [options] [--] COMMAND [ARGUMENT ...]"
    description = (
        "Run a command on slices of pooled GPUs: its PyTorch finds them as its CUDA devices. Waits until they are\n"
        "free, and gives them back when the command has ended. The exit code is the command's."
    )
    examples = (
        "  gpupool run -- python train.py --epochs 10        one whole GPU\n"
        "  gpupool run -n 2 -p 0.8 -- python train.py        two GPUs with 80 % of their memory\n"
        "  gpupool run -m 4096 --filter name=V100 -- bash    4096 MiB of a V100 for a shell\n"
        "  NUM_GPUS=2 PARTIAL_GPU=0.5 gpupool run python train.py"
    )
    runs_command = True
    _obtained: Obtained | None = None

    def add_options(self, parser: Parser) -> None:
        add_request_options(parser)

    def check(self) -> None:
        complete_request(self.args)
        if not self.command:
            raise UsageError(
                "which command? Write it behind the options: gpupool run -n 1 -- python train.py"
            )

    def act(self) -> int:
        self._find_program()
        config = new_config()
        keeper = Keeper(self.command, config)  # forks: before there is anything that a fork should not have
        try:
            with interruptions():
                obtained = self._obtained = Obtaining(self, label(self.command), config, self._lost).obtain()
                self.tell.info(
                    f"Running client command '{shlex.join(self.command)}' on {len(obtained.hold.spec.devices)} GPUs, "
                    "with the following servers:"
                )
                for line in obtained.servers():
                    self.tell.info(line)
            return keeper.run(obtained.environment())
        finally:
            keeper.close()
            if self._obtained is not None:
                release(self, self._obtained)

    def _find_program(self) -> None:
        program = self.command[0]
        if shutil.which(program) is None:
            if os.path.dirname(program) and os.path.exists(program):
                fail(f"{program} is not executable", NOT_EXECUTABLE)
            fail(f"command not found: {program}", NOT_FOUND)

    def _lost(self, reason: str) -> None:
        if self._obtained is not None:
            hold = self._obtained.hold
            self.tell.warning(f"Lease {hold.lease.id} has ended while the command runs: {hold.reason()}")


def label(command: list[str]) -> str:
    """What others may read of a command: its program and script, never its options, which may hold secrets."""
    words = [os.path.basename(command[0])]
    if len(command) > 1 and not command[1].startswith("-"):
        words.append(os.path.basename(command[1]))
    text = " ".join(words)
    return "".join(c if c.isprintable() else "?" for c in text)[:80]
