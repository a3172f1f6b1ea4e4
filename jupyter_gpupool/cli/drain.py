"""``gpupool server drain`` and ``gpupool server undrain``"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from jupyter_gpupool.client.http import PoolClient

from .command import Command
from .options import Parser, UsageError

#: How often the pool is asked how far the moves are, in seconds.
_POLL_INTERVAL_S = 0.5


class DrainApp(Command):
    name = "server drain"
    usage = "[options] SERVER"
    description = (
        "Grant nothing new on a GPU server, for example before maintenance. Its leases continue until they end by\n"
        "themselves, or, with --move, are moved to other servers; their programs notice a pause. The server stays\n"
        "drained when it or the pool restarts. For administrators."
    )
    examples = (
        "  gpupool server drain gpu-7\n  gpupool server drain gpu-7 --move\n  gpupool server undrain gpu-7"
    )
    draining = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("server", metavar="SERVER", help="the server's name, as gpupool gpus lists it")
        if self.draining:
            parser.add_argument("--move", action="store_true", help="move its leases to other servers")

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            raise UsageError("no pool is running, so there is no server to drain; name a pool with --url")
        name = self.args.server
        if self.draining and self.args.move:
            return self._move(client, name)
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

    def _move(self, client: PoolClient, name: str) -> int:
        state = client.drain(name, move=True)
        print(f"{name} gets no new leases; {_leases(len(state['moves']))} to move", flush=True)
        told: set[str] = set()
        while True:
            for line in _news(state, told):
                print(line, flush=True)
            if state["over"]:
                break
            time.sleep(_POLL_INTERVAL_S)
            state = client.drained(name)
        stay = [move for move in state["moves"] if move["outcome"] == "stays"]
        if stay:
            print(f"{_leases(len(stay))} left on {name}; ask the holders to release, or try again later")
            return 1
        print(f"no lease is left on {name}")
        return 0


def _news(state: dict[str, Any], told: set[str]) -> Iterator[str]:
    """A line for each lease whose move is over, once."""
    for move in state["moves"]:
        lease, outcome = move["lease"], move["outcome"]
        if lease in told or outcome in ("waiting", "moving"):
            continue
        told.add(lease)
        of = f"lease {lease} of {move['owner']}"
        if outcome == "moved":
            yield f"{of} has moved to {move['to']} in {move['seconds']:.1f} s"
        elif outcome == "stays":
            yield f"{of} stays: {move['reason']}"
        else:
            yield f"{of} has ended: {move['reason']}"


def _leases(count: int) -> str:
    return "1 lease" if count == 1 else f"{count} leases"


class UndrainApp(DrainApp):
    name = "server undrain"
    description = "Grant leases on a drained GPU server again. For administrators."
    examples = "  gpupool server undrain gpu-7"
    draining = False
