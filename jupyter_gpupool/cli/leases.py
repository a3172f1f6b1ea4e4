"""``gpupool leases``, ``release``, ``resize`` and ``extend``"""

from __future__ import annotations

import time

from jupyter_gpupool.core.durations import format_duration
from jupyter_gpupool.core.errors import LeaseEnded, UnknownLease
from jupyter_gpupool.core.lease_words import lease_words
from jupyter_gpupool.core.models import Lease

from .command import Command
from .namespace import seconds
from .options import Parser, UsageError
from .table import table


class LeasesApp(Command):
    name = "leases"
    description = "List your leases; if you run the pool, the leases of all users."
    examples = "  gpupool leases\n  gpupool leases --all --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--all", action="store_true", help="include leases that have ended")

    def act(self) -> int:
        # Leases that have ended are in the ledger, which a pool has to open. All others need a running pool.
        client = self.pool()[0] if self.args.all else self.running_pool()
        leases = client.leases(include_ended=self.args.all) if client is not None else []
        if self.args.json:
            self.print_json({"leases": [lease.to_json() for lease in leases]})
        elif client is None:
            print("No leases: no GPU pool is running; --all lists those that have ended")
        elif not leases:
            print("No leases" if self.args.all else "No leases; --all lists those that have ended")
        else:
            print(
                table(
                    ["LEASE", "STATE", "GPUS", "MiB", "PYTORCH", "SINCE", "TIME LEFT", "OWNER", "LABEL"],
                    [_row(x) for x in leases],
                )
            )
        return 0


class ResizeApp(Command):
    name = "resize"
    usage = "[options] LEASE"
    description = "Change the memory of a lease's GPU slices. The GPUs and the tensors on them stay."
    examples = (
        "  gpupool resize -p 0.8 60475feb-34c2-46e1-9b90-5ded85ed96bf\n  gpupool resize -m 4096 60475feb"
    )

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("lease", metavar="LEASE", help="a lease's id, or its first characters")
        parser.add_argument(
            "-p",
            "--partial",
            type=float,
            metavar="F",
            help="fraction of each GPU's memory, above 0 and at most 1",
        )
        parser.add_argument("-m", "--memory", type=int, metavar="MiB", help="memory of each GPU in MiB")

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            raise UnknownLease("no GPU pool is running, so there is no lease to resize")
        lease = find_lease(self.args.lease, client.leases())
        resized = client.resize(lease.id, self.args.partial, self.args.memory)
        sizes = ", ".join(f"GPU {piece.index}: {piece.memory_mib} MiB" for piece in resized.slices)
        print(f"Lease {resized.id} now has {sizes}")
        return 0


class ExtendApp(Command):
    name = "extend"
    usage = "[options] LEASE --by TIME"
    description = "Extend a lease that has an end time, as far as its namespace allows."
    examples = "  gpupool extend 60475feb --by 2h"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("lease", metavar="LEASE", help="a lease's id, or its first characters")
        parser.add_argument(
            "--by", metavar="TIME", type=seconds, required=True, help="how much longer: 90m, 2h, 1d"
        )

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            raise UnknownLease("no GPU pool is running, so there is no lease to extend")
        lease = client.extend(find_lease(self.args.lease, client.leases()).id, self.args.by)
        print(f"Lease {lease.id} ends in {_left(lease)}")
        return 0


class KeepApp(Command):
    name = "keep"
    usage = "LEASE"
    description = (
        "Keep an idle lease: its idle time starts anew, so that it is neither parked nor ended for a while,\n"
        "and requests by others to release it are answered."
    )
    examples = "  gpupool keep 60475feb"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("lease", metavar="LEASE", help="a lease's id, or its first characters")

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            raise UnknownLease("no GPU pool is running, so there is no lease to keep")
        lease = client.keep(find_lease(self.args.lease, client.leases()).id)
        print(f"The idle time of lease {lease.id} starts anew")
        return 0


class ReleaseApp(Command):
    name = "release"
    usage = "[options] (LEASE ... | --all)"
    description = "Release leases, or withdraw queued requests. Programs that compute on them get an error."
    examples = (
        "  gpupool release 60475feb-34c2-46e1-9b90-5ded85ed96bf\n"
        "  gpupool release 60475feb      the first characters are enough"
    )

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "leases", nargs="*", metavar="LEASE", help="a lease's id, or its first characters"
        )
        parser.add_argument("--all", action="store_true", help="all your leases and queued requests")

    def check(self) -> None:
        if bool(self.args.leases) == self.args.all:
            raise UsageError("which leases? Give either their ids (see gpupool leases) or --all")

    def act(self) -> int:
        client = self.running_pool()
        if client is None:
            if self.args.all:
                print("No leases: no GPU pool is running")
                return 0
            raise UnknownLease("no GPU pool is running, so there is no lease to release")
        live = client.leases(mine=self.args.all)
        chosen = live if self.args.all else [find_lease(text, live) for text in self.args.leases]
        for lease in dict.fromkeys(lease.id for lease in chosen):
            ended = client.release(lease)
            print(f"Lease {ended.id} is {ended.state.value}")
        if not chosen:
            print("No leases")
        return 0


def find_lease(text: str, live: list[Lease]) -> Lease:
    """Return the lease whose id begins with ``text``. Raises UsageError for several, LeaseEnded for none."""
    found = [lease for lease in live if lease.id.startswith(text.lower())]
    if len(found) > 1:
        raise UsageError(f"{len(found)} leases begin with {text!r}; give more of the id")
    if not found:
        raise LeaseEnded(f"you have no live lease whose id begins with {text!r}; see gpupool leases --all")
    return found[0]


def _row(lease: Lease) -> list[str]:
    words = lease_words(lease)
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(words.since))
    head = [lease.id, words.state, words.gpus, words.memory, words.torch]
    return [*head, began, _left(lease), lease.request.owner, words.label]


def _left(lease: Lease) -> str:
    if lease.expires_at is None or lease.state.ended:
        return "-"
    return format_duration(max(0.0, lease.expires_at - time.time()))
