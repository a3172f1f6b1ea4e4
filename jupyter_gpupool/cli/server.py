"""``gpupool server``"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from traitlets import TraitError

from ..api.server import DEFAULT_PORT, PoolApp
from ..daemon import folder
from ..daemon.app import Daemon
from .base import Command, one_line
from .options import Parser, UsageError


def port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 (any free one) to 65535, not {text!r}")
    return int(text)


class ServerApp(Command):
    name = "server"
    usage = "[options] [DIRECTORY]"
    description = (
        "Serve this machine's GPUs as a pool, until SIGTERM or Ctrl-C. With a directory that `gpupool server init`\n"
        "has made: to many users, over TLS, to whom it gave tokens. Without one: to you alone; your other commands\n"
        "and notebooks on this machine find it by themselves. Without NVIDIA hardware it offers emulated GPUs."
    )
    examples = (
        "  gpupool server\n"
        "  gpupool server --emulate --LocalEngine.emulated_count=8\n"
        "  gpupool server init /etc/gpupool/server --address gpus.example\n"
        "  gpupool server /etc/gpupool/server"
    )
    asks_pool = False
    _directory: Path | None = None
    classes = [Daemon, *PoolApp.classes]

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "directory",
            nargs="?",
            metavar="DIRECTORY",
            help="of a secured server (default: GPUPOOL_SERVER_DIR, else /etc/gpupool/server or ~/.gpupool/server, "
            "where there is one)",
        )
        parser.add_argument(
            "--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1; secured: all)"
        )
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
        args = self.args
        if args.ephemeral and (args.port is not None or args.persistent or args.directory):
            raise UsageError("--ephemeral goes with neither --port nor --persistent nor a directory")
        given = args.directory
        found = Path(given).expanduser().absolute() if given else None if args.ephemeral else folder.find()
        if found is not None and not (found / folder.CONFIGURATION).is_file():
            raise UsageError(f"{found} is no server's directory; gpupool server init {found} makes it one")
        self._directory = found
        if found is not None and not args.config:
            args.config = str(found / folder.CONFIGURATION)

    def act(self) -> int:
        args = self.args
        app: type[PoolApp] = PoolApp if self._directory is None else Daemon
        if self._directory is not None:
            self.config.Daemon.directory = str(self._directory)
        if args.host is not None:
            self.config[app.__name__].host = args.host
        if args.port is not None:
            self.config[app.__name__].port = args.port
        if args.db_url is not None:
            self.config.PoolService.db_url = args.db_url
        if args.emulate:
            self.config.LocalEngine.emulate = self.config.RayEngine.emulate = "always"
        if args.persistent:
            self.config.LocalEngine.persistent = self.config.RayEngine.persistent = True
        if args.ephemeral:
            # Readable as soon as that process has ended, which is all that the pool wants to know.
            self.config.PoolApp.starter_fd = os.pidfd_open(os.getppid())
        try:
            pool = app(config=self.config, log=self.log)
            pool.start()
        except TraitError as e:
            raise UsageError(one_line(e)) from None
        return 0


def add_addresses(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--address",
        metavar="NAME",
        action="append",
        default=[],
        help=f"a name or an IP address that clients know this server by; may be repeated (default: {default})",
    )


class InitApp(Command):
    name = "server init"
    usage = "[options] [DIRECTORY]"
    description = (
        "Make the directory of a secured server: a certificate authority, a certificate, a ledger with an\n"
        "administrator's token, and a commented configuration. What is there already is never overwritten."
    )
    examples = "  gpupool server init /etc/gpupool/server --address gpus.example --address 192.0.2.7"
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="a new or an empty one")
        add_addresses(parser, "this machine's name")
        parser.add_argument(
            "--host", metavar="ADDRESS", default="", help="address to listen on (default: all)"
        )
        parser.add_argument(
            "--port", metavar="N", type=port, default=DEFAULT_PORT, help="for control (%(default)s)"
        )
        parser.add_argument(
            "--data-port", metavar="N", type=port, default=folder.DATA_PORT, help="for data (%(default)s)"
        )

    def check(self) -> None:
        if not self.args.port or not self.args.data_port or self.args.port == self.args.data_port:
            raise UsageError(
                "control and data need two ports of their own, which clients know: neither may be 0"
            )

    def act(self) -> int:
        given = self.args.directory
        directory = (Path(given).expanduser() if given else folder.default()).absolute()
        for path in folder.initialise(directory, self.args.address, self._listening()):
            print(f"Wrote {path}")
        administrator = directory / folder.ADMINISTRATOR
        named = "" if directory == folder.default().absolute() else f" {directory}"
        print(
            f"\nServe it:          gpupool server{named}\n"
            f"Admit somebody:    GPUPOOL_CONFIG_DIR={administrator} gpupool token create --description NAME\n"
            f"Keep to yourself:  {directory / folder.CA_KEY}, {directory / folder.SERVER_KEY} and {administrator}"
        )
        return 0

    def _listening(self) -> folder.Listening:
        return folder.Listening(self.args.host, self.args.port, self.args.data_port)


class RenewApp(Command):
    name = "server renew"
    usage = "[options] [DIRECTORY]"
    description = (
        "Make a secured server's certificate again, with its own authority: before it ends, or when the server has\n"
        "other names. A server that runs takes it up by itself within seconds."
    )
    examples = "  gpupool server renew /etc/gpupool/server"
    asks_pool = False
    classes = [Daemon]

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="the server's")
        add_addresses(parser, "those in the directory's configuration")

    def check(self) -> None:
        given = self.args.directory
        self._directory = (Path(given).expanduser() if given else folder.default()).absolute()
        configuration = self._directory / folder.CONFIGURATION
        if not configuration.is_file():
            raise UsageError(f"{self._directory} is no server's directory; gpupool server init makes one")
        self.args.config = str(configuration)

    def act(self) -> int:
        addresses = self.args.address or list(Daemon(config=self.config).addresses)
        if not addresses:
            raise UsageError("for which names? Give --address, or set c.Daemon.addresses")
        print(f"Wrote {folder.renew(self._directory, addresses)}, for {', '.join(addresses)}")
        return 0
