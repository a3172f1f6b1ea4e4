"""``gpupool server``"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from traitlets import TraitError

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.server.daemon import directory as folder
from jupyter_gpupool.server.daemon.daemon_app import GPUPoolDaemon
from jupyter_gpupool.server.daemon.pool_app import DEFAULT_PORT, GPUPoolServer

from .command import Command, one_line
from .options import Parser, UsageError, port


class ServerApp(Command):
    name = "server"
    usage = "[options] [DIRECTORY]"
    description = (
        "Serve this machine's GPUs as a pool, until SIGTERM or Ctrl-C. With a directory created by\n"
        "`gpupool server init`, it serves many users, over TLS and with tokens. Without one, it serves only you: your\n"
        "other commands and notebooks on this machine find it. Without NVIDIA hardware it serves emulated GPUs."
    )
    examples = (
        "  gpupool server\n"
        "  gpupool server --emulate --LocalEngine.emulated_count=8\n"
        "  gpupool server init /etc/gpupool/server --address gpus.example\n"
        "  gpupool server /etc/gpupool/server"
    )
    asks_pool = False
    _directory: Path | None = None
    classes = [GPUPoolDaemon, *GPUPoolDaemon.classes]

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "directory",
            nargs="?",
            metavar="DIRECTORY",
            help="directory of a secured server (default: GPUPOOL_SERVER_DIR, else /etc/gpupool/server or "
            "~/.gpupool/server, if one exists)",
        )
        parser.add_argument(
            "--host",
            metavar="ADDRESS",
            help="address to listen on (default: 127.0.0.1; of a secured server: all)",
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
        parser.add_argument(
            "--emulate", action="store_true", help="serve emulated GPUs, even if there are real ones"
        )
        parser.add_argument("--persistent", action="store_true", help="keep leases when the pool restarts")
        parser.add_argument(
            "--ephemeral",
            action="store_true",
            help="use a free port, and stop when the process that started it has ended and no lease is left",
        )

    def check(self) -> None:
        args = self.args
        if args.ephemeral and (args.port is not None or args.persistent or args.directory):
            raise UsageError("--ephemeral cannot be combined with --port, --persistent or a directory")
        given = args.directory
        found = Path(given).expanduser().absolute() if given else None if args.ephemeral else folder.find()
        if found is not None and not (found / folder.CONFIGURATION).is_file():
            raise UsageError(
                f"{found} is not a server's directory; to create one: gpupool server init {found}"
            )
        self._directory = found
        if found is not None and not args.config:
            args.config = str(found / folder.CONFIGURATION)

    def act(self) -> int:
        args = self.args
        app: type[GPUPoolServer] = GPUPoolServer if self._directory is None else GPUPoolDaemon
        if self._directory is not None:
            self.config.GPUPoolDaemon.directory = str(self._directory)
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
            # The pool only needs to see when that process ends; then this file descriptor becomes readable.
            self.config.GPUPoolServer.starter_fd = os.pidfd_open(os.getppid())
        try:
            pool = app(config=self.config, log=self.log)
            pool.start()
        except TraitError as e:
            raise UsageError(one_line(e)) from None
        return 0


def add_addresses(parser: Parser, default: str) -> None:
    """Add the option for the names in the certificate."""
    parser.add_argument(
        "--address",
        metavar="NAME",
        action="append",
        default=[],
        help=f"a host name or an IP address that clients use for this server; may be repeated (default: {default})",
    )


class InitApp(Command):
    name = "server init"
    usage = "[options] [DIRECTORY]"
    description = (
        "Create the directory of a secured server, with a certificate authority, a certificate, a ledger, an\n"
        "administrator's token and a commented configuration. Existing files are never overwritten."
    )
    examples = "  gpupool server init /etc/gpupool/server --address gpus.example --address 192.0.2.7"
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="a new or empty directory")
        parser.add_argument(
            "--keep",
            action="store_true",
            help="change nothing where the directory has a configuration already",
        )
        add_addresses(parser, "this machine's name")
        parser.add_argument(
            "--host", metavar="ADDRESS", default="", help="address to listen on (default: all)"
        )
        parser.add_argument(
            "--port",
            metavar="N",
            type=port,
            default=DEFAULT_PORT,
            help="port for control (default: %(default)s)",
        )
        parser.add_argument(
            "--data-port",
            metavar="N",
            type=port,
            default=folder.DATA_PORT,
            help="port for data (default: %(default)s)",
        )

    def check(self) -> None:
        if not self.args.port or not self.args.data_port or self.args.port == self.args.data_port:
            raise UsageError(
                "--port and --data-port must be two different ports, and not 0, because clients have to know them"
            )

    def act(self) -> int:
        given = self.args.directory
        directory = (Path(given).expanduser() if given else folder.default()).absolute()
        if self.args.keep and (directory / folder.CONFIGURATION).is_file():
            print(f"Kept {directory}, which has a configuration already")
            return 0
        for path in folder.initialise(directory, self.args.address, self._listening()):
            print(f"Wrote {path}")
        administrator = directory / folder.ADMINISTRATOR
        named = "" if directory == folder.default().absolute() else f" {directory}"
        print(
            f"\nStart the server:  gpupool server{named}\n"
            f"Create a token:    GPUPOOL_CONFIG_DIR={administrator} gpupool token create --description NAME\n"
            f"Keep secret:       {directory / folder.CA_KEY}, {directory / folder.SERVER_KEY} and {administrator}"
        )
        return 0

    def _listening(self) -> folder.Listening:
        return folder.Listening(self.args.host, self.args.port, self.args.data_port)


def with_configuration(given: str | None) -> tuple[Path, str]:
    """Return a secured server's directory, and its configuration. Raises UsageError."""
    directory = (Path(given).expanduser() if given else folder.default()).absolute()
    configuration = directory / folder.CONFIGURATION
    if not configuration.is_file():
        raise UsageError(f"{directory} is not a server's directory; to create one: gpupool server init")
    return directory, str(configuration)


