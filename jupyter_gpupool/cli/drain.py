"""``gpupool server drain`` and ``gpupool server undrain``"""

from __future__ import annotations

from .command import Command
from .options import Parser, UsageError


class DrainApp(Command):
    name = "server drain"
    usage = "[options] SERVER"
    description = (
        "Grant nothing new on a GPU server, for example before maintenance. Its leases continue until they end by\n"
        "themselves. The server stays drained when it or the pool restarts. For administrators."
    )
    examples = "  gpupool server drain gpu-7\n  gpupool leases\n  gpupool server undrain gpu-7"
    draining = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("server", metavar="SERVER", help="the server's name, as gpupool gpus lists it")

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            raise UsageError("no pool is running, so there is no server to drain; name a pool with --url")
        name = self.args.server
        client.drain(name, self.draining)
        if not self.draining:
            print(f"{name} gets new leases again")
            return 0
        left = sum(any(s.server == name for s in lease.slices) for lease in client.leases())
        what = {0: "no lease is left there", 1: "1 lease is left there"}.get(
            left, f"{left} leases are left there"
        )
        print(f"{name} gets no new leases; {what}")
        return 0


class UndrainApp(DrainApp):
    name = "server undrain"
    description = "Grant leases on a drained GPU server again. For administrators."
    examples = "  gpupool server undrain gpu-7"
    draining = False
