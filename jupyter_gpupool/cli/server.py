"""``gpupool server``"""

from __future__ import annotations

import argparse
import os

from traitlets import TraitError

from ..api.server import DEFAULT_PORT, PoolApp
from .base import Command, one_line
from .options import Parser, UsageError


def port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 (any free one) to 65535, not {text!r}")
    return int(text)


class ServerApp(Command):
    name = "server"
    description = (
        "Serve this machine's GPUs as a pool, until SIGTERM or Ctrl-C. Your other commands and notebooks on this\n"
        "machine find it by themselves. Without NVIDIA hardware it offers emulated GPUs."
    )
    examples = (
        "  gpupool server\n"
        "  gpupool server --emulate --LocalEngine.emulated_count=8\n"
        "  gpupool server --host 0.0.0.0 --LocalEngine.host=192.0.2.7 --persistent"
    )
    asks_pool = False
    classes = PoolApp.classes

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
        parser.add_argument(
            "--port",
            metavar="N",
            type=port,
            help=f"port to listen on; 0 takes a free one (default: {DEFAULT_PORT})",
        )
        parser.add_argument(
            "--db-url",
            metavar="URL",
            help="database of the ledger (default: a file in Jupyter's data directory)",
        )
        parser.add_argument("--emulate", action="store_true", help="offer emulated GPUs, whatever there is")
        parser.add_argument("--persistent", action="store_true", help="leases outlive a restart of the pool")
        parser.add_argument(
            "--ephemeral",
            action="store_true",
            help="on a free port, and only until the process that started it has ended and no lease is left",
        )

    def check(self) -> None:
        if self.args.ephemeral and (self.args.port is not None or self.args.persistent):
            raise UsageError("--ephemeral goes with neither --port nor --persistent")

    def act(self) -> int:
        args = self.args
        if args.host is not None:
            self.config.PoolApp.host = args.host
        if args.port is not None:
            self.config.PoolApp.port = args.port
        if args.db_url is not None:
            self.config.PoolService.db_url = args.db_url
        if args.emulate:
            self.config.LocalEngine.emulate = "always"
        if args.persistent:
            self.config.LocalEngine.persistent = True
        if args.ephemeral:
            # Readable as soon as that process has ended, which is all that the pool wants to know.
            self.config.PoolApp.starter_fd = os.pidfd_open(os.getppid())
        try:
            pool = PoolApp(config=self.config, log=self.log)
            pool.start()
        except TraitError as e:
            raise UsageError(one_line(e)) from None
        return 0