class RenewApp(Command):
    name = "server renew"
    usage = "[options] [DIRECTORY]"
    description = (
        "Renew a secured server's certificate with the server's own authority, before it expires or when the server's\n"
        "names change. A running server loads it by itself within seconds."
    )
    examples = "  gpupool server renew /etc/gpupool/server"
    asks_pool = False
    classes = [GPUPoolDaemon]

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="the server's directory")
        add_addresses(parser, "the addresses in the directory's configuration")

    def check(self) -> None:
        self._directory, self.args.config = with_configuration(self.args.directory)

    def act(self) -> int:
        addresses = self.args.address or list(GPUPoolDaemon(config=self.config).addresses)
        if not addresses:
            raise UsageError("which addresses? Give --address, or set c.GPUPoolDaemon.addresses")
        print(f"Wrote {folder.renew(self._directory, addresses)}, for {', '.join(addresses)}")
        return 0


class AdministratorApp(Command):
    name = "server administrator"
    usage = "[options] [DIRECTORY]"
    description = (
        "Create an administrator's token in the ledger of a secured server, which may be running, and write its\n"
        "bundle, a tar archive: where the former one was lost, or where the configuration names another ledger, such\n"
        "as one on PostgreSQL. Whoever reads the server's configuration can do this."
    )
    examples = (
        "  gpupool server administrator --output administrator.tar /etc/gpupool/server\n"
        "  kubectl exec gpupool-0 -- gpupool server administrator --output - /var/lib/gpupool/server | tar -xC admin"
    )
    asks_pool = False
    classes = [GPUPoolDaemon, *GPUPoolDaemon.classes]

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="the server's directory")
        parser.add_argument(
            "--output", metavar="FILE", required=True, help="new file for the bundle, or - for stdout"
        )

    def check(self) -> None:
        self._directory, self.args.config = with_configuration(self.args.directory)
        if self.args.output == "-" and sys.stdout.isatty():
            raise UsageError("refusing to write a tar archive to a terminal; use --output FILE, or pipe it")

    def act(self) -> int:
        self.config.GPUPoolDaemon.directory = str(self._directory)
        if self.args.output == "-":
            sys.stdout.buffer.write(self._archive())
            sys.stdout.buffer.flush()
            return 0
        path = Path(self.args.output).expanduser()
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                try:
                    f.write(self._archive())
                except BaseException:
                    path.unlink()
                    raise
        except OSError as e:
            raise PoolError(f"cannot write {path}: {e.strerror}") from None
        print(f"Wrote {path}")
        return 0

    def _archive(self) -> bytes:
        return bundle.tar(GPUPoolDaemon(config=self.config).new_administrator())
