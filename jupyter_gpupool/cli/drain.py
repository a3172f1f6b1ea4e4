"""``gpupool server drain`` and ``gpupool server undrain``"""

from __future__ import annotations

from ..api import discovery
from .base import Command
from .options import Parser, UsageError


class DrainApp(Command):
    name = "server drain"
    usage = "[options] SERVER"
    description = (
        "Place nothing new on a GPU server, for example before its maintenance. Its leases go on until they end by\n"
        "themselves. The pool remembers, also when it or that server is restarted. For administrators."
    )
    examples = "  gpupool server drain gpu-7\n  gpupool leases\n  gpupool server undrain gpu-7"
    draining = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("server", metavar="SERVER", help="its name, as gpupool gpus shows it")

    def act(self) -> int:
        if not self.names_pool() and discovery.find() is None:
            raise UsageError("no pool runs whose servers could be drained; name one with --url")
        client, _ = self.pool()
        name = self.args.server
        client.drain(name, self.draining)
        if not self.draining:
            print(f"{name} gets new leases again")
            return 0
        left = sum(any(s.server == name for s in lease.slices) for lease in client.leases())
        what = {0: "none is left there", 1: "1 lease is left there"}.get(left, f"{left} leases are left there")
        print(f"{name} gets no new leases; {what}")
        return 0


class UndrainApp(DrainApp):
    name = "server undrain"
    description = "Place new leases on a drained GPU server again. For administrators."
    examples = "  gpupool server undrain gpu-7"
    draining = False
